"""The rendered course: its contents are the notebooks, and it builds without a warning (dead links are warnings)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).parents[2] / "notebooks"


def test_contents_are_the_notebooks():
    contents = yaml.safe_load((FOLDER / "_toc.yml").read_text("utf-8"))
    assert contents["root"] == "README"
    assert [chapter["file"] for chapter in contents["chapters"]] == [
        path.stem for path in sorted(FOLDER.glob("*.ipynb"))
    ]


@pytest.mark.skipif(importlib.util.find_spec("jupyter_book") is None, reason="jupyter-book is not installed")
def test_builds_without_a_warning(tmp_path):
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", FOLDER, "--path-output", tmp_path, "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    pages = tmp_path / "_build" / "html"
    for name in ["README", *(path.stem for path in FOLDER.glob("*.ipynb"))]:
        page = (pages / f"{name}.html").read_text("utf-8")
        assert not re.findall(r'href="(?!https?:|_sources/)[^"]*\.ipynb[^"]*"', page)
