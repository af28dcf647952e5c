"""The ground: what is installed, imported and packaged, and that README, CI, environment and lock file agree."""

import ast
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import gptoss_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCK = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))
QUICK_START = [
    "pip install -q uv && uv run sft.py --config configs/sft_tiny.yaml",
    "pip install -q uv && uv run pytest",
]
EXTRAS = ("trl", "peft", "accelerate", "datasets", "matplotlib", "trackio", "deepspeed", "jupyterlab", "ipywidgets")
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code, path=ROOT, blocked=(), cwd=None, **variables):
    environment = os.environ | {"PYTHONPATH": str(path)} | variables
    command = [sys.executable, "-c", BLOCK.format(blocked=set(blocked)) + code]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def pytest_in_a_process(*arguments, path=ROOT):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def names(requirements):
    """Requirement strings as name -> the rest."""
    pairs = (
        re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", requirement.replace(" ", "")).groups() for requirement in requirements
    )
    return dict(pairs)


# -- importing ---------------------------------------------------------------------------------------------------------


USE = """
import torch
from gptoss_kernels import flash_attention
q, k, v = (torch.randn(1, heads, 5, 16, requires_grad=True) for heads in (4, 2, 2))
sinks = torch.zeros(4, requires_grad=True)
out, lse = flash_attention(q, k, v, sinks, sliding_window=3, return_lse=True)
out.sum().backward()
weights = torch.softmax(torch.cat([q[0, 0, 0] @ k[0, 0, :1].T / 4, sinks[:1]]), 0)
torch.testing.assert_close(out[0, 0, 0], weights[0] * v[0, 0, 0])
assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v, sinks))
"""


