"""`env.setup` chooses the lane before kernels load, and says so when it is too late."""

import os
import subprocess
import sys

import pytest
import torch

from gptoss_kernels.course import env
from gptoss_kernels.lane import interpreter_problem

INTERPRETED = """
import triton, triton.language as tl
@triton.jit
def total(x, y, n, B: tl.constexpr):
    at = tl.arange(0, B)
    acc = tl.zeros([B], tl.float32)
    for start in range(0, n, B):
        acc += tl.load(x + start + at, mask=start + at < n, other=0.0)
    tl.store(y, tl.sum(acc, 0))
x, y = torch.ones(37), torch.zeros(1)
total[(1,)](x, y, 37, 16)
assert y.item() == 37
"""


def python(tmp_path, *lines, **variables):
    """Runs the lines as a script (Triton reads kernels from their file) with CUDA hidden."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(("import os, torch", *lines)))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.getcwd()} | variables
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)


SETUP = "from gptoss_kernels.course import env; found = env.setup()"


def test_without_a_gpu_it_chooses_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    shown = 'print(found.lane, found.device, found.dtype, found.pick(cpu="small", gpu="large"))'
    done = python(tmp_path, SETUP, 'assert os.environ["TRITON_INTERPRET"] == "1"', shown, INTERPRETED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "interpreter cpu torch.float32 small"
    for version in (f"torch {torch.__version__}", "triton", "transformers", "numpy", "CPU"):
        assert version in done.stdout


def test_too_late_is_an_error(tmp_path):
    pytest.importorskip("triton")
    done = python(tmp_path, "import triton.language", SETUP)
    assert done.returncode != 0
    assert "expected Triton to be loaded in interpreter mode on this machine, got compiler mode" in done.stderr
    # Why it must be: the same kernel fails if only the variable is set by then.
    done = python(tmp_path, "import triton.language", 'os.environ["TRITON_INTERPRET"] = "1"', INTERPRETED)
    assert done.returncode != 0 and "Cannot call @triton.jit" in done.stderr


def test_without_triton_it_takes_the_reference(tmp_path):
    block = "import sys; sys.modules['triton'] = None"
    done = python(tmp_path, block, SETUP, "assert found.lane == 'reference' and found.dtype == torch.float32")
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
    done = python(tmp_path, block, SETUP.replace("setup()", "setup(triton=True)"))
    assert done.returncode != 0 and "this notebook writes Triton kernels" in done.stderr


def test_same_seed_same_numbers(capsys):
    pytest.importorskip("triton")
    draws = []
    for seed in (3, 3, 4):
        env.setup(seed)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert "seed 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("triton", "numpy", "broken"),
    [("3.6.0", "2.4.1", True), ("3.6.0", "2.3.5", False), ("3.9.0", "2.4.6", False), ("3.5.1", "2.4.0", True)],
)
def test_interpreter_and_numpy(triton, numpy, broken):
    problem = interpreter_problem(triton, numpy)
    assert (problem is not None) == broken
    if broken:
        assert "numpy < 2.4" in problem and numpy in problem and "pip install" in problem


def test_without_interpreting_it_takes_pytorch(tmp_path):
    pytest.importorskip("triton")
    setup = SETUP.replace("setup()", "setup(interpret=False)")
    uses = "from gptoss_kernels.backends import default_backend; assert default_backend(torch.zeros(1)) == 'reference'"
    done = python(tmp_path, setup, "assert found.lane == 'reference'", uses, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch on the CPU" in done.stdout and "not installed" not in done.stdout
