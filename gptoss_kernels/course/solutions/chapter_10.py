"""Chapter 10, LoRA: forward, number of parameters, learning rate, merging."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..check import Mistake

# -------------------------------------------------------------------------------------------------- lora_linear


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """x (..., in), weight (out, in), a (r, in), b (out, r) -> (..., out)."""
    return x @ weight.T + scaling * (x @ a.T) @ b.T


def check_lora_linear(function: Callable) -> None:
    x, weight, a, b = _draw(2, 3, 6, seed=0), _draw(5, 6, seed=1), _draw(2, 6, seed=2), _draw(5, 2, seed=3)
    scaling = 1.75
    right = lora_linear(x, weight, a, b, scaling)
    base, low = x @ weight.T, x @ a.T @ b.T
    known = {
        "the adapter is missing: add scaling * (x A^T) B^T": base,
        "the frozen layer is missing: the adapter is added to x W^T": scaling * low,
        "the scaling is missing: the adapter counts alpha / r times": base + low,
        "the scaling is applied to the frozen layer as well: it belongs to the adapter": scaling * (base + low),
        "the scaling is applied to the frozen layer instead of the adapter": scaling * base + low,
        "the scaling is applied twice": base + scaling**2 * low,
        "divide by nothing: scaling is alpha / r already": base + low / scaling,
        "that subtracts the adapter": base - scaling * low,
        "that divides by the rank once more: scaling is alpha / r already": base + scaling / 2 * low,
    }
    _compare("the output", function(x.clone(), weight.clone(), a.clone(), b.clone(), scaling), right, known)

    wide, r, tokens = 64, 2, 3
    inputs = _draw(tokens, wide), _draw(wide, wide), _draw(r, wide), _draw(wide, r)
    with FlopCounterMode(display=False) as counter:
        function(*inputs, scaling)
    if counter.get_total_flops() >= 2 * tokens * wide * wide + 2 * r * wide * wide:
        raise Mistake(
            "right, but B A is formed, as large as the weight itself: multiply x by A^T first, and the result, which "
            "has r columns, by B^T"
        )
    leaves = [tensor.clone().requires_grad_() for tensor in (a, b)]
    out = function(x, weight, *leaves, scaling)
    if not out.requires_grad:
        raise Mistake("the result is cut off from autograd: no detach, no torch.no_grad, no .data")


# ------------------------------------------------------------------------------------------- adapter_parameters


def adapter_parameters(shapes: Sequence[tuple[int, ...]], r: int) -> int:
    """Shapes (out, in) of linear layers and (experts, in, out) of stacked ones -> trained parameters at rank r."""
    total = 0
    for *copies, rows, columns in shapes:
        total += math.prod(copies) * r * (rows + columns)
    return total


def check_adapter_parameters(function: Callable) -> None:
    cases = {
        "one layer (5, 7) at rank 3": ([(5, 7)], 3),
        "two layers (5, 7), (9, 4) at rank 2": ([(5, 7), (9, 4)], 2),
        "experts (6, 5, 7) at rank 3": ([(6, 5, 7)], 3),
        "a layer (5, 7) and experts (4, 8, 3), (4, 3, 8) at rank 1": ([(5, 7), (4, 8, 3), (4, 3, 8)], 1),
        "no layer": ([], 4),
    }
    for what, (shapes, r) in cases.items():
        got, right = function(list(shapes), r), adapter_parameters(shapes, r)
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            raise Mistake(f"{what}: expected a number, got {type(got).__name__}")
        if got == right:
            continue
        known = {
            "these are the layer's own parameters, which are frozen": sum(math.prod(s) for s in shapes),
            "the rank is missing: A has r rows, B has r columns": sum(
                math.prod(s[:-2]) * (s[-2] + s[-1]) for s in shapes
            ),
            "A (r, in) and B (out, r) are two matrices: their sizes add up": sum(
                math.prod(s[:-2]) * r * s[-2] * r * s[-1] for s in shapes
            ),
            "that is r times the layer's own size": sum(r * math.prod(s) for s in shapes),
            "only A is counted; B is trained, too": sum(math.prod(s[:-2]) * r * s[-1] for s in shapes),
            "only B is counted; A is trained, too": sum(math.prod(s[:-2]) * r * s[-2] for s in shapes),
            "each expert has an adapter of its own: multiply by the number of experts": sum(
                r * (s[-2] + s[-1]) for s in shapes
            ),
            "three dimensions: the first is the number of experts, which is no side of a matrix": sum(
                r * sum(s) for s in shapes
            ),
            "each expert has an adapter of its own: the last two dimensions are its matrix's": sum(
                r * (s[0] + s[1]) for s in shapes
            ),
        }
        for message, wrong in known.items():
            if got == wrong:
                raise Mistake(f"{what}: {message}")
        raise Mistake(f"{what}: expected {right}, got {got}")


# ------------------------------------------------------------------------------------------------ learning_rate


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear from 0 to peak over the first `warmup` steps, then a cosine down to floor * peak at `steps`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (floor + (1 - floor) * cosine)


def check_learning_rate(function: Callable) -> None:
    for steps, warmup, peak, floor in ((20, 4, 2.0, 0.1), (10, 0, 1.0, 0.0), (50, 10, 0.5, 0.25)):
        at = range(steps + 1)
        try:
            got = [float(function(step, steps, warmup, peak, floor)) for step in at]
        except ZeroDivisionError:
            if warmup:
                raise
            raise Mistake("without warm-up (warmup = 0) it divides by zero: such a run begins at the peak") from None
        right = [learning_rate(step, steps, warmup, peak, floor) for step in at]
        if _near(got, right):
            continue
        where = f"{steps} steps, {warmup} of them warm-up, peak {peak}, floor {floor}"
        for message, wrong in _wrong_rates(steps, warmup, peak, floor).items():
            if _near(got, wrong):
                raise Mistake(f"{where}: {message}")
        step = next(i for i in at if not _near(got[i : i + 1], right[i : i + 1]))
        raise Mistake(f"{where}: at step {step} expected {right[step]:.4f}, got {got[step]:.4f}")


def _wrong_rates(steps: int, warmup: int, peak: float, floor: float) -> dict[str, list[float]]:
    """Message -> what that mistake gives, step by step."""

    def variant(up, down):
        return [up(step) if step < warmup else down(step) for step in range(steps + 1)]

    def progress(step):
        return (step - warmup) / (steps - warmup)

    def cosine(x):
        return (1 + math.cos(math.pi * x)) / 2

    def rise(step):
        return peak * step / max(warmup, 1)

    def fall(step):
        return peak * (floor + (1 - floor) * cosine(progress(step)))

    return {
        "the floor is missing: the cosine ends at floor * peak, not at 0": variant(
            rise, lambda s: peak * cosine(progress(s))
        ),
        "the floor is a share of the peak, and was taken as a learning rate": variant(
            rise, lambda s: floor + (peak - floor) * cosine(progress(s))
        ),
        "that is cut off at the floor; the cosine should come down to it smoothly": variant(
            rise, lambda s: peak * max(floor, cosine(progress(s)))
        ),
        "the floor is added on top: the peak is too high by it": variant(
            rise, lambda s: peak * (floor + cosine(progress(s)))
        ),
        "there is no warm-up: it begins at 0 and rises": [
            peak * (floor + (1 - floor) * cosine(step / steps)) for step in range(steps + 1)
        ],
        "the cosine began before the warm-up was over: its progress counts from the end of the warm-up": variant(
            rise, lambda s: peak * (floor + (1 - floor) * cosine(s / steps))
        ),
        "the cosine is one whole wave: half a wave comes down, and stays there": variant(
            rise, lambda s: peak * (floor + (1 - floor) * (1 + math.cos(2 * math.pi * progress(s))) / 2)
        ),
        "a quarter of a wave: (1 + cos(pi * progress)) / 2 has its end at rest": variant(
            rise, lambda s: peak * (floor + (1 - floor) * math.cos(math.pi / 2 * progress(s)))
        ),
        "that falls in a straight line; a cosine was asked for": variant(
            rise, lambda s: peak * (floor + (1 - floor) * (1 - progress(s)))
        ),
        "the warm-up does not rise, it stays at the peak": variant(lambda s: peak, fall),
        "it rises from the floor; the warm-up begins at 0": variant(
            lambda s: peak * (floor + (1 - floor) * s / max(warmup, 1)), fall
        ),
        "the peak is missing: these are shares of it": [
            learning_rate(step, steps, warmup, 1.0, floor) for step in range(steps + 1)
        ],
    }


def _near(a: list[float], b: list[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------- merge_lora


def merge_lora(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight (out, in) in any dtype, a (r, in), b (out, r) in fp32 -> (out, in) in weight's dtype, rounded once."""
    return (weight.float() + scaling * b @ a).to(weight.dtype)


