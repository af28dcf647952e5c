"""Rotary embedding of queries and keys in one launch: halves rotated, in fp32, rounded once."""

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..operators import implements, once_differentiable, unwatched


@triton.jit
def rotate(x, y, cos, sin, heads, stride_xh, stride_yh, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Rotate all heads of one token. x, y point at its head 0; cos, sin are [HALF]."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = head < heads
    first = tl.load(x + head * stride_xh + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, HALF]
    second = tl.load(x + head * stride_xh + HALF + column, mask=mask, other=0.0).to(tl.float32)
    low = first * cos - second * sin
    high = second * cos + first * sin
    tl.store(y + head * stride_yh + column, low.to(y.dtype.element_ty), mask=mask)
    tl.store(y + head * stride_yh + HALF + column, high.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length"])
def rope_kernel(
    q,  # (batch, q_heads, length, 2 * HALF), any strides but the last
    k,
    cos,  # (batch or 1, length, HALF)
    sin,
    q_out,
    k_out,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_km,
    stride_cb,
    stride_cm,
    stride_qob,
    stride_qoh,
    stride_qom,
    stride_kob,
    stride_koh,
    stride_kom,
    length,
    q_heads,
    k_heads,
    SIGN: tl.constexpr,  # 1 forward, -1 backward: the inverse rotation
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    angle = batch * stride_cb + token * stride_cm + column
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.load(sin + angle).to(tl.float32) * SIGN
    q_row, q_target = q + batch * stride_qb + token * stride_qm, q_out + batch * stride_qob + token * stride_qom
    k_row, k_target = k + batch * stride_kb + token * stride_km, k_out + batch * stride_kob + token * stride_kom
    rotate(q_row, q_target, c, s, q_heads, stride_qh, stride_qoh, HALF, BLOCK_Q)
    rotate(k_row, k_target, c, s, k_heads, stride_kh, stride_koh, HALF, BLOCK_K)


torch.library.define(
    "gptoss_kernels::rope", "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q_out, Tensor k_out)"
)


def _heads_last(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@implements("gptoss_kernels::rope")
def _rope(q, k, cos, sin, inverse):
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = _heads_last(q), _heads_last(k)
    batch, q_heads, length, head_dim = q.shape
    arguments = (
        q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1), *q_out.stride()[:3], *k_out.stride()[:3], length, q_heads, k.shape[1],
    )  # fmt: skip
    constants = dict(
        SIGN=-1 if inverse else 1, HALF=head_dim // 2, BLOCK_Q=triton.next_power_of_2(q_heads),
        BLOCK_K=triton.next_power_of_2(k.shape[1]),
    )  # fmt: skip
    launch(rope_kernel, (batch * length,), arguments, constants, num_warps=4)
    return q_out, k_out


@torch.library.register_fake("gptoss_kernels::rope")
def _rope_fake(q, k, cos, sin, inverse):
    return _heads_last(q), _heads_last(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (_rope if unwatched(q) else torch.ops.gptoss_kernels.rope)(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        operator = _rope if unwatched(dq) else torch.ops.gptoss_kernels.rope
        return *operator(dq, dk, cos, sin, True), None, None


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with each pair (x_i, x_{i + head_dim/2}) turned by its position's angle, in fp32, rounded once.

    Args:
        q: (batch, q_heads, length, head_dim), a power of two.
        k: (batch, k_heads, length, head_dim).
        cos, sin: (batch or 1, length, head_dim / 2), YaRN's scale in them; same strides. No gradient.

    Returns:
        Both rotated, stored as (batch, length, heads, head_dim). Bitwise reproducible.
    """
    return _Rope.apply(q, k, cos, sin)
