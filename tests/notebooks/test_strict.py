"""Every notebook runs with its folded solutions pasted over the stubs, each of which its checker must accept."""

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the course extra")
nbclient = pytest.importorskip("nbclient")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import extract  # noqa: E402


@pytest.mark.parametrize("path", extract.NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_the_solutions_pasted(path, monkeypatch):
    monkeypatch.setenv("GPTOSS_STRICT", "1")
    notebook = extract.solve(extract.read(path))
    assert not any(
        extract.is_stub(node)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for node in extract.functions(cell.source)
    )
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = "\n".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    attempts = sum(len(extract.ATTEMPT.findall(cell.source)) for cell in notebook.cells if cell.cell_type == "code")
    assert printed.count("✓ ") >= attempts and "packaged solution" not in printed


def test_strict_swallows_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTOSS_STRICT", "1")
    cell = nbformat.v4.new_code_cell(
        "from gptoss_kernels.course import check\n"
        "def sink_share(scores, sink):\n    return scores.sum()\n"
        "sink_share = check.attempt(sink_share, chapter=0)"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Mistake"):
        nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