def check_merge_lora(function: Callable) -> None:
    a, b, scaling = _draw(4, 48, seed=1).float(), _draw(64, 4, seed=2).float(), 0.35
    for dtype in (torch.float32, torch.bfloat16):
        weight = _draw(64, 48, seed=0).to(dtype)
        given = weight.clone()
        got = function(given, a.clone(), b.clone(), scaling)
        if not torch.equal(given, weight):
            raise Mistake("the weight that was handed in has changed: make a new tensor")
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor, got {type(got).__name__}")
        right = merge_lora(weight, a, b, scaling)
        if got.shape != right.shape:
            raise Mistake(f"expected the weight's shape {tuple(right.shape)}, got {tuple(got.shape)}")
        full, low = weight.float(), b @ a
        known = {
            "the scaling is missing: what is added is scaling * B A": full + low,
            "that is the adapter alone: add it to the weight": scaling * low,
            "the scaling is applied to the weight, too": scaling * (full + low),
            "the adapter is subtracted": full - scaling * low,
            "the weight is as it was": full,
        }
        for message, wrong in known.items():
            if torch.allclose(got.float(), wrong, rtol=5e-2, atol=5e-2):
                raise Mistake(message)
        if not torch.allclose(got.float(), full + scaling * low, rtol=5e-2, atol=5e-2):
            raise Mistake(f"{dtype}: expected weight + scaling * B A, got something else")
        if got.dtype != dtype:
            raise Mistake(f"the result is in {got.dtype}; the weight's dtype was {dtype}")
        if dtype == torch.bfloat16 and not torch.equal(got, right):
            # The order of a sum in fp32 may move a value across a rounding boundary of bf16, rarely.
            share = (got != right).float().mean().item()
            if share > 0.01:
                raise Mistake(
                    f"{share:.0%} of the bf16 weights are off by a rounding: compute in fp32 and round the sum once, "
                    "instead of rounding the product first and the sum again"
                )


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _compare(name: str, got, right: torch.Tensor, known: dict[str, torch.Tensor]) -> None:
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"{name}: expected a tensor, got {type(got).__name__}")
    if got.shape != right.shape:
        raise Mistake(f"{name}: expected shape {tuple(right.shape)}, got {tuple(got.shape)}")
    if torch.allclose(got.double(), right, rtol=1e-9, atol=1e-12):
        return
    for message, wrong in known.items():
        if torch.allclose(got.double(), wrong, rtol=1e-6, atol=1e-9):
            raise Mistake(message)
    index = tuple((~torch.isclose(got.double(), right)).nonzero()[0].tolist())
    raise Mistake(f"{name}: expected {right[index].item():.4f} at {list(index)}, got {got[index].item():.4f}")
