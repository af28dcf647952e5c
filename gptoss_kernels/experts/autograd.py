"""The experts as two torch.library operators with fake implementations, and the autograd.Function around them.

Kept for the backward pass: x, the pre-activation and the routing. Each gradient is computed only where it is needed.
Packed weights (blocks in the place of the weight, and its scales) are made dense for each product, one at a time.
"""

import torch

from ..keep import kept
from ..mxfp4.buffer import dense
from ..operators import implements, once_differentiable, unwatched
from .backward import expert_sum, launch_activation_backward
from .forward import gather, launch_activation, launch_combine
from .routing import Routing, grouped_outer, grouped_product, route

_scales = "Tensor? gate_up_scales=None, Tensor? down_scales=None"
_parameters = "Tensor gate_up_proj, Tensor gate_up_proj_bias, Tensor down_proj, Tensor down_proj_bias"
torch.library.define(
    "gptoss_kernels::experts_forward",
    f"(Tensor x, {_parameters}, Tensor router_indices, Tensor routing_weights, Tensor token, Tensor expert, Tensor row,"
    f" Tensor ends, float alpha, float limit, {_scales}) -> (Tensor y, Tensor hidden)",
)
torch.library.define(
    "gptoss_kernels::route",
    "(Tensor router_indices, int experts) -> (Tensor token, Tensor slot, Tensor expert, Tensor row, Tensor ends)",
)
torch.library.define(
    "gptoss_kernels::experts_backward",
    f"(Tensor dy, Tensor x, Tensor hidden, {_parameters}, Tensor router_indices, Tensor routing_weights,"
    " Tensor token, Tensor slot, Tensor expert, Tensor row, Tensor ends, float alpha, float limit, bool[] needed,"
    f" {_scales}) -> (Tensor dx, Tensor dgate_up_proj, Tensor dgate_up_proj_bias, Tensor ddown_proj,"
    " Tensor ddown_proj_bias, Tensor drouting_weights)",
)


@implements("gptoss_kernels::route")
def _route(router_indices, experts):
    return tuple(route(router_indices, experts))


@torch.library.register_fake("gptoss_kernels::route")
def _route_fake(router_indices, experts):
    tokens, top_k = router_indices.shape
    whole = lambda *shape, dtype=torch.int32: router_indices.new_empty(shape, dtype=dtype)  # noqa: E731
    rows = tokens * top_k
    return whole(rows), whole(rows, dtype=torch.int64), whole(rows), whole(tokens, top_k), whole(experts)


@implements("gptoss_kernels::experts_forward")
def _experts_forward(
    x, w1, b1, w2, b2, router_indices, routing_weights, token, expert, row, ends, alpha, limit, s1=None, s2=None
):
    hidden = grouped_product(gather(x, token), dense(w1, s1, x.dtype), ends)
    act = x.new_empty(hidden.shape[0], b1.shape[1] // 2)
    y = torch.empty_like(x)
    launch_activation(hidden, b1, expert, act, alpha, limit)
    down = grouped_product(act, dense(w2, s2, x.dtype), ends)
    launch_combine(down, b2, routing_weights, row, router_indices, y, b1.shape[0])
    return y, hidden


@torch.library.register_fake("gptoss_kernels::experts_forward")
def _experts_forward_fake(
    x, w1, b1, w2, b2, router_indices, routing_weights, token, expert, row, ends, alpha, limit, s1=None, s2=None
):
    return torch.empty_like(x), x.new_empty(token.shape[0], b1.shape[1])


@implements("gptoss_kernels::experts_backward")
def _experts_backward(
    dy, x, hidden, w1, b1, w2, b2, router_indices, routing_weights, token, slot, expert, row, ends, alpha, limit,
    needed, s1=None, s2=None,
):  # fmt: skip
    routing = Routing(token, slot, expert, row, ends)
    need_x, need_w1, need_b1, need_w2, need_b2, need_weights = needed
    experts = b1.shape[0]
    dx, dw1, db1, dw2, db2, drouting = (x.new_empty(0) for _ in range(6))
    dy = dy.contiguous()
    if need_b2:
        db2 = expert_sum(dy, routing, b2.dtype, weight=routing_weights, gather=True)
    if need_x or need_w1 or need_b1 or need_w2 or need_weights:
        dy_rows = gather(dy, token)
        dact = grouped_product(dy_rows, dense(w2, s2, x.dtype).transpose(1, 2), ends)
        dhidden = torch.empty_like(hidden)
        weighted = torch.empty_like(dact) if need_w2 else None
        dweight = x.new_empty(slot.shape, dtype=torch.float32)
        launch_activation_backward(
            hidden, b1, expert, slot, routing_weights, dact, dhidden, weighted, dweight, alpha, limit
        )
        del dact
        if need_w2:
            dw2 = grouped_outer(weighted, dy_rows, ends)
        del weighted, dy_rows
        if need_weights:
            through_bias = (dy @ b2.to(dy.dtype).T).gather(1, router_indices.clamp(max=experts - 1).long())
            dweight = dweight.view_as(row) + torch.where(router_indices < experts, through_bias, 0.0)
            drouting = dweight.to(routing_weights.dtype)
        if need_b1:
            db1 = expert_sum(dhidden, routing, b1.dtype)
        if need_x:
            dx = torch.empty_like(x)
            dx_rows = grouped_product(dhidden, dense(w1, s1, x.dtype).transpose(1, 2), ends)
            launch_combine(dx_rows, None, None, row, router_indices, dx, experts)
        if need_w1:
            dw1 = grouped_outer(gather(x, token), dhidden, ends)
    return dx, dw1, db1, dw2, db2, drouting


@torch.library.register_fake("gptoss_kernels::experts_backward")
def _experts_backward_fake(
    dy, x, hidden, w1, b1, w2, b2, router_indices, routing_weights, token, slot, expert, row, ends, alpha, limit,
    needed, s1=None, s2=None,
):  # fmt: skip
    likes = (x, w1, b1, w2, b2, routing_weights)
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for like, need in zip(likes, needed, strict=True)
    )


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, routing_weights, router_indices, alpha, limit, s1, s2):
        ops = torch.ops.gptoss_kernels
        route_, forward_ = (_route, _experts_forward) if unwatched(x) else (ops.route, ops.experts_forward)

        def route_once():
            return router_indices, *route_(router_indices, b1.shape[0])

        def compute():
            routing = token, expert, row, ends
            return forward_(x, w1, b1, w2, b2, router_indices, routing_weights, *routing, alpha, limit, s1, s2)

        # Recomputed for the backward pass, the rows go where they went in the forward pass.
        router_indices, token, slot, expert, row, ends = kept("routing", route_once)
        y, hidden = kept("experts", compute)
        ctx.save_for_backward(
            x, hidden, w1, b1, w2, b2, router_indices, routing_weights, token, slot, expert, row, ends, s1, s2
        )
        ctx.alpha, ctx.limit = alpha, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needed = list(ctx.needs_input_grad[:6])
        operator = _experts_backward if unwatched(dy) else torch.ops.gptoss_kernels.experts_backward
        *saved, s1, s2 = ctx.saved_tensors
        grads = operator(dy, *saved, ctx.alpha, ctx.limit, needed, s1, s2)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * 5


def triton_experts(x, w1, b1, w2, b2, router_indices, routing_weights, alpha, limit, s1=None, s2=None):
    """Checked arguments in, y out: see `gptoss_kernels.fused_experts`. s1, s2: scales of packed weights."""
    return _FusedExperts.apply(x, w1, b1, w2, b2, routing_weights, router_indices, alpha, limit, s1, s2)
