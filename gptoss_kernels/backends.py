"""Which backend computes: Triton or PyTorch. A backend that was asked for by name is used or raises."""

import functools

import torch

from .lane import interpreter_problem, interpreting, triton_available

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def names(dtypes) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


_problem = functools.cache(interpreter_problem)


_capability = functools.cache(torch.cuda.get_device_capability)


def capability(device: int) -> tuple[int, int]:
    """CUDA compute capability of a device; asked for once, but for torch.compile, which traces no cached function."""
    return (torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability)(device)


def default_backend(x: torch.Tensor) -> str:
    """The backend that `backend="auto"` stands for with tensors like x: "triton" or "reference"."""
    if not triton_available():
        return "reference"
    if x.is_cuda:
        return "triton"
    if x.device.type == "cpu" and interpreting() and x.dtype in (torch.float32, torch.float16):
        return "triton"
    return "reference"


_checked: set[tuple[int, torch.dtype]] = set()  # GPUs and dtypes that Triton serves, so that a call asks once


def check_triton(name: str, x: torch.Tensor) -> None:
    """Raises, naming the argument, where backend="triton" cannot compute with tensors like x."""
    if x.is_cuda and not torch.compiler.is_compiling() and (x.get_device(), x.dtype) in _checked:
        return
    if not triton_available():
        raise RuntimeError('backend="triton": Triton is not installed; use backend="reference" or "auto"')
    if not x.is_cuda and not (x.device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f'backend="triton": expected {name} on a CUDA device, or TRITON_INTERPRET=1 for the CPU interpreter, '
            f"got {name} on {x.device}"
        )
    if interpreting() and x.dtype == torch.bfloat16:
        raise TypeError(
            f'backend="triton" under TRITON_INTERPRET=1: expected {name} in torch.float32 or torch.float16, got '
            "torch.bfloat16, whose products Triton's interpreter computes wrongly"
        )
    if interpreting() and (problem := _problem()):
        raise RuntimeError(f'backend="triton": {problem}')
    if x.dtype not in DTYPES:
        raise TypeError(f'{name}: backend="triton" expected one of {names(DTYPES)}, got {x.dtype}')
    if x.is_cuda and not interpreting():
        found = capability(x.get_device())
        if found < (7, 5):
            raise RuntimeError(f'backend="triton": expected compute capability 7.5 or newer, got {found}')
        if x.dtype == torch.bfloat16 and found < (8, 0):
            raise TypeError(
                f"{name}: expected torch.float16 or torch.float32 on {torch.cuda.get_device_name(x.device)} (compute "
                f"capability {found[0]}.{found[1]} has no bfloat16 matrix units), got torch.bfloat16"
            )
        if not torch.compiler.is_compiling():
            _checked.add((x.get_device(), x.dtype))
