"""`fused_experts`: checks its arguments, chooses a backend, and calls it. Imports no kernel until one is launched."""

import torch

from ..backends import DTYPES, check_triton, default_backend, names
from ..mxfp4.packed import PackedExperts
from ..mxfp4.reference import dequantize
from .reference import ExpertsLoRA, experts_reference

BACKENDS = ("auto", "triton", "reference")
# Tokens of one pass over frozen weights: what exists for the length of a product is bounded. At 16,384 tokens a product
# is at full speed, and making packed weights dense again for each pass costs a few percent of it.
CHUNK = 32768


def fused_experts(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor | PackedExperts,
    gate_up_proj_bias: torch.Tensor,
    down_proj: torch.Tensor | PackedExperts,
    down_proj_bias: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_lora: ExpertsLoRA | None = None,
    down_lora: ExpertsLoRA | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """gpt-oss's mixture of experts: y_t = sum_k w_tk (act(x_t W1_e + b1_e) W2_e + b2_e), e = router_indices[t, k].

    act is the clamped SwiGLU over interleaved columns: gate (even) <= limit, |up| (odd) <= limit,
    (up + 1) gate sigmoid(alpha gate). Exact and differentiable in x, routing_weights and the four parameters; each
    gradient is computed only if it is needed. For the backward pass it keeps x, the pre-activation
    (tokens * top_k, 2 * intermediate) and the routing. Frozen weights take more than 32,768 tokens in passes of as
    many, which does not change y.

    Args:
        x: (tokens, hidden), fp16, bf16 or fp32.
        gate_up_proj: (experts, hidden, 2 * intermediate), x's dtype; or `PackedExperts` of that shape: frozen MXFP4
            weights, which are made dense one projection at a time, in a buffer that all layers of a device share, for
            each product again. Results are bitwise those of the dense weights.
        gate_up_proj_bias: (experts, 2 * intermediate), any floating dtype.
        down_proj: (experts, intermediate, hidden), x's dtype; or packed.
        down_proj_bias: (experts, hidden), any floating dtype.
        router_indices: (tokens, top_k), integers in 0 … experts; the value `experts` is Transformers' sentinel, and
            its slot is skipped. Values are trusted.
        routing_weights: (tokens, top_k), any floating dtype (its gradient has it too).
        alpha, limit: of the activation.
        gate_up_lora, down_lora: an adapter for each expert, (a, b, scaling) as `ExpertsLoRA` says: x W becomes
            x W + scaling (x A^T) B^T, differentiable in a and b. The four parameters must then be frozen.
        backend: "triton"; "reference" (plain PyTorch, every expert on every token); "auto": triton on a GPU, and on
            the CPU under TRITON_INTERPRET=1 for fp32 and fp16; otherwise reference.

    Returns:
        (tokens, hidden), dtype of x, summed over the choices in fp32 and in their order: two calls with the same
        inputs give bitwise the same result, forward and backward.

    The matrix products are torch's grouped_mm for bf16 on a GPU of compute capability 8.0 or newer, which needs
    hidden and intermediate in multiples of 8; elsewhere they run expert by expert, reading the experts' loads on the
    host.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit together.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    parameters = {
        "gate_up_proj": gate_up_proj,
        "gate_up_proj_bias": gate_up_proj_bias,
        "down_proj": down_proj,
        "down_proj_bias": down_proj_bias,
    }
    _check_arguments(x, parameters, router_indices, routing_weights, alpha, limit, backend)
    adapted = {"gate_up_lora": gate_up_lora, "down_lora": down_lora}
    _check_adapters(x, parameters, adapted)
    if backend == "auto":
        backend = default_backend(x)
    arguments = (x, *parameters.values(), router_indices, routing_weights)
    if backend == "reference":
        arguments = (dequantize(a.blocks, a.scales, x.dtype) if isinstance(a, PackedExperts) else a for a in arguments)
        return experts_reference(*arguments, alpha=alpha, limit=limit, **adapted)
    check_triton("x", x)
    x, w1, b1, w2, b2, router_indices, routing_weights = (
        a if isinstance(a, PackedExperts) else a.contiguous() for a in arguments
    )
    (w1, s1), (w2, s2) = ((w.blocks, w.scales) if isinstance(w, PackedExperts) else (w, None) for w in (w1, w2))
    # These imports decorate the kernels: not before the first launch.
    if gate_up_lora is None and down_lora is None:
        from .autograd import triton_experts as compute

        adapters = ()
    else:
        from .lora import factors
        from .lora import triton_lora_experts as compute

        adapters = *factors(gate_up_lora, x.dtype), *factors(down_lora, x.dtype)
    frozen = not any(w.requires_grad for w in parameters.values())
    parts = [tensor.split(CHUNK if frozen else x.shape[0]) for tensor in (x, router_indices, routing_weights)]
    results = [
        compute(tokens, w1, b1, w2, b2, indices, weights, float(alpha), float(limit), *adapters, s1, s2)
        for tokens, indices, weights in zip(*parts, strict=True)
    ]
    return results[0] if len(results) == 1 else torch.cat(results)


def _check_arguments(x, parameters, router_indices, routing_weights, alpha, limit, backend) -> None:
    tensors = {"x": x, **parameters, "router_indices": router_indices, "routing_weights": routing_weights}
    for name, tensor in tensors.items():
        packed = name in ("gate_up_proj", "down_proj") and isinstance(tensor, PackedExperts)
        if not packed and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
        if name != "router_indices" and not packed and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and backend == "reference"):
        raise TypeError(f"x: expected one of {names(DTYPES)}, got {x.dtype}")
    for name in ("gate_up_proj", "down_proj"):
        if parameters[name].dtype != x.dtype and not isinstance(parameters[name], PackedExperts):
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {parameters[name].dtype}")
    if router_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"router_indices: expected torch.int32 or torch.int64, got {router_indices.dtype}")

    if x.dim() != 2:
        raise ValueError(f"x: expected (tokens, hidden), got {tuple(x.shape)}")
    gate_up = parameters["gate_up_proj"]
    if gate_up.dim() != 3 or gate_up.shape[1] != x.shape[1] or gate_up.shape[2] % 2:
        raise ValueError(
            f"gate_up_proj: expected (experts, hidden={x.shape[1]}, 2 * intermediate), got {tuple(gate_up.shape)}"
        )
    experts, hidden, width = gate_up.shape
    expected = {
        "gate_up_proj_bias": (experts, width),
        "down_proj": (experts, width // 2, hidden),
        "down_proj_bias": (experts, hidden),
    }
    for name, shape in expected.items():
        if parameters[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(parameters[name].shape)}")
    if min(x.shape[0], experts, hidden, width) < 1:
        raise ValueError(f"x, gate_up_proj: expected no empty dimension, got {tuple(x.shape)}, {tuple(gate_up.shape)}")
    if router_indices.dim() != 2 or router_indices.shape[0] != x.shape[0] or router_indices.shape[1] < 1:
        raise ValueError(f"router_indices: expected (tokens={x.shape[0]}, top_k), got {tuple(router_indices.shape)}")
    if routing_weights.shape != router_indices.shape:
        raise ValueError(
            f"routing_weights: expected router_indices' shape {tuple(router_indices.shape)}, "
            f"got {tuple(routing_weights.shape)}"
        )
    for name, value in (("alpha", alpha), ("limit", limit)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 < limit < float("inf"):
        raise ValueError(f"limit: expected a finite number > 0, got {limit}")
    if x.is_cuda and x.dtype == torch.bfloat16 and (hidden % 8 or width % 16):
        raise ValueError(
            f"x, gate_up_proj: expected hidden and intermediate in multiples of 8 for bfloat16 on a GPU (torch's "
            f"grouped_mm), got hidden={hidden}, intermediate={width // 2}"
        )


def _check_adapters(x, parameters, adapted) -> None:
    if all(lora is None for lora in adapted.values()):
        return
    for name, weight in parameters.items():
        if weight.requires_grad:
            raise ValueError(f"{name}: expected frozen parameters beside gate_up_lora and down_lora, got requires_grad")
    for name, lora in adapted.items():
        if lora is None:
            continue
        if not isinstance(lora, tuple) or len(lora) != 3 or not all(isinstance(t, torch.Tensor) for t in lora[:2]):
            raise TypeError(f"{name}: expected ExpertsLoRA(a, b, scaling), got {type(lora).__name__}")
        experts, columns, rows = parameters[name.replace("lora", "proj")].shape
        a, b, _ = lora
        rank = a.shape[1] if a.dim() == 3 else 0
        if a.shape != (experts, rank, columns) or b.shape != (experts, rows, rank) or rank < 1:
            raise ValueError(
                f"{name}: expected a ({experts}, rank, {columns}) and b ({experts}, {rows}, rank), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.device != x.device or b.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {a.device} and {b.device}")
        if not a.is_floating_point() or not b.is_floating_point():
            raise TypeError(f"{name}: expected floating-point tensors, got {a.dtype} and {b.dtype}")
