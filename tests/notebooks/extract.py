"""A notebook as a Python module: its imports, functions, classes and constants, exercises solved as the text shows.

So what learners read is what the tests run.
"""

import ast
import functools
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import nbformat

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ATTEMPT = re.compile(r"^(\w+) = check\.attempt\((\w+), chapter=(\d+)\)$", re.MULTILINE)
SOLUTION = re.compile(r"<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def python(source: str) -> str:
    """The source with IPython's % and ! lines turned into `pass`, for the parser."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(python(source)).body if isinstance(node, ast.FunctionDef)]


def is_stub(node: ast.FunctionDef) -> bool:
    """A function raises NotImplementedError("your turn"); a kernel, which cannot raise, says tl.static_assert(False,
    "your turn")."""
    return "'your turn'" in ast.dump(node)


def solutions(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Exercise -> the code of its folded solution."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for block in SOLUTION.findall(cell.source):
                for node in functions(block):
                    found[node.name] = block
    return found


def solve(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is after a learner has pasted the folded solutions over the stubs."""
    solved = solutions(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code" and ATTEMPT.search(cell.source):
            lines = cell.source.splitlines()
            for node in reversed([node for node in functions(cell.source) if is_stub(node)]):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines[first - 1 : node.end_lineno] = solved[node.name].rstrip().splitlines()
            cell.source = "\n".join(lines)
    return notebook


def module_source(path: Path) -> str:
    """Imports, functions, classes and UPPER_CASE constants of the solved notebook, in its order."""
    kept = []
    for cell in solve(read(path)).cells:
        if cell.cell_type != "code":
            continue
        source = python(cell.source)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            constant = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name) and target.id.isupper() for target in node.targets
            )
            if constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                kept.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(kept) + "\n"


@functools.cache
def load(stem: str) -> ModuleType:
    """The notebook `stem` (such as "04_flash_forward") as a module; Triton reads kernels from files, so it is one."""
    folder = Path(tempfile.mkdtemp(prefix="gptoss_notebook_"))
    name = f"notebook_{stem}"
    file = folder / f"{name}.py"
    file.write_text(module_source(FOLDER / f"{stem}.ipynb"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernel_names(path: Path) -> list[str]:
    """The @triton.jit functions of a notebook whose names end in _kernel, each once."""
    names = []
    for cell in cells(path, "code"):
        for node in functions(cell.source):
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if jitted and node.name.endswith("_kernel") and node.name not in names:
                names.append(node.name)
    return names
