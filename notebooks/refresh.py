"""Runs notebooks in place and stores them without what changes from run to run (times, versions of the kernel).

Pictures are stored with a palette of 256 colours: a third of the size, and no difference that one can see in a plot.

python notebooks/refresh.py [notebook.ipynb ...]        default: all of them
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},  # which knows % and ! lines
}


def with_palette(png: str) -> str:
    """An opaque picture, base64 as notebooks hold it, with at most 256 colours; one that has a palette as it is."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    file = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


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
                output.data["image/png"] = with_palette(output.data["image/png"])
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
