"""Runs notebooks in place and stores them without what changes from run to run (times, versions of the kernel).

Pictures are stored with a palette of 256 colours: a third of the size, and no difference that one can see in a plot.

python notebooks/refresh.py [notebook.ipynb ...]        default: all of them
"""

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from gptoss_kernels.course.plots import with_palette

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},  # which knows % and ! lines
}


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strips run times and machine-dependent metadata, joins split streams, numbers cells and their ids by position,
    stores pictures with a palette."""
    notebook.metadata = nbformat.from_dict(METADATA)
    executed = 0
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")})
        if cell.cell_type != "code":
            continue
        executed += 1
        cell.execution_count = executed
        outputs = []
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = executed
            if "image/png" in output.get("data", {}):
                png = base64.b64decode(output.data["image/png"])
                output.data["image/png"] = base64.b64encode(with_palette(png)).decode()
            joins = outputs and output.output_type == outputs[-1].output_type == "stream"
            if joins and output.name == outputs[-1].name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
    return notebook


def refresh(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(normalise(notebook), path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(FOLDER.glob("*.ipynb")):
        refresh(Path(name))
        print(name)
