"""One AdamW step of one tensor."""

from collections.abc import Callable

import torch

from ..backends import default_backend
from ..lane import interpreting, triton_available
from . import reference
from .reference import BLOCK, decode, keys

__all__ = ["adamw_step", "decode_moment", "new_state"]

STATE = ("exp_avg", "exp_avg_exponent", "exp_avg_sq", "exp_avg_sq_exponent")


def new_state(parameter: torch.Tensor, codes: Callable[[int], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Moments of zero: uint8 codes (numel,) and an exponent for every 256 of them, 2.008 bytes an element in all.

    codes: makes uint8 zeros of so many elements; default: on the parameter's device, where the exponents are.
    """
    count = parameter.numel()
    zeros = lambda size: torch.zeros(size, dtype=torch.uint8, device=parameter.device)  # noqa: E731
    return {name: zeros(-(-count // BLOCK)) if "exponent" in name else (codes or zeros)(count) for name in STATE}


def decode_moment(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """(numel,) fp32: the moment "exp_avg" or "exp_avg_sq" in a state."""
    codes = state[name]
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return decode(padded, state[f"{name}_exponent"], name).view(-1)[: codes.numel()]


@torch.no_grad()
def adamw_step(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int = 0,
    index: int = 0,
    stochastic_rounding: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), computed in fp32, in place.

    Args:
        parameter: contiguous, bf16 or fp32.
        grad: of the same shape, bf16 or fp32.
        state: of `new_state`, changed in place.
        step: number of this step, from 1.
        seed, index: with step they choose the random numbers; index is the tensor's own. From element 2^32 on the
            random numbers are those of the first elements again.
        stochastic_rounding: of bf16 parameters; False rounds to nearest. Moments are always rounded stochastically.
        backend: "triton", "reference" or "auto": Triton on a GPU.

    Returns:
        () fp32: the sum of the gradient's squares.

    Bitwise reproducible on one device. Backends have the same random numbers; results differ where the last bit of
    an fp32 number decides.

    Raises:
        TypeError, ValueError: the parameter or the gradient is not as above, or the step is below 1.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    for name, x in (("parameter", parameter), ("grad", grad)):
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"{name}: expected torch.bfloat16 or torch.float32, got {x.dtype}")
    if not parameter.is_contiguous():
        raise ValueError(f"parameter: expected a contiguous tensor, got strides {parameter.stride()}")
    if grad.shape != parameter.shape:
        raise ValueError(f"grad: expected the shape {tuple(parameter.shape)}, got {tuple(grad.shape)}")
    if step < 1:
        raise ValueError(f"step: expected >= 1, got {step}")
    if backend == "auto":
        backend = default_backend(parameter)
    if backend == "triton":
        if not triton_available() or not (parameter.is_cuda or interpreting()):
            raise RuntimeError(
                'backend="triton": expected Triton and parameter on a CUDA device, or TRITON_INTERPRET=1, got '
                f"parameter on {parameter.device}"
            )
        from .step import adamw_step as compute
    elif backend == "reference":
        compute = reference.adamw_step
    else:
        raise ValueError(f'backend: expected "auto", "triton" or "reference", got {backend!r}')
    squares = compute(
        parameter.detach().view(-1),
        grad.detach().reshape(-1),
        *(state[name] for name in STATE),
        step_size=lr / (1 - betas[0] ** step),
        root=(1 - betas[1] ** step) ** -0.5,
        eps=eps,
        decay=lr * weight_decay,
        betas=betas,
        key=keys(seed, step, index),
        stochastic=stochastic_rounding,
    )
    torch.autograd.graph.increment_version(parameter)  # a graph that still needs the old weights must notice
    return squares
