"""Backward kernels of the experts: through the clamped SwiGLU, and sums over the rows of each expert.

With dy_row the gradient of a token and dact = dy_row W2^T: the routing weight's gradient is <dact, act> + <dy, b2>, so
the layer's output need not be kept; dhidden = w dact through the activation, recomputed from the pre-activation.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .forward import VARYING, gated


@triton.jit(do_not_specialize=VARYING)
def activation_backward_kernel(
    hidden,  # (rows, 2 * INTERMEDIATE), gate and up interleaved, without bias
    bias,  # (experts, 2 * INTERMEDIATE)
    expert,  # (rows,) int32, sorted; >= experts: the row is skipped
    slot,  # (rows,) int64
    weight,  # (slots,)
    dact,  # (rows, INTERMEDIATE), not yet weighted
    dhidden,  # as hidden
    weighted,  # as dact: weight * act, written if WRITE_ACT
    dweight,  # (slots,) fp32: <dact, act>
    rows,
    experts,
    alpha,
    limit,
    INTERMEDIATE: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    own = tl.load(expert + row, mask=row < rows, other=experts)
    real = own < experts
    own = own.to(tl.int64)[:, None]
    slots = tl.load(slot + row, mask=row < rows, other=0)
    w = tl.load(weight + slots, mask=real, other=0.0).to(tl.float32)[:, None]
    offset = row.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_I):
        pair = 2 * start + tl.arange(0, 2 * BLOCK_I)[None, :]
        column = start + tl.arange(0, BLOCK_I)[None, :]
        pairs = real[:, None] & (pair < 2 * INTERMEDIATE)
        mask = real[:, None] & (column < INTERMEDIATE)
        both = tl.load(hidden + offset * (2 * INTERMEDIATE) + pair, mask=pairs, other=0.0).to(tl.float32)
        both += tl.load(bias + own * (2 * INTERMEDIATE) + pair, mask=pairs, other=0.0)
        raw_gate, raw_up = tl.split(tl.reshape(both, [BLOCK_R, BLOCK_I, 2]))  # [BLOCK_R, BLOCK_I] each
        gate, up, sigmoid = gated(raw_gate, raw_up, alpha, limit)
        glu = gate * sigmoid
        grad = tl.load(dact + offset * INTERMEDIATE + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * (up + 1.0) * glu, 1)
        if WRITE_ACT:
            product = w * (up + 1.0) * glu
            tl.store(weighted + offset * INTERMEDIATE + column, product.to(weighted.dtype.element_ty), mask=mask)
        grad *= w
        dgate = grad * (up + 1.0) * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
        # A value on the limit passes its gradient; torch's own clamp has done and not done so, by version.
        dgate = tl.where(raw_gate <= limit, dgate, 0.0)
        dup = tl.where((raw_up <= limit) & (raw_up >= -limit), grad * glu, 0.0)
        both = tl.reshape(tl.join(dgate, dup), [BLOCK_R, 2 * BLOCK_I])
        tl.store(dhidden + offset * (2 * INTERMEDIATE) + pair, both.to(dhidden.dtype.element_ty), mask=pairs)
    tl.store(dweight + slots, total, mask=row < rows)  # a slot of the sentinel gets 0


@triton.jit
def expert_sum_kernel(
    value,  # (rows or tokens, WIDTH)
    token,  # (rows,) int32, read if GATHER: row r is value[token[r]]
    slot,  # (rows,) int64
    weight,  # (slots,), read if HAS_WEIGHT
    ends,  # (experts,) int32
    out,  # (experts, WIDTH)
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The sum of each expert's rows in fp32 and in their order; 0 for an expert without rows."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        source = row
        if GATHER:
            source = tl.load(token + row, mask=row < end, other=0)
        mask = (row < end)[:, None] & (column < WIDTH)[None, :]
        part = tl.load(value + source.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        part = part.to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight + tl.load(slot + row, mask=row < end, other=0), mask=row < end, other=0.0)
            part *= w.to(tl.float32)[:, None]
        acc += tl.sum(part, 0)
    target = out + expert.to(tl.int64) * WIDTH + column
    tl.store(target, acc.to(out.dtype.element_ty), mask=column < WIDTH)


def launch_activation_backward(hidden, bias, expert, slot, weight, dact, dhidden, weighted, dweight, alpha, limit):
    """Fill dhidden (rows, 2 * intermediate), dweight (slots,) fp32 and, unless None, weighted (rows, intermediate)."""
    rows, intermediate = dact.shape
    block_r, block_i = 2, min(1024, triton.next_power_of_2(intermediate))
    launch(
        activation_backward_kernel, (triton.cdiv(rows, block_r),),
        (hidden, bias, expert, slot, weight, dact, dhidden, weighted, dweight, rows, bias.shape[0], alpha, limit),
        dict(INTERMEDIATE=intermediate, WRITE_ACT=weighted is not None, BLOCK_R=block_r, BLOCK_I=block_i), num_warps=4,
    )  # fmt: skip


def expert_sum(
    value: torch.Tensor, routing, out_dtype: torch.dtype, *, weight: torch.Tensor | None = None, gather: bool = False
) -> torch.Tensor:
    """(experts, width): the sum of each expert's rows of value, or with `gather` of its tokens' rows, weighted."""
    experts, width = routing.ends.shape[0], value.shape[1]
    out = value.new_empty(experts, width, dtype=out_dtype)
    block_w = min(64, triton.next_power_of_2(width))
    launch(
        expert_sum_kernel, (experts, triton.cdiv(width, block_w)),
        (value, routing.token, routing.slot, weight, routing.ends, out),
        dict(WIDTH=width, GATHER=gather, HAS_WEIGHT=weight is not None, BLOCK_R=64, BLOCK_W=block_w), num_warps=4,
    )  # fmt: skip
    return out
