"""Every kernel that a notebook defines is run by its chapter's tests, and compiles for GPUs, not just the interpreter.

`test_chapter_NN.py` runs them: its KERNELS maps each kernel's name to the cases it is run through, its OFFLINE to the
lists of argument types (see `gptoss_kernels.offline`) that it is compiled with.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.offline import SHARED_MEMORY_LIMIT

WITH_KERNELS = [path.stem for path in extract.NOTEBOOKS if extract.kernel_names(path)]
CAPABILITIES = (80, 90)


def chapter_tests(stem):
    path = Path(__file__).parent / f"test_chapter_{stem[:2]}.py"
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_every_kernel_is_tested(stem):
    names = set(extract.kernel_names(extract.FOLDER / f"{stem}.ipynb"))
    module = chapter_tests(stem)
    assert set(module.KERNELS) == names and all(module.KERNELS.values())
    assert set(module.OFFLINE) == names and all(module.OFFLINE.values())


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_every_kernel_compiles(stem):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_notebook.py"
    environment["PYTHONPATH"] = str(extract.ROOT)
    command = [sys.executable, script, stem, *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == set(extract.kernel_names(extract.FOLDER / f"{stem}.ipynb"))
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY_LIMIT[row["capability"]], row
