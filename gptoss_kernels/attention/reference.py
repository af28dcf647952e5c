"""The definition of attention with sinks, twice, in plain PyTorch: what every kernel is tested against.

`attention_reference` spells out the normaliser; `attention_concat` appends the sink as one more column and drops it
after the softmax, as Transformers' eager path does. They share no code, masks included, so that one checks the other.
Both build the full (q_len, kv_len) matrix: for definitions, small sizes and the CPU.
"""

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the sink as a term of the normaliser: o = sum_j exp(s_j) v_j / (exp(z) + sum_j exp(s_j)).

    Args:
        q: (batch, q_heads, q_len, head_dim), any floating dtype.
        k, v: (batch, kv_heads, kv_len, head_dim).
        sinks: (q_heads,) or None.
        scale, sliding_window, cu_seqlens, key_padding_mask: as in `gptoss_kernels.flash_attention`.

    Returns:
        out (batch, q_heads, q_len, head_dim) in q's dtype, in memory (batch, q_len, q_heads, head_dim), and
        lse (batch, q_heads, q_len), natural logarithm, sink included. fp64 stays fp64; all else is computed in
        fp32, which is also the dtype of lse. Differentiable in q, k, v, sinks through both results.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head_dim**-0.5 if scale is None else scale

    # Query i stands at key position i + kv_len - q_len.
    position = torch.arange(kv_len - q_len, kv_len, device=q.device)[:, None]
    key = torch.arange(kv_len, device=q.device)[None, :]
    first = torch.zeros_like(position)
    if sliding_window is not None:
        first = position - sliding_window + 1
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
        first = torch.maximum(first, starts.repeat_interleave(cu_seqlens.diff().long(), output_size=q_len)[:, None])
    allowed = ((key <= position) & (key >= first))[None, None]
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]

    grouped = q.to(dtype).reshape(batch, kv_heads, q_heads // kv_heads, q_len, head_dim)
    scores = torch.einsum("bhgid,bhjd->bhgij", grouped, k.to(dtype)).reshape(batch, q_heads, q_len, kv_len) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    sink = torch.full((q_heads,), float("-inf"), dtype=dtype, device=q.device) if sinks is None else sinks.to(dtype)
    sink = sink[None, :, None, None]

    # The maximum only keeps exp() in range: it cancels, so it carries no gradient. No key and no sink: -inf -> 0.
    maximum = torch.maximum(scores.detach().amax(-1, keepdim=True), sink.detach())
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    weights = torch.exp(scores - maximum)
    normaliser = weights.sum(-1, keepdim=True) + torch.exp(sink - maximum)
    empty = normaliser == 0
    probabilities = weights / normaliser.masked_fill(empty, 1.0)
    out = torch.einsum(
        "bhgij,bhjd->bihgd", probabilities.reshape(batch, kv_heads, -1, q_len, kv_len), v.to(dtype)
    ).reshape(batch, q_len, q_heads, head_dim)
    lse = (normaliser.masked_fill(empty, 1.0).log() + maximum).masked_fill(empty, float("-inf")).squeeze(-1)
    return out.to(q.dtype).transpose(1, 2), lse


def attention_concat(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the sink as one more column of the scores, dropped after the softmax. Same contract as
    `attention_reference`, but for a row that has neither key nor sink, whose softmax is not defined (NaN here).

    compute_dtype: of scores and softmax; default fp32, fp64 for fp64 inputs. Half precision is what eager attention
    does: the yardstick for a kernel's error."""
    group = q.shape[1] // k.shape[1]
    work = compute_dtype or (q.dtype if q.dtype == torch.float64 else torch.float32)
    k, v = (x.to(work).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.to(work) @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)

    q_len, kv_len = scores.shape[-2:]
    ones = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
    mask = ones.tril(kv_len - q_len)
    if sliding_window is not None:
        mask = mask.triu(kv_len - q_len - sliding_window + 1)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(q_len, device=q.device), cu_seqlens[1:].long(), right=True)
        mask = mask & (document[:, None] == document[None, :])
    bias = torch.zeros(q_len, kv_len, dtype=work, device=q.device).masked_fill(~mask, float("-inf"))[None, None]
    if key_padding_mask is not None:
        bias = bias + torch.where(key_padding_mask, 0.0, float("-inf"))[:, None, None, :].to(work)

    lse_dtype = torch.float64 if work == torch.float64 else torch.float32
    logits = scores + bias
    if sinks is not None:
        column = sinks.to(work).reshape(1, -1, 1, 1).expand(logits.shape[0], -1, q_len, 1)
        logits = torch.cat([logits, column], dim=-1)
    out = torch.softmax(logits, dim=-1)[..., :kv_len] @ v
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), torch.logsumexp(logits, dim=-1).to(lse_dtype)
