"""What the kernels share: which keys a query sees, as one lower and one upper bound a row, and masked tile loads.

Causality, window and packed documents all make the keys of a query one interval [first, position]; seen from a key,
its queries are one interval too. No mask is ever stored: tiles outside the interval are not touched, tiles inside it
need none.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Integers that change from batch to batch. Triton would compile a kernel anew for 1 and for each multiple of 16 or not.
VARYING = ["q_len", "kv_len", "window", "documents", "search_steps", "batches", "blocks"]


def splits(window: int | None) -> bool:
    """Whether full and masked tiles get loops of their own: not for windows of a few tiles, mostly edges."""
    return window is None or window >= 512


@triton.jit
def document_bounds(cu_seqlens, token, documents, search_steps):
    """Start and end of the packed document that holds each token: a binary search in cu_seqlens (documents + 1,)."""
    low = token * 0  # [BLOCK] cu_seqlens[low] <= token < cu_seqlens[high]
    high = low + documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens + middle) <= token
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return tl.load(cu_seqlens + low), tl.load(cu_seqlens + low + 1)


@triton.jit
def first_key(position, cu_seqlens, window, documents, search_steps, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """Oldest key that a query at each position may see. [BLOCK]"""
    first = position * 0
    if HAS_WINDOW:
        first = tl.maximum(first, position - window + 1)
    if PACKED:
        start, _ = document_bounds(cu_seqlens, position, documents, search_steps)
        first = tl.maximum(first, start)
    return first


@triton.jit
def query_end(
    key, cu_seqlens, q_len, offset, window, documents, search_steps, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """One past the newest query row that may see each key; query row i stands at key position i + offset. [BLOCK]"""
    end = key * 0 + q_len
    if HAS_WINDOW:
        end = tl.minimum(end, key + window - offset)
    if PACKED:
        _, stop = document_bounds(cu_seqlens, key, documents, search_steps)
        end = tl.minimum(end, stop)
    return end


@triton.jit
def tile_rows(start, head, BLOCK_M: tl.constexpr, HEADS: tl.constexpr):
    """Query and head of each row of a tile: HEADS heads of a kv group from `head` on, so many queries of each."""
    row = tl.arange(0, BLOCK_M)
    query, heads = start + row, head
    if HEADS > 1:
        query, heads = start + row % (BLOCK_M // HEADS), head + row // (BLOCK_M // HEADS)
    return query, heads


@triton.jit
def load_tile(ptrs, in_head, in_range, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile; out-of-range rows (if MASKED) and columns past a head_dim that is no power of two read as 0."""
    if MASKED:
        tile = tl.load(ptrs, mask=in_head & in_range, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=in_head, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def split_keys(position, first, kv_len, BLOCK_N: tl.constexpr):
    """Key range of a query tile in three parts: [begin, full_begin) and [full_end, end) need a mask, what lies
    between does not. begin is a multiple of BLOCK_N."""
    oldest = tl.min(first, 0)
    begin = oldest // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.max(position, 0) + 1, kv_len)
    full_begin = tl.cdiv(tl.max(first, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum((tl.min(position, 0) + 1) // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end
