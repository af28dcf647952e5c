"""`flash_attention`: checks its arguments, chooses a backend, and calls it. Imports no kernel until one is launched."""

import os

import torch

from ..backends import DTYPES, check_triton, default_backend, names
from .reference import attention_reference

BACKENDS = ("auto", "triton", "reference", "fa4")
HEAD_DIMS = (16, 32, 64, 96, 128)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with one learned sink logit a head; exact, differentiable in q, k, v and sinks.

    Query i attends to keys j <= i + kv_len - q_len (bottom-right aligned: decoding, chunked prefill), and the sink
    z of its head joins the normaliser: o_i = sum_j exp(s_ij) v_j / (exp(z) + sum_j exp(s_ij)).

    Args:
        q: (batch, q_heads, q_len, head_dim), fp16, bf16 or fp32; head_dim 16, 32, 64, 96 or 128.
        k, v: (batch, kv_heads, kv_len, head_dim), q's dtype and device; q_heads % kv_heads == 0, kv_len >= q_len.
        sinks: (q_heads,), any floating dtype (its gradient has it too); not scaled. None: plain softmax.
        scale: factor on q·k, > 0; default head_dim ** -0.5.
        sliding_window: keys kept, the query's own included (gpt-oss: 128). None: all.
        cu_seqlens: (documents + 1,) int32, 0 first, strictly increasing, q_len last: packed documents in one row
            (batch 1, q_len == kv_len) that do not see each other. On a GPU its values are trusted; set
            GPTOSS_CHECK=1 for a device-side assertion.
        key_padding_mask: (batch, kv_len) bool, True where a key is a real token; left, right or any other padding.
        return_lse: also return the log-sum-exp of each row, sink included.
        backend: "triton"; "reference" (plain PyTorch, quadratic memory); "auto": triton on a GPU, and on the CPU
            under TRITON_INTERPRET=1 for fp32 and fp16; otherwise reference; "fa4": FlashAttention-4 (flash-attn-4
            4.0.0b36 or newer) on a GPU of compute capability 9.x, 10.x or 11.x, for fp16 and bf16, head_dim 32 to 128,
            no key_padding_mask. A backend asked for by name is used or an error says why it cannot be.

    Returns:
        out, shape and dtype of q, stored as (batch, q_len, q_heads, head_dim), so that
        `out.transpose(1, 2).reshape(batch, q_len, -1)` copies nothing. With return_lse, (out, lse): lse is
        (batch, q_heads, q_len) fp32, natural logarithm. A row with neither key nor sink gives 0 and -inf.

    Any strides with a unit last stride are read in place. Two calls with the same inputs give bitwise the same
    results, forward and backward. backend="fa4" reads strides in multiples of 16 bytes in place and copies others; its
    gradients are bitwise the same only under torch.use_deterministic_algorithms(True); torch.compile leaves it out of
    its graphs; and where a sink is more than 88 above all scores of a row, the lse that it returns is inf there.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices, values or a combination of arguments that this function, or the backend asked for,
            does not define.
        RuntimeError: backend="triton" where Triton cannot run, backend="fa4" where FlashAttention-4 cannot.
    """
    _check_arguments(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "auto":
        backend = default_backend(q)
    if backend == "triton":
        check_triton("q", q)
        from .autograd import triton_attention  # decorates the kernels: not before the first launch

        return triton_attention(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, return_lse)
    if backend == "fa4":
        from .fa4 import fa4_attention

        out, lse = fa4_attention(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, return_lse)
    else:
        out, lse = attention_reference(
            q,
            k,
            v,
            sinks,
            scale=scale,
            sliding_window=sliding_window,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
        )
    return (out, lse) if return_lse else out


def _check_arguments(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, length, head_dim), got {tuple(x.shape)}")
    dtype, device, k_shape = q.dtype, q.device, k.shape  # looked up once: each time takes the host a while
    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, _ = k_shape
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if dtype not in DTYPES and not (dtype == torch.float64 and backend == "reference"):
        raise TypeError(f"q: expected one of {names(DTYPES)}, got {dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected q's dtype {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected q's device {device}, got {x.device}")
    if k_shape != v.shape:
        raise ValueError(f"v: expected k's shape {tuple(k_shape)}, got {tuple(v.shape)}")
    if k_shape != (batch, kv_heads, kv_len, head_dim):
        raise ValueError(
            f"k: expected (batch={batch}, kv_heads, kv_len, head_dim={head_dim}) as in q, got {tuple(k_shape)}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q: expected head_dim in {HEAD_DIMS}, got {head_dim}")
    if min(batch, q_heads, q_len, kv_heads) < 1:
        raise ValueError(f"q: expected every dimension >= 1, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if q_heads % kv_heads:
        raise ValueError(f"k: expected kv_heads to divide q_heads={q_heads}, got kv_heads={kv_heads}")
    if kv_len < q_len:
        raise ValueError(f"k: expected kv_len >= q_len={q_len}, got kv_len={kv_len}")

    if sinks is not None:
        if not isinstance(sinks, torch.Tensor) or not sinks.is_floating_point():
            got = sinks.dtype if isinstance(sinks, torch.Tensor) else type(sinks).__name__
            raise TypeError(f"sinks: expected a floating-point torch.Tensor or None, got {got}")
        if sinks.shape != (q_heads,):
            raise ValueError(f"sinks: expected shape ({q_heads},), one logit a query head, got {tuple(sinks.shape)}")
        if sinks.device != device:
            raise ValueError(f"sinks: expected q's device {device}, got {sinks.device}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a finite number > 0, got {scale}")
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"sliding_window: expected an int or None, got {type(sliding_window).__name__}")
        if sliding_window < 1:
            raise ValueError(f"sliding_window: expected >= 1 (the query's own key counts), got {sliding_window}")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q, kv_len, key_padding_mask)
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, torch.Tensor) or key_padding_mask.dtype != torch.bool:
            got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
            raise TypeError(f"key_padding_mask: expected a torch.bool tensor (True = real token), got {got}")
        if key_padding_mask.shape != (batch, kv_len):
            raise ValueError(
                f"key_padding_mask: expected shape (batch={batch}, kv_len={kv_len}), "
                f"got {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.device != q.device:
            raise ValueError(f"key_padding_mask: expected q's device {q.device}, got {key_padding_mask.device}")


def _check_cu_seqlens(cu_seqlens, q, kv_len, key_padding_mask) -> None:
    batch, _, q_len, _ = q.shape
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens: expected a torch.int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected q's device {q.device}, got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected batch 1 (all documents packed into one row), got batch {batch}")
    if q_len != kv_len:
        raise ValueError(f"cu_seqlens: expected q_len == kv_len, got q_len={q_len} and kv_len={kv_len}")
    if key_padding_mask is not None:
        raise ValueError("cu_seqlens: expected key_padding_mask=None with it (packed rows have no padding), got both")
    if torch.compiler.is_compiling():
        return  # values cannot be looked at while tracing
    if cu_seqlens.is_cuda:
        if os.environ.get("GPTOSS_CHECK") == "1":
            message = f"cu_seqlens: expected 0 first, strictly increasing, {q_len} last"
            torch._assert_async((cu_seqlens[0] == 0) & (cu_seqlens[-1] == q_len), message)
            torch._assert_async((cu_seqlens.diff() > 0).all(), message)
    elif cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != q_len or any(a >= b for a, b in zip(values, values[1:], strict=False)):
            shown = values if len(values) <= 12 else [*values[:6], "...", *values[-5:]]
            raise ValueError(f"cu_seqlens: expected 0 first, strictly increasing, q_len={q_len} last, got {shown}")
