"""The definition of gpt-oss's experts in plain PyTorch: every expert on every token, weighted by the routing."""

import torch


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
) -> torch.Tensor:
    """y_t = sum_k w_tk (act(x_t W1_e + b1_e) W2_e + b2_e), e = router_indices[t, k]; act = (up + 1) gate
    sigmoid(alpha gate) with gate <= limit and |up| <= limit.

    Args: as `gptoss_kernels.fused_experts`; any floating dtypes. fp64 stays fp64; all else is computed in fp32.

    Returns:
        (tokens, hidden), dtype of x. Differentiable in x, routing_weights and the four parameters.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = x.to(dtype)
    out = torch.zeros_like(inputs)
    for expert in range(gate_up_proj.shape[0]):
        share = torch.where(router_indices == expert, routing_weights.to(dtype), 0.0).sum(
            -1, keepdim=True
        )  # [tokens, 1]
        hidden = inputs @ gate_up_proj[expert].to(dtype) + gate_up_proj_bias[expert].to(dtype)
        gate, up = hidden[:, 0::2].clamp(max=limit), hidden[:, 1::2].clamp(-limit, limit)
        act = (up + 1) * gate * torch.sigmoid(alpha * gate)
        out = out + share * (act @ down_proj[expert].to(dtype) + down_proj_bias[expert].to(dtype))
    return out.to(x.dtype)
