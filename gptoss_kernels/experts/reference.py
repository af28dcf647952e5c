"""The definition of gpt-oss's experts in plain PyTorch: every expert on every token, weighted by the routing."""

from typing import NamedTuple

import torch


class ExpertsLoRA(NamedTuple):
    """A low-rank adapter for each expert of one projection: x W becomes x W + scaling (x A^T) B^T.

    a: (experts, rank, in), b: (experts, out, rank), any floating dtype, any rank >= 1; scaling: a number.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def experts_reference(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor,
    down_proj_bias: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_lora: ExpertsLoRA | None = None,
    down_lora: ExpertsLoRA | None = None,
) -> torch.Tensor:
    """y_t = sum_k w_tk (act(x_t W1_e + b1_e) W2_e + b2_e), e = router_indices[t, k]; act = (up + 1) gate
    sigmoid(alpha gate) with gate <= limit and |up| <= limit.

    Args: as `gptoss_kernels.fused_experts`; any floating dtypes. fp64 stays fp64; all else is computed in fp32.

    Returns:
        (tokens, hidden), dtype of x. Differentiable in x, routing_weights, the four parameters and the adapters.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = x.to(dtype)

    def product(value, weight, lora, expert):
        result = value @ weight[expert].to(dtype)
        if lora is not None:
            result = result + lora.scaling * (value @ lora.a[expert].to(dtype).T) @ lora.b[expert].to(dtype).T
        return result

    out = torch.zeros_like(inputs)
    for expert in range(gate_up_proj.shape[0]):
        share = torch.where(router_indices == expert, routing_weights.to(dtype), 0.0).sum(
            -1, keepdim=True
        )  # [tokens, 1]
        hidden = product(inputs, gate_up_proj, gate_up_lora, expert) + gate_up_proj_bias[expert].to(dtype)
        gate, up = hidden[:, 0::2].clamp(max=limit), hidden[:, 1::2].clamp(-limit, limit)
        act = (up + 1) * gate * torch.sigmoid(alpha * gate)
        out = out + share * (product(act, down_proj, down_lora, expert) + down_proj_bias[expert].to(dtype))
    return out.to(x.dtype)
