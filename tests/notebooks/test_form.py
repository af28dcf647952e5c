"""What every notebook of the course must look like. That they run is shown by nbmake over notebooks/."""

import ast
import copy
import csv
import importlib
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("nbclient")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")

sys.path.insert(0, str(Path(__file__).parent))
from extract import ATTEMPT, FOLDER, NOTEBOOKS, ROOT, cells, functions, is_stub, python, read, solutions  # noqa: E402

sys.path.insert(0, str(FOLDER))
from refresh import normalise  # noqa: E402

URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
RECORDS = ROOT / "benchmarks" / "results" / "course"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


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
    assert lines == [f'!git clone -q {URL} && pip install -q -e "./{URL.rsplit("/", 1)[1]}[course]"']
    assert "%%capture" not in install.source
    assert install.source == cells(NOTEBOOKS[0], "code")[0].source, "every notebook installs alike"
    first_calls = "\n".join(cell.source for cell in cells(path, "code")[:2])
    assert "env.setup(" in first_calls, "the set-up comes before any other import of the package"


@each_notebook
def test_shape_of_the_text(path):
    code = [cell.source for cell in cells(path, "code")]
    prose = [cell.source for cell in cells(path, "markdown")]
    assert 30 <= len(code) + len(prose) <= 100
    assert statistics.median(len(source.splitlines()) for source in code) <= 8
    assert max(len(source.splitlines()) for source in code) <= 45
    assert sum(map(len, prose)) >= sum(map(len, code))
    text = "\n".join(prose)
    assert "## Summary" in text and "**Sources**" in text and "**Next**" in text
    assert any(re.search(r"\bassert", source) for source in code), "nbmake sees only what raises: assert the claims"


@each_notebook
def test_exercises_have_box_stub_checker_hint_and_solution(path):
    attempts = 0
    notebook = read(path)
    shown = solutions(notebook)
    for before, cell, after in zip(notebook.cells, notebook.cells[1:], notebook.cells[2:], strict=False):
        if cell.cell_type != "code":
            continue
        stubs = {node.name for node in functions(cell.source) if is_stub(node)}
        called = ATTEMPT.findall(cell.source)
        assert cell.source.count("check.attempt(") == len(called)
        assert {name for name, _, _ in called} == {name for _, name, _ in called} == stubs
        for _, name, chapter in called:
            assert "## Exercise" in before.source
            assert re.search(r"\*\*Difficulty\*\* [●○]{3} · \*\*Time\*\* \d+ minutes", before.source), before.source
            assert after.source.count("<summary>Hint") >= 1 and after.source.count("<summary>Solution") >= 1
            assert int(chapter) == int(path.stem[:2])
            packaged = importlib.import_module(f"gptoss_kernels.course.solutions.chapter_{int(chapter):02d}")
            assert callable(getattr(packaged, f"check_{name}")) and hasattr(packaged, name) and name in shown
        attempts += len(called)
    assert attempts >= (1 if path.stem.startswith("00") else 2)


@each_notebook
def test_imports_the_package_alone(path):
    """A learner needs this package, what it depends on, and nothing beside it."""
    allowed = {"gptoss_kernels", "torch", "triton", "transformers", "matplotlib", "IPython", *sys.stdlib_module_names}
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(python(cell.source))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, cell.source


def recorded(path):
    return re.findall(r'record\.measured\(\s*"(\w+)"', "\n".join(cell.source for cell in cells(path, "code")))


@each_notebook
def test_recorded_figures_are_there_and_from_a_gpu(path):
    for name in recorded(path):
        assert name.startswith(path.stem[:2] + "_")
        with (RECORDS / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(row["gpu"].startswith("NVIDIA") for row in rows)
        assert all(row["date"] and re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) for row in rows)


def test_no_record_without_a_notebook():
    used = {name for path in NOTEBOOKS for name in recorded(path)}
    assert {file.stem for file in RECORDS.glob("*.csv")} == used


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


@pytest.mark.parametrize(("file", "prefix"), [(FOLDER / "README.md", ""), (ROOT / "README.md", "notebooks/")])
def test_contents_list_every_notebook(file, prefix):
    found = re.findall(rf"^\| \[.*\]\({prefix}(\d\d_\w+\.ipynb)\)", file.read_text("utf-8"), flags=re.MULTILINE)
    assert found == [path.name for path in NOTEBOOKS]
