"""The first cell of every notebook: chooses GPU or CPU interpreter for this process, seeds, and says what is there."""

import os
import platform
import random
from dataclasses import dataclass
from typing import Any

import torch

from ..lane import interpreter_problem, interpreting, triton_available, triton_mode, version

LANES = {
    "gpu": "Triton kernels, compiled for this GPU",
    "interpreter": "Triton kernels in Triton's interpreter on the CPU: the same numbers, slowly, so sizes are small",
    "reference": "plain PyTorch on the CPU",
}


@dataclass(frozen=True)
class Environment:
    """What `setup` found and chose.

    lane: "gpu", "interpreter" or "reference"; device and dtype: where and in what the notebook computes;
    name: the device's; memory_gib: its memory, host_gib: the host's (None where the system does not say).
    """

    lane: str
    device: torch.device
    dtype: torch.dtype
    name: str
    memory_gib: float | None
    host_gib: float | None = None

    def pick(self, *, cpu: Any, gpu: Any) -> Any:
        """`gpu` on a GPU, otherwise `cpu`: for sizes that a CPU cannot afford."""
        return gpu if self.lane == "gpu" else cpu


def setup(seed: int = 0, *, triton: bool = False, interpret: bool = True) -> Environment:
    """Prints versions, device and lane, seeds Python and torch, and returns the `Environment`.

    Without a GPU that the kernels run on (compute capability 7.5 or newer) it sets TRITON_INTERPRET to 1, or to 0 where
    nothing is to be interpreted, which counts only if Triton has not been loaded yet: call it before other imports.

    Args:
        seed: of Python's and torch's random numbers.
        triton: whether the notebook itself writes Triton kernels, so that PyTorch alone will not do.
        interpret: whether kernels run in Triton's interpreter without a GPU; False: PyTorch takes their place, for
            notebooks that train a model.

    Raises:
        ImportError: `triton`, and Triton is not installed.
        RuntimeError: Triton was loaded before in the other mode, or this Triton's interpreter and numpy do not fit.
    """
    lane = _choose_lane()
    reason = "" if triton_available() else ", since Triton is not installed"
    if lane == "interpreter" and not interpret:
        lane, reason = "reference", ": the same numbers, and faster than Triton's interpreter"
        os.environ["TRITON_INTERPRET"] = "0"
    if triton and lane == "reference":
        raise ImportError(
            "setup: this notebook writes Triton kernels, and Triton is not installed; it has packages for Linux (on "
            "Windows: WSL 2). Where there is none, read this notebook on GitHub or run it on Colab"
        )
    if lane != "reference":
        loaded, wanted = triton_mode(), "interpreter" if lane == "interpreter" else "compiler"
        if loaded not in (None, wanted):
            raise RuntimeError(
                f"setup: expected Triton to be loaded in {wanted} mode on this machine, got {loaded} mode, in which it "
                "was loaded before this call; restart the kernel and run this cell before any other import"
            )
    if lane == "interpreter":
        if problem := interpreter_problem():
            raise RuntimeError(f"setup: {problem}")
        os.environ["TRITON_INTERPRET"] = "1"
    random.seed(seed)
    torch.manual_seed(seed)

    environment = _describe(lane)
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]  # with its CUDA build
    versions += [f"{name} {version(name) or 'missing'}" for name in ("triton", "transformers", "numpy")]
    memory = "" if environment.memory_gib is None else f", {environment.memory_gib:.0f} GiB"
    print(" · ".join(versions))
    print(f"device  {environment.name}{memory}")
    print(f"lane    {LANES[lane]}{reason}")
    print(f"dtype   {environment.dtype}, seed {seed}")
    if environment.dtype == torch.float16:
        print("note    this GPU has no bfloat16 units: float16 takes its place, and gpt-oss-20b does not run here")
    return environment


def _choose_lane() -> str:
    if not triton_available():
        return "reference"
    if torch.cuda.is_available() and not interpreting() and torch.cuda.get_device_capability() >= (7, 5):
        return "gpu"
    return "interpreter"


def _host_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _describe(lane: str) -> Environment:
    if lane == "gpu":
        properties = torch.cuda.get_device_properties(0)
        # Turing (7.5) has no bfloat16 matrix units.
        dtype = torch.bfloat16 if properties.major >= 8 else torch.float16
        name = f"{properties.name} (compute capability {properties.major}.{properties.minor})"
        return Environment(lane, torch.device("cuda"), dtype, name, properties.total_memory / 2**30, _host_gib())
    name = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return Environment(lane, torch.device("cpu"), torch.float32, name, _host_gib(), _host_gib())
