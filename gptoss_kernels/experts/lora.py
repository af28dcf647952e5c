"""The experts with a low-rank adapter each: grouped products of the rank beside those of the frozen weights.

hidden = x W1 + (x A1^T) C1 and down = act W2 + (act A2^T) C2, C = scaling B^T: neither W + C^T A nor a gradient of
W's size is ever formed. Kept for the backward pass: what the plain experts keep, and x A1^T.
"""

from typing import NamedTuple

import torch

from ..keep import kept
from ..mxfp4.buffer import dense
from ..operators import once_differentiable
from .backward import launch_activation_backward
from .forward import gather, launch_activation, launch_combine
from .low_rank import add_low_rank
from .routing import Routing, grouped_outer, grouped_product, route


class _Frozen(NamedTuple):
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    s1: torch.Tensor | None  # scales, where the weights are packed
    s2: torch.Tensor | None


class _LoRAExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, routing_weights, a1, c1, a2, c2, router_indices, alpha, limit, *frozen):
        p = _Frozen(*frozen)
        experts = p.b1.shape[0]

        def compute():
            rows = gather(x, routing.token)
            hidden = grouped_product(rows, dense(p.w1, p.s1, x.dtype), routing.ends)
            low = x.new_empty(0)
            if a1 is not None:
                low = grouped_product(rows, a1.transpose(1, 2), routing.ends)  # [rows, rank]
                add_low_rank(hidden, low, c1, routing.expert)
            del rows
            act = x.new_empty(hidden.shape[0], hidden.shape[1] // 2)
            launch_activation(hidden, p.b1, routing.expert, act, alpha, limit)
            down = grouped_product(act, dense(p.w2, p.s2, x.dtype), routing.ends)
            if a2 is not None:
                add_low_rank(down, grouped_product(act, a2.transpose(1, 2), routing.ends), c2, routing.expert)
            y = torch.empty_like(x)
            launch_combine(down, p.b2, routing_weights, routing.row, router_indices, y, experts)
            return y, hidden, low

        # Recomputed for the backward pass, the rows go where they went in the forward pass.
        router_indices, *sorted_ = kept("routing", lambda: (router_indices, *route(router_indices, experts)))
        routing = Routing(*sorted_)
        y, hidden, low = kept("experts", compute)
        ctx.save_for_backward(x, hidden, low, routing_weights, a1, c1, a2, c2, router_indices, *routing, *frozen)
        ctx.alpha, ctx.limit = alpha, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, hidden, low, routing_weights, a1, c1, a2, c2, router_indices, *rest = ctx.saved_tensors
        routing, p = Routing(*rest[:5]), _Frozen(*rest[5:])
        ends, experts = routing.ends, p.b1.shape[0]
        da1 = dc1 = da2 = dc2 = dx = drouting = None
        dy = dy.contiguous()
        dy_rows = gather(dy, routing.token)
        dact = grouped_product(dy_rows, dense(p.w2, p.s2, x.dtype).transpose(1, 2), ends)
        if a2 is not None:
            dlow2 = grouped_product(dy_rows, c2.transpose(1, 2), ends)  # without the routing weight, which act has
            add_low_rank(dact, dlow2, a2, routing.expert)
        dhidden = torch.empty_like(hidden)
        weighted = torch.empty_like(dact) if a2 is not None else None
        dweight = x.new_empty(routing.slot.shape, dtype=torch.float32)
        launch_activation_backward(
            hidden, p.b1, routing.expert, routing.slot, routing_weights, dact, dhidden, weighted, dweight,
            ctx.alpha, ctx.limit,
        )  # fmt: skip
        del dact
        if a2 is not None:
            da2 = grouped_outer(dlow2, weighted, ends)
            dc2 = grouped_outer(grouped_product(weighted, a2.transpose(1, 2), ends), dy_rows, ends)
        del weighted, dy_rows
        if ctx.needs_input_grad[1]:
            through_bias = (dy @ p.b2.to(dy.dtype).T).gather(1, router_indices.clamp(max=experts - 1).long())
            dweight = dweight.view_as(routing.row) + torch.where(router_indices < experts, through_bias, 0.0)
            drouting = dweight.to(routing_weights.dtype)
        if a1 is not None:
            dlow1 = grouped_product(dhidden, c1.transpose(1, 2), ends)
            da1 = grouped_outer(dlow1, gather(x, routing.token), ends)
            dc1 = grouped_outer(low, dhidden, ends)
        if ctx.needs_input_grad[0]:
            dx_rows = grouped_product(dhidden, dense(p.w1, p.s1, x.dtype).transpose(1, 2), ends)
            if a1 is not None:
                add_low_rank(dx_rows, dlow1, a1, routing.expert)
            dx = torch.empty_like(x)
            launch_combine(dx_rows, None, None, routing.row, router_indices, dx, experts)
        return dx, drouting, da1, dc1, da2, dc2, *[None] * 9


def factors(lora, dtype: torch.dtype) -> tuple:
    """(A (experts, rank, in), scaling B^T (experts, rank, out)) in dtype, or Nones. Zeros fill the rank up to a
    multiple of 8, the 16 bytes that torch's grouped_mm wants rows to begin on."""
    if lora is None:
        return None, None
    a, c = lora.a, (lora.b * lora.scaling).transpose(1, 2)
    missing = -a.shape[1] % 8
    if missing:
        a, c = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (a, c))
    return a.to(dtype).contiguous(), c.to(dtype).contiguous()


@torch.compiler.disable
def triton_lora_experts(
    x, w1, b1, w2, b2, router_indices, routing_weights, alpha, limit, a1, c1, a2, c2, s1=None, s2=None
):
    """Checked arguments in, y out: see `gptoss_kernels.fused_experts`. a1 … c2: of `factors`, for each projection."""
    return _LoRAExperts.apply(x, routing_weights, a1, c1, a2, c2, router_indices, alpha, limit, w1, b1, w2, b2, s1, s2)
