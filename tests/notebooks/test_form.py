"""What every notebook of the course must look like. That they run is shown by nbmake over notebooks/."""

import ast
import copy
import importlib
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

sys.path.insert(0, str(FOLDER))
from refresh import normalise  # noqa: E402

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def python(source):
    """The source with IPython's % lines turned into `pass`, for the parser."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE)


def test_there_are_notebooks():
    assert NOTEBOOKS and all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in NOTEBOOKS)


@each_notebook
def test_is_stored_normalised_and_executed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert normalise(copy.deepcopy(notebook)) == notebook, "run notebooks/refresh.py"
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= len(code) / 2, "few outputs: was it executed?"


@each_notebook
def test_outputs_are_clean(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"{cell.source}\n{output.get('text')}"


@each_notebook
def test_no_paths_of_a_machine(path):
    found = re.findall(
        r"(?:/home|/root|/Users|/work|/tmp|/opt|/usr|/content)/\w+|[A-Z]:\\\\\w+", path.read_text("utf-8")
    )
    assert not found


@each_notebook
def test_first_cells(path):
    title, install, *_ = read(path).cells
    number = path.stem[:2]
    assert title.source.startswith(f"# {number} · ")
    badge = (
        f"https://colab.research.google.com/{URL.removeprefix('https://').replace('github.com', 'github')}/blob/main/"
    )
    assert f"({badge}notebooks/{path.name})" in title.source
    for label in ("Time", "Hardware", "Builds on", "Builds"):
        assert f"**{label}**" in title.source
    lines = [line.strip() for line in install.source.splitlines() if "pip" in line]
    assert lines == [f'%pip install -q "gptoss-kernels[course] @ git+{URL}"']
    assert "%%capture" not in install.source
    first_calls = "\n".join(cell.source for cell in cells(path, "code")[:2])
    assert "env.setup(" in first_calls, "the set-up comes before any other import of the package"


@each_notebook
def test_shape_of_the_text(path):
    code = [cell.source for cell in cells(path, "code")]
    prose = [cell.source for cell in cells(path, "markdown")]
    assert statistics.median(len(source.splitlines()) for source in code) <= 8
    assert max(len(source.splitlines()) for source in code) <= 45
    assert sum(map(len, prose)) >= sum(map(len, code))
    text = "\n".join(prose)
    assert "## Summary" in text and "**Sources**" in text and "**Next**" in text
    assert any(re.search(r"\bassert", source) for source in code), "nbmake sees only what raises: assert the claims"


@each_notebook
def test_exercises_have_stub_checker_hint_and_solution(path):
    attempts = 0
    for cell in cells(path, "code"):
        tree = ast.parse(python(cell.source))
        stubs = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and "NotImplementedError" in ast.dump(node)
        }
        called = re.findall(r"(\w+) = check\.attempt\((\w+), chapter=(\d+)\)", cell.source)
        assert {name for name, _, _ in called} == {name for _, name, _ in called} == stubs
        for _, name, chapter in called:
            assert int(chapter) == int(path.stem[:2])
            solutions = importlib.import_module(f"gptoss_kernels.course.solutions.chapter_{int(chapter):02d}")
            assert callable(getattr(solutions, name)) and callable(getattr(solutions, f"check_{name}"))
        attempts += len(called)
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert text.count("<summary>Hint") >= attempts and text.count("<summary>Solution") == attempts


@each_notebook
def test_shown_solutions_are_right(path):
    """The folded solutions, pasted by a learner, pass the checker."""
    from gptoss_kernels.course import check

    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    for block in re.findall(r"<summary>Solution</summary>.*?```python\n(.*?)```", text, flags=re.DOTALL):
        scope = {"torch": importlib.import_module("torch")}
        exec(block, scope)
        for node in ast.parse(block).body:
            if isinstance(node, ast.FunctionDef):
                check.attempt(scope[node.name], chapter=int(path.stem[:2]), strict=True)


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "README.md", ROOT / "README.md"], ids=lambda path: path.name)
def test_relative_links_resolve(path):
    text = "\n".join(c.source for c in cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text("utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:", target):
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, target


def test_contents_list_every_notebook():
    contents = (FOLDER / "README.md").read_text("utf-8")
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", contents) == [path.name for path in NOTEBOOKS]
