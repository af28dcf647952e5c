"""A linear layer with a LoRA adapter as one autograd function: products in the input's dtype, adapters in their own.

y = x W^T + b + scaling (x A^T) B^T. The adapter's products accumulate into the layer's in the matrix product's own
epilogue, forward and backward, so that nothing of the size of y or x is written twice or cast to fp32.
"""

import torch

from ..operators import once_differentiable


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.to(x.dtype).T  # (tokens, rank)
        y = torch.nn.functional.linear(flat, weight, bias)
        y.addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, low, weight, a, b = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dlow = dy @ b.to(x.dtype)  # (tokens, rank), not yet scaled
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(dlow, a.to(x.dtype), alpha=ctx.scaling)
            dx = dx.view_as(x)
        if ctx.needs_input_grad[3]:
            da = (dlow.T @ flat).to(a.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            db = (dy.T @ low).to(b.dtype).mul_(ctx.scaling)
        return dx, None, None, da, db, None


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """x (..., n) through a frozen linear layer (weight (m, n), bias (m,)) and its adapter a (rank, n), b (m, rank)."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return _LoRALinear.apply(x, weight, bias, a, b, scaling)
