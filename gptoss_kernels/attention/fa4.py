"""FlashAttention-4 (package flash-attn-4, module flash_attn.cute) behind `flash_attention(backend="fa4")`.

What it can do stands in its source, version 4.0.0b36: flash_attn/cute/interface.py, flash_{fwd,bwd}_sm90.py, softmax.py
and flash_bwd_postprocess.py. Its tensors are (batch, length, heads, head_dim), so views of ours will do; its causality
is bottom-right aligned and its log-sum-exp has the sink in it, as ours.
"""

import functools
import importlib.metadata

import torch
from packaging.version import Version

from ..backends import capability, names

# The oldest version that was checked. Early ones drop the gradient of sinks without a word (Dao-AILab/flash-attention
# issue 1973, pull request 2706).
MINIMUM = "4.0.0b36"
# Its Hopper backward pass tiles a head_dim of 16 as 16 but strides its buffers as 32: dq would be wrong (their pull
# request 2896).
HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)
# Hopper and data-centre Blackwell; its kernels for 8.x and 12.x have no sinks (their pull request 2752).
MAJORS = (9, 10, 11)


@functools.cache
def load_fa4():
    """(flash_attn_func, flash_attn_varlen_func) of flash_attn.cute.

    Raises:
        RuntimeError: flash-attn-4 is missing, too old, or fails to load.
    """
    advice = f'install it with `pip install "flash-attn-4>={MINIMUM}"`'
    try:
        found = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f'backend="fa4": FlashAttention-4 (flash-attn-4) is not installed; {advice}') from None
    if Version(found) < Version(MINIMUM):
        raise RuntimeError(f'backend="fa4": expected flash-attn-4 {MINIMUM} or newer, got {found}; {advice}')
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except Exception as error:  # its compiler's packages fail in their own ways where they do not fit the driver
        raise RuntimeError(f'backend="fa4": flash-attn-4 {found} cannot be loaded: {error}') from error
    return flash_attn_func, flash_attn_varlen_func


def _capability(q: torch.Tensor) -> tuple[int, int] | None:
    return capability(q.get_device()) if q.is_cuda else None


def check_fa4(q: torch.Tensor, key_padding_mask: torch.Tensor | None) -> None:
    """Raises where FlashAttention-4 cannot compute exactly what is asked for; see `gptoss_kernels.flash_attention`."""
    load_fa4()
    found = _capability(q)
    if found is None:
        raise RuntimeError(f'backend="fa4": expected q on a CUDA device, got q on {q.device}')
    if found[0] not in MAJORS:
        raise RuntimeError(
            'backend="fa4": expected a Hopper or data-centre Blackwell GPU (compute capability 9.x, 10.x or 11.x), got '
            f"{found[0]}.{found[1]}: FlashAttention-4 has no attention sinks there"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f'q: backend="fa4" expected one of {names(DTYPES)}, got {q.dtype}')
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f'q: backend="fa4" expected head_dim in {HEAD_DIMS}, got {q.shape[-1]}, whose gradients FlashAttention-4 '
            "computes wrongly"
        )
    if key_padding_mask is not None:
        raise ValueError(
            'key_padding_mask: backend="fa4" expected None, FlashAttention-4 has no padding mask; pack the rows '
            'with cu_seqlens, or use backend="triton"'
        )


@torch.compiler.disable(reason='backend="fa4": FlashAttention-4 cannot be traced')
def fa4_attention(q, k, v, sinks, scale, sliding_window, cu_seqlens, key_padding_mask, return_lse):
    """Checked arguments in, (out, lse) out: see `gptoss_kernels.flash_attention`. Without return_lse, lse is no result.

    Gradients are summed with atomics, in another order each time, unless torch.use_deterministic_algorithms is on.
    """
    check_fa4(q, key_padding_mask)
    fixed, varlen = load_fa4()
    if sliding_window is not None and sliding_window >= k.shape[2]:
        sliding_window = None  # hides nothing, and their kernels without a window are the faster ones
    if sinks is not None and sinks.dtype not in (*DTYPES, torch.float32):
        sinks = sinks.float()  # fp64
    options = dict(
        softmax_scale=scale,
        causal=True,
        # To the left and to the right of the query's own key. -1 is a number there, not "all".
        window_size=(None, None) if sliding_window is None else (sliding_window - 1, 0),
        learnable_sink=sinks,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=return_lse,
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.cuda.device_of(q):  # they compile for and launch on the current device
        if cu_seqlens is None:
            out, lse = fixed(q, k, v, **options)
            return out.transpose(1, 2), lse
        cu_seqlens = cu_seqlens.contiguous()
        # Without max_seqlen_q and _k, which only the GPU knows, they take the row's length as the bound.
        out, lse = varlen(q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options)
        return out[None].transpose(1, 2), None if lse is None else lse[None]
