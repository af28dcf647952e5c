"""The kernels as two torch.library operators with fake implementations, and the autograd.Function around them.

Operators: gptoss_kernels::attention_forward and gptoss_kernels::attention_backward. torch.compile and torch.export
see them as opaque calls with known output shapes.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from ..keep import kept
from ..lane import triton_mode
from ..launch import remembered
from ..operators import implements, once_differentiable, unwatched
from .backward import gradient_signature, prepare_backward
from .forward import prepare_forward, signature

INTERPRETED = triton_mode() == "interpreter"  # for good, since Triton and the kernels above have been decorated so

_arguments = "Tensor? sinks, float scale, int? sliding_window, Tensor? cu_seqlens, Tensor? key_padding_mask"
_forward_schema = f"(Tensor q, Tensor k, Tensor v, {_arguments}) -> (Tensor out, Tensor lse)"
_backward_schema = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_arguments})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)
torch.library.define("gptoss_kernels::attention_forward", _forward_schema)
torch.library.define("gptoss_kernels::attention_backward", _backward_schema)


def _heads_last(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of shape (batch, heads, length, head_dim) of x in memory (batch, length, heads, head_dim)."""
    _, heads, length, head_dim = x.shape
    return heads * length * head_dim, head_dim, heads * head_dim, 1


def _empty_heads_last(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, _heads_last(x), dtype=x.dtype, device=x.device)


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    batch, heads, length, _ = q.shape
    shape, strides = (batch, heads, length), (heads * length, length, 1)
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=q.device)  # the fastest of torch's empties


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last stride is 1, which is what the kernels read; otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Plan:
    """Calls whose tensors are alike (see `signature`): what they share is found out once, since the host takes as long
    for that as for all the rest."""

    def __init__(self, q, k, v, scale, sliding_window):
        self.scale, self.sliding_window = scale, sliding_window
        self.copies = any(x.stride(-1) != 1 for x in (q, k, v))
        # empty_like is faster, and gives the same strides where a tensor has them already.
        self.empty_q, self.empty_k, self.empty_v = [
            torch.empty_like if x.stride() == _heads_last(x) else _empty_heads_last for x in (q, k, v)
        ]
        self.launch_forward: Callable | None = None
        self.launch_backward: dict[tuple, Callable] = {}

    def forward(self, q, k, v, sinks, cu_seqlens, key_padding_mask):
        """(out, lse)."""
        if self.copies:
            q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        out, lse = self.empty_q(q), _empty_lse(q)
        tensors = q, k, v, sinks, out, lse, cu_seqlens, key_padding_mask
        if self.launch_forward is None:
            self.launch_forward = prepare_forward(*tensors, self.scale, self.sliding_window, INTERPRETED)
        self.launch_forward(*tensors)
        return out, lse

    def backward(self, dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, key_padding_mask):
        """(dq, dk, dv, dsinks)."""
        if self.copies:
            q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        dout = _unit_stride(dout)
        dq, dk, dv = self.empty_q(q), self.empty_k(k), self.empty_v(v)
        tensors = dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, cu_seqlens, key_padding_mask
        launch = remembered(
            self.launch_backward, gradient_signature(dout, dlse, out),
            lambda: prepare_backward(*tensors, self.scale, self.sliding_window, INTERPRETED), INTERPRETED,
        )  # fmt: skip
        return dq, dk, dv, launch(*tensors)


_plans: dict[tuple, Plan] = {}


def _plan(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask) -> Plan:
    key = signature(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask)
    return remembered(_plans, key, lambda: Plan(q, k, v, scale, sliding_window), INTERPRETED)


@implements("gptoss_kernels::attention_forward")
def _attention_forward(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    plan = _plan(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask)
    return plan.forward(q, k, v, sinks, cu_seqlens, key_padding_mask)


@torch.library.register_fake("gptoss_kernels::attention_forward")
def _attention_forward_fake(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    return _empty_heads_last(q), _empty_lse(q)


@implements("gptoss_kernels::attention_backward")
def _attention_backward(dout, dlse, q, k, v, out, lse, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    plan = _plan(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask)
    *grads, dsinks = plan.backward(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, key_padding_mask)
    return *grads, q.new_empty(0) if sinks is None else dsinks


@torch.library.register_fake("gptoss_kernels::attention_backward")
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, sinks, scale, sliding_window, cu_seqlens, key_padding_mask):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks, memory_format=torch.contiguous_format)
    return _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v), dsinks


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, how, return_lse):
        # One tuple for what has no gradient, and lse only where it is asked for: autograd handles each by itself.
        scale, sliding_window, cu_seqlens, key_padding_mask = how
        arguments = (q, k, v, sinks, *how)
        operator = _attention_forward if unwatched(q) else torch.ops.gptoss_kernels.attention_forward
        out, lse = kept("attention", lambda: operator(*arguments))
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens, key_padding_mask)
        ctx.scale, ctx.sliding_window = scale, sliding_window
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse=None):
        q, k, v, sinks, out, lse, cu_seqlens, key_padding_mask = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        # The forward pass's plan need not be these tensors': hooks on saved tensors may give them other strides.
        operator = _attention_backward if unwatched(q) else torch.ops.gptoss_kernels.attention_backward
        dq, dk, dv, dsinks = operator(
            dout, dlse, q, k, v, out, lse, sinks, ctx.scale, ctx.sliding_window, cu_seqlens, key_padding_mask
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, None


def triton_attention(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, return_lse):
    """Checked arguments in, out or (out, lse) out: see `gptoss_kernels.flash_attention`."""
    # The kernels read these three without strides; a window's share of a longer padding mask is a view, for one.
    sinks, cu_seqlens, key_padding_mask = [
        x if x is None else x.contiguous() for x in (sinks, cu_seqlens, key_padding_mask)
    ]
    how = (scale, sliding_window, cu_seqlens, key_padding_mask)
    if torch.is_grad_enabled() or not unwatched(q) or forward_ad._current_level >= 0:
        return _TritonAttention.apply(q, k, v, sinks, how, return_lse)
    out, lse = kept("attention", lambda: _attention_forward(q, k, v, sinks, *how))
    return (out, lse) if return_lse else out
