"""The kernels as two torch.library operators with fake implementations, and the autograd.Function around them.

Operators: gptoss_kernels::attention_forward and gptoss_kernels::attention_backward. torch.compile and torch.export
see them as opaque calls with known output shapes.
"""

import torch

from ..keep import kept
from ..lane import triton_mode
from ..operators import implements, unwatched
from .backward import launch_backward
from .forward import launch_forward

INTERPRETED = triton_mode() == "interpreter"  # for good, since Triton and the kernels above have been decorated so

_arguments = "Tensor? sinks, float scale, int? sliding_window, Tensor? cu_seqlens, Tensor? key_padding_mask"
_forward_schema = f"(Tensor q, Tensor k, Tensor v, {_arguments}) -> (Tensor out, Tensor lse)"
_backward_schema = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_arguments})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)
torch.library.define("gptoss_kernels::attention_forward", _forward_schema)
torch.library.define("gptoss_kernels::attention_backward", _backward_schema)


def _empty_heads_last(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, shape (batch, heads, length, head_dim) of x, in memory (batch, length, heads, head_dim)."""
    _, heads, length, head_dim = x.shape
    return x.new_empty_strided(x.shape, (heads * length * head_dim, head_dim, heads * head_dim, 1))


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last stride is 1, which is what the kernels read; otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@implements("gptoss_kernels::attention_forward")
def _attention_forward(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    out = _empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_forward(q, k, v, sinks, out, lse, scale, sliding_window, cu_seqlens, key_padding_mask, INTERPRETED)
    return out, lse


@torch.library.register_fake("gptoss_kernels::attention_forward")
def _attention_forward_fake(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    return _empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@implements("gptoss_kernels::attention_backward")
def _attention_backward(dout, dlse, q, k, v, out, lse, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    q, k, v, dout = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(dout)
    dq, dk, dv = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)
    dsinks = launch_backward(
        dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, scale, sliding_window, cu_seqlens, key_padding_mask,
        INTERPRETED,
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if sinks is None else dsinks


@torch.library.register_fake("gptoss_kernels::attention_backward")
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks, memory_format=torch.contiguous_format)
    return _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v), dsinks


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
        arguments = (q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask)
        operator = _attention_forward if unwatched(q) else torch.ops.gptoss_kernels.attention_forward
        out, lse = kept("attention", lambda: operator(*arguments))
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens, key_padding_mask)
        ctx.scale, ctx.sliding_window = scale, sliding_window
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sinks, out, lse, cu_seqlens, key_padding_mask = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        operator = _attention_backward if unwatched(q) else torch.ops.gptoss_kernels.attention_backward
        dq, dk, dv, dsinks = operator(
            dout, dlse, q, k, v, out, lse, sinks, ctx.scale, ctx.sliding_window, cu_seqlens, key_padding_mask
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


def triton_attention(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    """Checked arguments in, (out, lse) out: see `gptoss_kernels.flash_attention`."""
    # The kernels read these three without strides; a window's share of a longer padding mask is a view, for one.
    sinks, cu_seqlens, key_padding_mask = [
        x if x is None else x.contiguous() for x in (sinks, cu_seqlens, key_padding_mask)
    ]
    return _TritonAttention.apply(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask)
