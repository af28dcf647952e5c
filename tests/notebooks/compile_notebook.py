"""Compile a notebook's kernels for a GPU without one, and print one JSON row each. A process of its own, run by
test_notebook_kernels.py: the kernels must not have been decorated for the interpreter.

usage: compile_notebook.py NOTEBOOK_STEM CAPABILITY...
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.offline import compile_offline


def offline(stem: str) -> dict[str, list[dict]]:
    """OFFLINE of the chapter's test module."""
    path = Path(__file__).parent / f"test_chapter_{stem[:2]}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OFFLINE


if __name__ == "__main__":
    stem, *capabilities = sys.argv[1:]
    for name, variants in offline(stem).items():
        kernel = getattr(extract.load(stem), name)
        for variant in variants:
            for capability in map(int, capabilities):
                found = compile_offline(kernel, variant, capability, num_warps=4, num_stages=2)
                print(json.dumps({"kernel": name, "capability": capability, **dataclasses.asdict(found)}), flush=True)
