"""RMSNorm as gpt-oss computes it: everything in fp32, the weight multiplied before rounding to the input's dtype."""

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..operators import implements, once_differentiable, unwatched

PARTIAL_ROWS = 128  # rows whose share of the weight's gradient one program sums


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,  # (rows, HIDDEN)
    weight,  # (HIDDEN,)
    y,  # as x
    rstd,  # (rows,) fp32
    rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < HIDDEN
    value = tl.load(x + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * HIDDEN + column, (w * (value * scale)).to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + row, scale)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy,  # (rows, HIDDEN)
    x,
    weight,  # (HIDDEN,)
    rstd,  # (rows,) fp32
    dx,  # as x
    dweight_partial,  # (programs, HIDDEN) fp32, written if NEED_WEIGHT
    rows,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program
    NEED_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < HIDDEN
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for step in range(ROWS):
        row = program * ROWS + step
        offset = row * HIDDEN + column
        inside = mask & (row + column * 0 < rows)  # [BLOCK_H]
        grad = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + tl.minimum(row, rows - 1))
        if NEED_WEIGHT:
            total += grad * value * scale
        grad *= w
        mean = tl.sum(grad * value, 0) / HIDDEN
        tl.store(dx + offset, (scale * (grad - value * (scale * scale * mean))).to(dx.dtype.element_ty), mask=inside)
    if NEED_WEIGHT:
        tl.store(dweight_partial + program * HIDDEN + column, total, mask=mask)


torch.library.define(
    "gptoss_kernels::rms_norm_forward", "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"
)
torch.library.define(
    "gptoss_kernels::rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_weight) -> (Tensor dx, Tensor dweight)",
)


@implements("gptoss_kernels::rms_norm_forward")
def _forward(x, weight, eps):
    hidden = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // hidden
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    constants = dict(HIDDEN=hidden, BLOCK_H=triton.next_power_of_2(hidden))
    launch(rms_norm_kernel, (rows,), (x, weight, y, rstd, rows, eps), constants, num_warps=4)
    return y, rstd


@torch.library.register_fake("gptoss_kernels::rms_norm_forward")
def _forward_fake(x, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@implements("gptoss_kernels::rms_norm_backward")
def _backward(dy, x, weight, rstd, need_weight):
    hidden = x.shape[-1]
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    rows = x.numel() // hidden
    rows_each = min(PARTIAL_ROWS, triton.next_power_of_2(max(rows, 1))) if need_weight else 1
    programs = triton.cdiv(rows, rows_each)
    partial = x.new_empty((programs if need_weight else 0, hidden), dtype=torch.float32)
    constants = dict(HIDDEN=hidden, BLOCK_H=triton.next_power_of_2(hidden), ROWS=rows_each, NEED_WEIGHT=need_weight)
    arguments = (dy, x, weight, rstd, dx, partial, rows)
    launch(rms_norm_backward_kernel, (programs,), arguments, constants, num_warps=4)
    return dx, partial.sum(0).to(weight.dtype) if need_weight else x.new_empty(0)


@torch.library.register_fake("gptoss_kernels::rms_norm_backward")
def _backward_fake(dy, x, weight, rstd, need_weight):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight) if need_weight else x.new_empty(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        operator = _forward if unwatched(x) else torch.ops.gptoss_kernels.rms_norm_forward
        y, rstd = operator(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        operator = _backward if unwatched(x) else torch.ops.gptoss_kernels.rms_norm_backward
        dx, dweight = operator(dy, x, weight, rstd, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, rounded once to x's dtype.

    Args:
        x: (..., hidden), fp16, bf16 or fp32.
        weight: (hidden,), any floating dtype.
        eps: added to the mean square.

    Bitwise reproducible; differentiable in x and weight.
    """
    return _RMSNorm.apply(x, weight, eps)
