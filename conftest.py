"""What one `pytest` command runs, by what the machine has: workers, notebooks, Triton's interpreter, the GPU lane."""

import importlib.util
import os
import sys

# Many containers forbid bytecode. Then each process that a test starts compiles torch and transformers for ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton reads this when kernels are decorated, so it must stand before any test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton"):
    import triton  # noqa: F401  (its own functions are decorated here, before a test asks for another lane)

from gptoss_kernels.lane import interpreter_problem  # noqa: E402

# The training extra may be missing, as on a machine that only runs the GPU lane.
collect_ignore = [] if importlib.util.find_spec("trl") else ["tests/finetune"]


def _gpu_lane(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "gpu" in expression and "not gpu" not in expression


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    # Set here and not in addopts: there, a machine without xdist could not run pytest at all.
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if not worker and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = 0 if _gpu_lane(config) else min(4, os.cpu_count() or 1)
        if config.option.dist == "no":
            config.option.dist = "worksteal"  # tests differ much in length; neighbours stay together for fixtures


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and (problem := interpreter_problem()):
        raise pytest.UsageError(problem)
    if config.pluginmanager.hasplugin("nbmake") and not _gpu_lane(config):
        config.option.nbmake = True
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start
        torch.set_num_threads(threads)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"kernels: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'interpreter on the CPU'}"]
    if not config.pluginmanager.hasplugin("nbmake"):
        lines.append("notebooks are not run: nbmake is not installed")
    if collect_ignore:
        lines.append(f"{', '.join(collect_ignore)} not run: trl is not installed")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
