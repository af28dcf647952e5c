"""Forward kernel: online softmax over key tiles, the sink being key number -1."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..lane import check_lane
from ..launch import Prepared, remembered
from . import tiles
from .masks import LOG2E, VARYING, first_key, load_tile, split_keys, splits, tile_rows

LN2 = tl.constexpr(0.6931471805599453)
# Stands for "no key yet": finite, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def attend(
    acc,  # [BLOCK_M, BLOCK_D] fp32
    running_max,  # [BLOCK_M] fp32, base 2
    running_sum,  # [BLOCK_M] fp32
    q_tile,  # [BLOCK_M, BLOCK_D]
    k,  # key 0 of this head
    v,
    padding,  # [kv_len] of this batch row
    position,  # [BLOCK_M] key position of each query
    first,  # [BLOCK_M] oldest key of each query
    begin,
    end,
    kv_len,
    stride_kn,
    stride_vn,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Let the queries of a tile attend to keys [begin, end); MASKED: where a bound may cut through a tile."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # A scalar pointer moves and a tile of offsets stays: a tile of moving pointers would cost twice the registers.
    k += begin.to(tl.int64) * stride_kn
    v += begin.to(tl.int64) * stride_vn
    k_offs = offs_n[None, :] * stride_kn + offs_d[:, None]  # [BLOCK_D, BLOCK_N]
    v_offs = offs_n[:, None] * stride_vn + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    lowest = tl.min(position, 0)
    newest = tl.max(first, 0)
    for start_n in range(begin, end, BLOCK_N):
        key = start_n + offs_n  # [BLOCK_N]
        k_tile = load_tile(k + k_offs, offs_d[:, None] < HEAD_DIM, key[None, :] < kv_len, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            if start_n + BLOCK_N - 1 > lowest:
                scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            if start_n < newest:
                scores = tl.where(key[None, :] >= first[:, None], scores, float("-inf"))
        if PADDED:
            real = tl.load(padding + key, mask=key < kv_len, other=0) != 0
            scores = tl.where(real[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - new_max[:, None])  # [BLOCK_M, BLOCK_N]
        rescale = tl.exp2(running_max - new_max)  # [BLOCK_M]
        running_sum = running_sum * rescale + tl.sum(p, 1)
        v_tile = load_tile(v + v_offs, offs_d[None, :] < HEAD_DIM, key[:, None] < kv_len, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        running_max = new_max
        k += BLOCK_N * stride_kn
        v += BLOCK_N * stride_vn
    return acc, running_max, running_sum


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q,  # (batch, q_heads, q_len, HEAD_DIM)
    k,  # (batch, kv_heads, kv_len, HEAD_DIM)
    v,
    sinks,  # (q_heads,)
    out,  # (batch, q_heads, q_len, HEAD_DIM)
    lse,  # (batch, q_heads, q_len) fp32
    cu_seqlens,  # (documents + 1,) int32
    padding,  # (batch, kv_len) bool
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    q_heads,
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    qk_scale,  # scale * log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,  # of a kv group in a tile, which share its keys: BLOCK_M rows are so many heads' queries
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Heads vary fastest, so that a kv group's heads share K and V in L2; the last rows, the longest, start first.
    batch = (tl.program_id(0) * HEADS // q_heads).to(tl.int64)
    head = (tl.program_id(0) * HEADS % q_heads).to(tl.int64)
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * (BLOCK_M // HEADS)

    offs_m, heads = tile_rows(start_m, head, BLOCK_M, HEADS)  # [BLOCK_M]; heads is a number if HEADS is 1
    offs_d = tl.arange(0, BLOCK_D)
    position = tl.minimum(offs_m, q_len - 1) + (kv_len - q_len)  # [BLOCK_M]
    first = first_key(position, cu_seqlens, window, documents, search_steps, HAS_WINDOW, PACKED)  # [BLOCK_M]
    begin, full_begin, full_end, end = split_keys(position, first, kv_len, BLOCK_N)

    query = batch * stride_qb + heads * stride_qh + offs_m.to(tl.int64) * stride_qm  # [BLOCK_M]
    stored = (offs_m[:, None] < q_len) & (offs_d[None, :] < HEAD_DIM)
    q_tile = tl.load(q + query[:, None] + offs_d[None, :], stored, other=0.0)
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    if PADDED:
        padding += batch * kv_len

    # The sink is key -1, with score z and no value: the state after it is max = z, sum = 1, acc = 0.
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    running_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINKS:
        z = tl.load(sinks + heads).to(tl.float32) * LOG2E
        running_max = tl.maximum(running_max, z)
        running_sum = tl.exp2(z - running_max)

    if SPLIT:
        if HAS_WINDOW or PACKED:
            acc, running_max, running_sum = attend(
                acc, running_max, running_sum, q_tile, k, v, padding, position, first, begin,
                tl.minimum(full_begin, end), kv_len, stride_kn, stride_vn, qk_scale, HEAD_DIM, BLOCK_N, BLOCK_D,
                PADDED, True,
            )  # fmt: skip
        acc, running_max, running_sum = attend(
            acc, running_max, running_sum, q_tile, k, v, padding, position, first, full_begin,
            full_end, kv_len, stride_kn, stride_vn, qk_scale, HEAD_DIM, BLOCK_N, BLOCK_D, PADDED, False,
        )  # fmt: skip
        begin = full_end
    acc, running_max, running_sum = attend(
        acc, running_max, running_sum, q_tile, k, v, padding, position, first, begin,
        end, kv_len, stride_kn, stride_vn, qk_scale, HEAD_DIM, BLOCK_N, BLOCK_D, PADDED, True,
    )  # fmt: skip

    # Neither key nor sink: sum = 0, o = 0, lse = -inf.
    empty = running_sum == 0.0
    running_sum = tl.where(empty, 1.0, running_sum)
    acc = acc / running_sum[:, None]
    row_lse = tl.where(empty, float("-inf"), (running_max + tl.log2(running_sum)) * LN2)
    row = batch * stride_ob + heads * stride_oh + offs_m.to(tl.int64) * stride_om  # [BLOCK_M]
    tl.store(out + row[:, None] + offs_d[None, :], acc.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + (batch * q_heads + heads) * q_len + offs_m, row_lse, mask=offs_m < q_len)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: torch.Tensor | None,
    padding: torch.Tensor | None,
    interpreted: bool,
) -> None:
    """Fill out (batch, q_heads, q_len, head_dim), any strides, and lse (batch, q_heads, q_len) fp32 contiguous."""
    tensors = q, k, v, sinks, out, lse, cu_seqlens, padding
    key = signature(q, k, v, sinks, scale, window, cu_seqlens, padding), out.stride()
    launch = remembered(_prepared, key, lambda: prepare_forward(*tensors, scale, window, interpreted), interpreted)
    launch(*tensors)


_prepared: dict[tuple, Callable] = {}


def signature(q, k, v, sinks, scale, window, cu_seqlens, padding) -> tuple:
    """What decides how these tensors are computed. Alignment decides between kernels; within one, Prepared looks at it
    again."""
    return (
        q.get_device(), k.get_device(), v.get_device(), q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(),
        q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, None if sinks is None else sinks.dtype, scale, window,
        None if cu_seqlens is None else cu_seqlens.shape[0], padding is None,
    )  # fmt: skip


def prepare_forward(q, k, v, sinks, out, lse, cu_seqlens, padding, scale, window, interpreted) -> Callable:
    """What launches the kernel on tensors like these, called with them (q to padding)."""
    check_lane(interpreted)
    hopper = None if interpreted or not splits(window) else tiles.hopper_kernels(q, k, v)
    if hopper is not None:
        return hopper.prepare_forward(q, k, v, sinks, out, scale, window, cu_seqlens, padding)
    batch, q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    group = q_heads // k.shape[1]
    numbers = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], q_heads, q_len, kv_len, window or 0,
        documents, documents.bit_length(), scale * LOG2E.value,
    )  # fmt: skip

    def with_tile(tile) -> Prepared:
        heads = tile.heads_of(group)
        constants = dict(
            GROUP=group, HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(head_dim), HEADS=heads, HAS_SINKS=sinks is not None,
            HAS_WINDOW=window is not None, PACKED=cu_seqlens is not None, PADDED=padding is not None,
            SPLIT=splits(window),
        )  # fmt: skip
        grid = (batch * q_heads // heads, triton.cdiv(q_len * heads, tile.block_m))
        return Prepared(forward_kernel, grid, numbers, constants, **tile.options)

    def attempt(tile):
        with_tile(tile)(q, k, v, sinks, out, lse, cu_seqlens, padding)

    return with_tile(tiles.select("forward", q, not splits(window), interpreted, attempt))
