"""Forward kernels of the experts: bias and clamped SwiGLU over interleaved columns; weighted combination by token."""

import torch
import triton
import triton.language as tl

from ..launch import launch

VARYING = ["rows", "tokens"]


@triton.jit
def gated(gate, up, alpha, limit):
    """(up + 1) gate sigmoid(alpha gate) of clamped values, and what its derivative needs: sigmoid. fp32."""
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    sigmoid = 1.0 / (1.0 + tl.exp(-alpha * gate))
    return gate, up, sigmoid


@triton.jit(do_not_specialize=VARYING)
def activation_kernel(
    hidden,  # (rows, 2 * INTERMEDIATE), gate and up interleaved, without bias
    bias,  # (experts, 2 * INTERMEDIATE)
    expert,  # (rows,) int32, sorted; >= experts: the row is skipped
    act,  # (rows, INTERMEDIATE)
    rows,
    experts,
    alpha,
    limit,
    INTERMEDIATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    pair = tl.program_id(1) * 2 * BLOCK_I + tl.arange(0, 2 * BLOCK_I)
    own = tl.load(expert + row, mask=row < rows, other=experts)
    mask = (own < experts)[:, None] & (pair < 2 * INTERMEDIATE)[None, :]
    offset = row.to(tl.int64)[:, None]
    both = tl.load(hidden + offset * (2 * INTERMEDIATE) + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    both += tl.load(bias + own.to(tl.int64)[:, None] * (2 * INTERMEDIATE) + pair[None, :], mask=mask, other=0.0)
    gate, up = tl.split(tl.reshape(both, [BLOCK_R, BLOCK_I, 2]))  # [BLOCK_R, BLOCK_I] each
    gate, up, sigmoid = gated(gate, up, alpha, limit)
    mask = (own < experts)[:, None] & (column < INTERMEDIATE)[None, :]
    result = (up + 1.0) * gate * sigmoid
    tl.store(act + offset * INTERMEDIATE + column[None, :], result.to(act.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    value,  # (rows, HIDDEN), by sorted row
    bias,  # (experts, HIDDEN), read if HAS_BIAS
    weight,  # (tokens, TOP_K), read if HAS_WEIGHT
    row_of_slot,  # (tokens, TOP_K) int32
    expert_of_slot,  # (tokens, TOP_K) int
    out,  # (tokens, HIDDEN)
    tokens,
    experts,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out_t = sum over choices, in their order and in fp32, of weight (value + bias): a gather, so no atomics."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (token < tokens)[:, None] & (column < HIDDEN)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + choice
        own = tl.load(expert_of_slot + slot, mask=token < tokens, other=experts).to(tl.int64)
        row = tl.load(row_of_slot + slot, mask=token < tokens, other=0).to(tl.int64)
        mask = inside & (own < experts)[:, None]
        part = tl.load(value + row[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            part += tl.load(bias + own[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            part *= tl.load(weight + slot, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
        acc += part
    target = out + token.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def launch_activation(hidden, bias, expert, act, alpha: float, limit: float) -> None:
    """Fill act (rows, intermediate) from hidden (rows, 2 * intermediate) and its bias (experts, 2 * intermediate)."""
    rows, intermediate = act.shape
    block_r, block_i = 4, min(512, triton.next_power_of_2(intermediate))
    launch(
        activation_kernel, (triton.cdiv(rows, block_r), triton.cdiv(intermediate, block_i)),
        (hidden, bias, expert, act, rows, bias.shape[0], alpha, limit),
        dict(INTERMEDIATE=intermediate, BLOCK_R=block_r, BLOCK_I=block_i), num_warps=4,
    )  # fmt: skip


def launch_combine(value, bias, weight, row_of_slot, expert_of_slot, out, experts: int) -> None:
    """Fill out (tokens, hidden) with the sum over each token's rows of value, weighted and biased where given."""
    tokens, hidden = out.shape
    block_t, block_h = 2, min(1024, triton.next_power_of_2(hidden))
    constants = dict(
        HIDDEN=hidden, TOP_K=row_of_slot.shape[1], HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        BLOCK_T=block_t, BLOCK_H=block_h,
    )  # fmt: skip
    launch(
        combine_kernel, (triton.cdiv(tokens, block_t), triton.cdiv(hidden, block_h)),
        (value, bias, weight, row_of_slot, expert_of_slot, out, tokens, experts), constants, num_warps=4,
    )  # fmt: skip


def gather(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The rows of x by token, sorted by expert. (tokens, n) -> (rows, n)"""
    return x.index_select(0, token)