def test_import_is_light_and_the_core_is_enough():
    """Light, so that a notebook's first cell can still choose between interpreter and GPU."""
    light = """
import gptoss_kernels
heavy = ["triton", "transformers.modeling_utils"]
heavy += [f"gptoss_kernels.attention.{name}" for name in ("forward", "backward", "autograd")]
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
assert all(hasattr(gptoss_kernels, name) for name in gptoss_kernels.__all__)
"""
    done = python(light + USE, blocked=EXTRAS, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_without_triton_the_reference_answers():
    """As on macOS and Windows, even where TRITON_INTERPRET is set."""
    refused = """
try:
    flash_attention(q, k, v, sinks, backend="triton")
except RuntimeError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("backend='triton' without Triton did not raise")
"""
    done = python(USE + refused, blocked=("triton", *EXTRAS), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    control = python("import triton", blocked=("triton",))
    assert "ModuleNotFoundError" in control.stderr, "the block does not block"


# -- packaging ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in held if name.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in held} == {
        "gptoss_kernels",
        f"gptoss_kernels-{gptoss_kernels.__version__}.dist-info",
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gptoss_kernels").rglob("*.py")}
    assert modules <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    core = {
        line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE) if "extra ==" not in line
    }
    assert set(names(core)) == {"torch", "triton", "transformers"}


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    where = (
        f"import gptoss_kernels as package; assert package.__file__.startswith({str(tmp_path)!r}), package.__file__\n"
    )
    done = python(where + USE, path=tmp_path / "site", blocked=EXTRAS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_version_is_the_projects():
    assert gptoss_kernels.__version__ == PROJECT["project"]["version"]


def test_lock_file_is_of_this_project_and_of_public_registries():
    (locked,) = (package["metadata"] for package in LOCK["package"] if package["name"] == "gptoss-kernels")
    core = {
        entry["name"]: entry.get("specifier", "")
        for entry in locked["requires-dist"]
        if "extra ==" not in entry.get("marker", "")
    }
    written = {name: rest.partition(";")[0] for name, rest in names(PROJECT["project"]["dependencies"]).items()}
    assert {name: set(text.split(",")) for name, text in core.items()} == {
        n: set(t.split(",")) for n, t in written.items()
    }
    development = {entry["name"] for entry in locked["requires-dev"]["dev"]}
    assert development == {re.match(r"[\w-]+", text)[0] for text in PROJECT["dependency-groups"]["dev"]}
    hosts = set(re.findall(r"https?://([^/\"]+)", (ROOT / "uv.lock").read_text("utf-8")))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_environment_agrees_with_pyproject():
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PROJECT["project"]["name"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    python_version = tuple(int(part) for part in names(plain)["python"].lstrip("=").split("."))
    assert python_version >= tuple(int(part) for part in PROJECT["project"]["requires-python"].lstrip(">=").split("."))
    assert set(names(plain)) == {"python", "pip"}
    own, *tools = PROJECT["dependency-groups"]["dev"]
    assert pip[0] == "-e ." + own.removeprefix("gptoss-kernels")
    assert set(own.partition("[")[2].rstrip("]").split(",")) == set(PROJECT["project"]["optional-dependencies"])
    assert names(pip[1:]) == names(tools)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_readme_has_just_the_two_commands():
    section = README.partition("## Quick start")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert [block.strip() for block in blocks] == [*QUICK_START, "uv run jupyter lab notebooks/"]
    assert re.findall(r"^pip install .*$", README, flags=re.MULTILINE) == QUICK_START


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("code", [0, 3])
def test_ci_runs_the_readmes_test_command(tmp_path, code):
    """.ci/run with stand-ins for pip and uv, which write down how they were called."""
    for name, status in (("pip", 0), ("uv", code)):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "{name} $*"\nexit {status}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"+ {QUICK_START[1]}", "pip install -q uv", "uv run pytest"]
    assert done.returncode == code


def test_workflow_runs_the_same_on_the_promised_pythons():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    assert jobs["linux"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert jobs["linux"]["steps"][-1] == {"run": ".ci/run"}
    (mac,) = (step["run"] for step in jobs["macos"]["steps"] if "pytest" in step.get("run", ""))
    assert all((ROOT / part).exists() for part in mac.split()[3:])


@pytest.mark.parametrize(
    ("expression", "asked", "workers"),
    [("", None, min(4, os.cpu_count() or 1)), ("not gpu", None, min(4, os.cpu_count() or 1)), ("gpu", None, 0)]
    + [("", 1, 1), ("", 0, 0), ("gpu", 3, 3)],
)
def test_pytest_chooses_its_workers(expression, asked, workers, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    option = SimpleNamespace(markexpr=expression, numprocesses=asked, usepdb=False, dist="no")
    conftest.pytest_cmdline_main(SimpleNamespace(option=option))
    assert option.numprocesses == workers


def test_gpu_lane_is_one_process_and_needs_no_nbmake():
    done = pytest_in_a_process("tests/benchmarks/test_harness.py", "-m", "gpu", "-p", "no:nbmake")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker" not in done.stdout
    assert "notebooks are not run: nbmake is not installed" in done.stdout
    assert re.search(r"1 (passed|skipped), \d+ deselected", done.stdout.splitlines()[-1]), done.stdout


def test_notebooks_are_collected():
    pytest.importorskip("nbmake")
    done = pytest_in_a_process("notebooks", "--collect-only", "-q", "-n", "0")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.name in done.stdout


def test_pytest_stops_early_where_the_interpreter_cannot_work(tmp_path):
    (tmp_path / "old_versions.py").write_text(
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: {'triton': '3.6.0', 'numpy': '2.4.0'}.get(name) or real(name)\n"
        "import os\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    bare = ["-p", "no:xdist", "-p", "no:nbmake"]  # neither is needed to get this far
    done = pytest_in_a_process("-p", "old_versions", *bare, "tests/benchmarks/test_harness.py", path=path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert 'Remedy: pip install "numpy<2.4"' in done.stderr


# -- the README's claims -----------------------------------------------------------------------------------------------


def test_readme_names_the_versions_that_are_needed_and_locked():
    rows = re.findall(r"^\| (\w+)(?: \(Linux\))? \| ([\d.]+) \| (.+) \|$", README, flags=re.MULTILINE)
    shown = {name: (floor, locked) for name, floor, locked in rows}
    assert shown.pop("Python")[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    floors = names(PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["training"])
    locked = {package["name"]: package.get("version") for package in LOCK["package"]}
    assert set(shown) == {"torch", "triton", "transformers", "trl", "peft", "accelerate"}
    for name, versions in shown.items():
        assert versions == (re.match(r">=([\d.]+)", floors[name])[1], locked[name]), name


def test_readme_python_is_real():
    """Every block parses, names what the package has, and runs where it needs no download."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "gptoss_kernels":
                assert {alias.name for alias in node.names} <= set(gptoss_kernels.__all__)
    code = "\n".join(block for block in blocks if "from_pretrained" not in block)
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_readme_names_files_and_flags_that_exist():
    for path in set(re.findall(r"\b(?:configs|benchmarks|notebooks)/[\w./]+\.(?:yaml|md|py|ipynb)", README)):
        assert (ROOT / path).exists(), path
    for script in set(re.findall(r"\b(\w+\.py) --", README)):
        assert (ROOT / script).exists(), script
