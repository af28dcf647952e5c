"""Backward kernels: delta, the sinks' gradient and dQ; dK and dV. No atomics: each output tile has one program.

With P = exp(S - lse), lse including the sink: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K,
dK = scale dS^T Q, where delta = rowsum(dO * O) - dlse, and dz = -sum over rows of exp(z - lse) delta.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..lane import check_lane
from ..launch import Prepared, remembered
from . import tiles
from .forward import signature
from .masks import LOG2E, VARYING, first_key, load_tile, query_end, split_keys, splits, tile_rows


@triton.jit
def accumulate_dkdv(
    dk,  # [BLOCK_N, BLOCK_D] fp32
    dv,
    k_tile,  # [BLOCK_N, BLOCK_D]
    v_tile,
    q,  # row 0 of this head
    dout,
    lse2,  # [rows] of this head
    delta,
    real,  # [BLOCK_N] the key is a token
    key,  # [BLOCK_N]
    last,  # [BLOCK_N] one past the newest query row of each key
    begin,
    end,
    q_len,
    offset,
    stride_qm,
    stride_dm,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what query rows [begin, end) of one head contribute to dK and dV of a key tile."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q += begin.to(tl.int64) * stride_qm
    dout += begin.to(tl.int64) * stride_dm
    q_offs = offs_m[:, None] * stride_qm + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
    do_offs = offs_m[:, None] * stride_dm + offs_d[None, :]
    for start_m in range(begin, end, BLOCK_M):
        row = start_m + offs_m  # [BLOCK_M]
        in_range = row < q_len
        q_tile = load_tile(q + q_offs, offs_d[None, :] < HEAD_DIM, in_range[:, None], HEAD_DIM, BLOCK_D, MASKED)
        row_lse = tl.load(lse2 + row)  # inf past q_len, where p becomes 0
        row_delta = tl.load(delta + row)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(scores * qk_scale - row_lse[None, :])
        if MASKED:
            allowed = (row[None, :] + offset >= key[:, None]) & (row[None, :] < last[:, None])
            p = tl.where(allowed, p, 0.0)
        if PADDED:
            p = tl.where(real[:, None], p, 0.0)
        do_tile = load_tile(dout + do_offs, offs_d[None, :] < HEAD_DIM, in_range[:, None], HEAD_DIM, BLOCK_D, MASKED)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
        q += BLOCK_M * stride_qm
        dout += BLOCK_M * stride_dm
    return dk, dv


@triton.jit
def sum_dsinks(dsinks_partial, dsinks, kv_head, q_heads, batches, blocks, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sinks' gradient of a kv head's group, a head a program, from the row blocks' shares in a fixed order."""
    offs = tl.arange(0, BLOCK)
    for member in range(tl.program_id(1), GROUP, tl.num_programs(1)):
        head = kv_head * GROUP + member
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for batch in range(batches):
            shares = dsinks_partial + (batch * q_heads + head) * blocks
            for start in range(0, blocks, BLOCK):
                total += tl.load(shares + start + offs, mask=start + offs < blocks, other=0.0)
        tl.store(dsinks + head, tl.sum(total, 0).to(dsinks.dtype.element_ty))


@triton.jit
def scratch_parts(scratch, lines, rows):
    """What dQ leaves for dK and dV, in one piece of memory, since each allocation takes the host some microseconds:
    lse2 and delta (lines, rows), and the sinks' gradient by head and row block (lines, blocks); lines: batch * q_heads.
    """
    size = lines.to(tl.int64) * rows
    return scratch, scratch + size, scratch + 2 * size


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    q,  # (batch, q_heads, q_len, HEAD_DIM)
    k,  # (batch, kv_heads, kv_len, HEAD_DIM)
    v,
    dout,  # as q
    scratch,  # fp32, what dQ has left: see scratch_parts
    dk,  # as k
    dv,
    dsinks,  # (q_heads,), written
    cu_seqlens,
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
    stride_db,
    stride_dh,
    stride_dm,
    stride_gb,
    stride_gh,
    stride_gn,
    kv_heads,
    batches,
    blocks,
    rows,
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # q_len is a multiple of BLOCK_M
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # One program a (key tile, kv head): it loops over the group's query heads. The first keys, seen most, start first.
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    start_n = tl.program_id(1) * BLOCK_N
    offset = kv_len - q_len
    lse2, delta, dsinks_partial = scratch_parts(scratch, tl.num_programs(0) * GROUP, rows)
    if HAS_SINKS:
        if batch == 0:
            sum_dsinks(dsinks_partial, dsinks, kv_head, kv_heads * GROUP, batches, blocks, GROUP, 256)

    offs_d = tl.arange(0, BLOCK_D)
    key = start_n + tl.arange(0, BLOCK_N)
    column = key.to(tl.int64)[:, None]
    stored = (key[:, None] < kv_len) & (offs_d[None, :] < HEAD_DIM)
    k_tile = tl.load(
        k + batch * stride_kb + kv_head * stride_kh + column * stride_kn + offs_d[None, :], stored, other=0.0
    )
    v_tile = tl.load(
        v + batch * stride_vb + kv_head * stride_vh + column * stride_vn + offs_d[None, :], stored, other=0.0
    )
    real = key < kv_len
    if PADDED:
        real = tl.load(padding + batch * kv_len + key, mask=key < kv_len, other=0) != 0

    # Query rows [begin, full_begin) and [full_end, end) need a mask; what lies between does not.
    last = query_end(
        tl.minimum(key, kv_len - 1), cu_seqlens, q_len, offset, window, documents, search_steps, HAS_WINDOW, PACKED
    )  # [BLOCK_N]
    begin = tl.maximum(start_n - offset, 0) // BLOCK_M * BLOCK_M
    end = tl.max(last, 0)
    full_begin = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    full_end = tl.maximum(tl.min(last, 0) // BLOCK_M * BLOCK_M, full_begin)

    acc_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    acc_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = q + batch * stride_qb + head * stride_qh
        do_head = dout + batch * stride_db + head * stride_dh
        base = (batch * kv_heads * GROUP + head) * rows
        masked_end = end
        if SPLIT:
            masked_end = tl.minimum(full_begin, end)
        acc_dk, acc_dv = accumulate_dkdv(
            acc_dk, acc_dv, k_tile, v_tile, q_head, do_head, lse2 + base, delta + base, real, key, last, begin,
            masked_end, q_len, offset, stride_qm, stride_dm, scale * LOG2E, HEAD_DIM, BLOCK_M, BLOCK_D, PADDED, True,
        )  # fmt: skip
        if SPLIT:
            acc_dk, acc_dv = accumulate_dkdv(
                acc_dk, acc_dv, k_tile, v_tile, q_head, do_head, lse2 + base, delta + base, real, key, last,
                full_begin, full_end, q_len, offset, stride_qm, stride_dm, scale * LOG2E, HEAD_DIM, BLOCK_M, BLOCK_D,
                PADDED, False,
            )  # fmt: skip
            if HAS_WINDOW or PACKED or not EVEN_ROWS:
                acc_dk, acc_dv = accumulate_dkdv(
                    acc_dk, acc_dv, k_tile, v_tile, q_head, do_head, lse2 + base, delta + base, real, key, last,
                    full_end, end, q_len, offset, stride_qm, stride_dm, scale * LOG2E, HEAD_DIM, BLOCK_M, BLOCK_D,
                    PADDED, True,
                )  # fmt: skip

    target = batch * stride_gb + kv_head * stride_gh + column * stride_gn + offs_d[None, :]
    tl.store(dk + target, (acc_dk * scale).to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + target, acc_dv.to(dv.dtype.element_ty), mask=stored)


@triton.jit
def accumulate_dq(
    dq,  # [BLOCK_M, BLOCK_D] fp32
    q_tile,  # [BLOCK_M, BLOCK_D]
    do_tile,
    row_lse,  # [BLOCK_M] base 2
    row_delta,  # [BLOCK_M]
    k,  # key 0 of this head
    v,
    padding,  # [kv_len] of this batch row
    position,  # [BLOCK_M]
    first,  # [BLOCK_M]
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
    """Add what keys [begin, end) contribute to dQ of a query tile."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k += begin.to(tl.int64) * stride_kn
    v += begin.to(tl.int64) * stride_vn
    k_offs = offs_n[None, :] * stride_kn + offs_d[:, None]  # [BLOCK_D, BLOCK_N]
    v_offs = offs_n[None, :] * stride_vn + offs_d[:, None]
    lowest = tl.min(position, 0)
    newest = tl.max(first, 0)
    for start_n in range(begin, end, BLOCK_N):
        key = start_n + offs_n  # [BLOCK_N]
        k_tile = load_tile(k + k_offs, offs_d[:, None] < HEAD_DIM, key[None, :] < kv_len, HEAD_DIM, BLOCK_D, MASKED)
        v_tile = load_tile(v + v_offs, offs_d[:, None] < HEAD_DIM, key[None, :] < kv_len, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(scores * qk_scale - row_lse[:, None])
        if MASKED:
            if start_n + BLOCK_N - 1 > lowest:
                p = tl.where(key[None, :] <= position[:, None], p, 0.0)
            if start_n < newest:
                p = tl.where(key[None, :] >= first[:, None], p, 0.0)
        if PADDED:
            real = tl.load(padding + key, mask=key < kv_len, other=0) != 0
            p = tl.where(real[None, :], p, 0.0)
        dp = tl.dot(do_tile, v_tile, input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), tl.trans(k_tile), dq, input_precision="ieee")
        k += BLOCK_N * stride_kn
        v += BLOCK_N * stride_vn
    return dq


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    q,  # (batch, q_heads, q_len, HEAD_DIM)
    k,  # (batch, kv_heads, kv_len, HEAD_DIM)
    v,
    out,  # as q
    dout,
    sinks,  # (q_heads,)
    lse,  # (batch, q_heads, q_len) fp32
    dlse,  # the same, any strides; read if HAS_DLSE
    scratch,  # fp32, written for dK and dV: see scratch_parts
    dq,  # as q
    cu_seqlens,
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
    stride_db,
    stride_dh,
    stride_dm,
    stride_lb,
    stride_lh,
    stride_lm,
    stride_gb,
    stride_gh,
    stride_gm,
    q_heads,
    rows,  # q_len rounded up to whole tiles, so that dK and dV read lse2 and delta without a mask
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,  # as in the forward kernel
    HAS_SINKS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    NOTIFY: tl.constexpr,  # dK/dV's programs may start when no more of these have to
):
    # The order of programs is the forward's: heads fastest, longest rows first.
    if NOTIFY:
        gdc_launch_dependents()
    batch = (tl.program_id(0) * HEADS // q_heads).to(tl.int64)
    head = (tl.program_id(0) * HEADS % q_heads).to(tl.int64)
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * (BLOCK_M // HEADS)

    offs_m, heads = tile_rows(start_m, head, BLOCK_M, HEADS)  # [BLOCK_M]; heads is a number if HEADS is 1
    offs_d = tl.arange(0, BLOCK_D)
    position = tl.minimum(offs_m, q_len - 1) + (kv_len - q_len)  # [BLOCK_M]
    first = first_key(position, cu_seqlens, window, documents, search_steps, HAS_WINDOW, PACKED)  # [BLOCK_M]
    begin, full_begin, full_end, end = split_keys(position, first, kv_len, BLOCK_N)
    if start_m >= q_len:  # past the queries only lse2 and delta are wanted
        full_end, end = full_begin, 0

    row = offs_m.to(tl.int64)
    in_range = offs_m < q_len
    stored = in_range[:, None] & (offs_d[None, :] < HEAD_DIM)
    query = batch * stride_qb + heads * stride_qh + row * stride_qm  # [BLOCK_M]
    q_tile = tl.load(q + query[:, None] + offs_d[None, :], stored, other=0.0)
    query = batch * stride_db + heads * stride_dh + row * stride_dm
    do_tile = tl.load(dout + query[:, None] + offs_d[None, :], stored, other=0.0)
    query = batch * stride_ob + heads * stride_oh + row * stride_om
    o_tile = tl.load(out + query[:, None] + offs_d[None, :], stored, other=0.0)
    line = batch * q_heads + heads
    row_lse = tl.load(lse + line * q_len + offs_m, in_range, other=float("inf"))
    if HAS_SINKS:
        z = tl.load(sinks + heads).to(tl.float32) * LOG2E
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [BLOCK_M]
    if HAS_DLSE:
        dlse += batch * stride_lb + heads * stride_lh
        row_delta -= tl.load(dlse + row * stride_lm, in_range, other=0.0).to(tl.float32)
    lse2, delta, dsinks_partial = scratch_parts(scratch, tl.num_programs(0) * HEADS, rows)
    # lse2 is 0 for a row without keys, inf past q_len; delta is 0 there.
    unseeing = row_lse == float("-inf")
    row_lse = tl.where(unseeing, 0.0, row_lse * LOG2E)
    tl.store(delta + line * rows + offs_m, row_delta)
    tl.store(lse2 + line * rows + offs_m, row_lse)
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    if PADDED:
        padding += batch * kv_len

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if SPLIT:
        if HAS_WINDOW or PACKED:
            acc = accumulate_dq(
                acc, q_tile, do_tile, row_lse, row_delta, k, v, padding, position, first, begin,
                tl.minimum(full_begin, end), kv_len, stride_kn, stride_vn, scale * LOG2E, HEAD_DIM, BLOCK_N, BLOCK_D,
                PADDED, True,
            )  # fmt: skip
        acc = accumulate_dq(
            acc, q_tile, do_tile, row_lse, row_delta, k, v, padding, position, first, full_begin,
            full_end, kv_len, stride_kn, stride_vn, scale * LOG2E, HEAD_DIM, BLOCK_N, BLOCK_D, PADDED, False,
        )  # fmt: skip
        begin = full_end
    acc = accumulate_dq(
        acc, q_tile, do_tile, row_lse, row_delta, k, v, padding, position, first, begin,
        end, kv_len, stride_kn, stride_vn, scale * LOG2E, HEAD_DIM, BLOCK_N, BLOCK_D, PADDED, True,
    )  # fmt: skip
    query = batch * stride_gb + heads * stride_gh + row * stride_gm
    tl.store(dq + query[:, None] + offs_d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=stored)
    if HAS_SINKS:
        # lse = -inf only where z is -inf too: a sink that is switched off has no gradient.
        p_sink = tl.where(unseeing, 0.0, tl.exp2(z - row_lse))
        shares = tl.sum(tl.reshape(-p_sink * row_delta, [HEADS, BLOCK_M // HEADS]), 1)  # [HEADS]
        line = batch * q_heads + head + tl.arange(0, HEADS)
        tl.store(dsinks_partial + line * tl.num_programs(1) + tl.program_id(1), shares)


def launch_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: torch.Tensor | None,
    padding: torch.Tensor | None,
    interpreted: bool,
) -> torch.Tensor | None:
    """Fill dq, dk, dv (shapes of q, k, v; dk and dv with the same strides); return the sinks' gradient, if any."""
    tensors = dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, cu_seqlens, padding

    key = (
        signature(q, k, v, sinks, scale, window, cu_seqlens, padding), gradient_signature(dout, dlse, out),
        dq.stride(), dk.stride(),
    )  # fmt: skip
    launch = remembered(_prepared, key, lambda: prepare_backward(*tensors, scale, window, interpreted), interpreted)
    return launch(*tensors)


_prepared: dict[tuple, Callable] = {}


def gradient_signature(dout, dlse, out) -> tuple:
    """What decides, beside the forward pass's signature, how gradients are computed."""
    given = None if dlse is None else (dlse.dtype, dlse.stride())
    return dout.get_device(), dout.stride(), given, out.stride(), (dout.data_ptr() | out.data_ptr()) & 15


def prepare_backward(
    dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, cu_seqlens, padding, scale, window, interpreted
) -> Callable:
    """What launches the kernels on tensors like these, called with them (dout to padding); it returns the sinks'
    gradient, if any."""
    check_lane(interpreted)
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    group = q_heads // kv_heads
    # A multiple of every block_m, so that each program of dQ, and each tile of dK and dV, is whole.
    rows = triton.cdiv(q_len, tiles.LARGEST_BLOCK) * tiles.LARGEST_BLOCK
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    ends = (q_len, kv_len, window or 0, documents, documents.bit_length(), scale)

    def constants(tile, **more) -> dict:
        return dict(
            GROUP=group, HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(head_dim), **more, HAS_WINDOW=window is not None,
            PACKED=cu_seqlens is not None, PADDED=padding is not None, SPLIT=splits(window),
        )  # fmt: skip

    def dq_with(tile) -> tuple[Prepared, int]:
        """The launch of dQ, and the number of row blocks whose shares of the sinks' gradient it leaves."""
        heads = tile.heads_of(group)
        numbers = (
            *inputs, *out.stride()[:3], *dout.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride()),
            *dq.stride()[:3], q_heads, rows, *ends,
        )  # fmt: skip
        made = constants(tile, HEADS=heads, HAS_SINKS=sinks is not None, HAS_DLSE=dlse is not None)
        made |= dict(NOTIFY=hopper is not None)
        blocks = rows * heads // tile.block_m
        return Prepared(dq_kernel, (batch * q_heads // heads, blocks), numbers, made, **tile.options), blocks

    def dkdv_with(tile, blocks: int) -> Prepared:
        numbers = (*inputs, *dout.stride()[:3], *dk.stride()[:3], kv_heads, batch, blocks, rows, *ends)
        made = constants(tile, EVEN_ROWS=q_len % tile.block_m == 0, HAS_SINKS=sinks is not None)
        grid = (batch * kv_heads, triton.cdiv(kv_len, tile.block_n))
        return Prepared(dkdv_kernel, grid, numbers, made, **tile.options)

    def select(kernel: str, attempt: Callable) -> tiles.Tile:
        return tiles.select(kernel, q, not splits(window), interpreted, attempt)

    def run_with(launch_dq, blocks: int, launch_dkdv) -> Callable:
        def run(dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, cu_seqlens, padding):
            size = batch * q_heads * (2 * rows + blocks)
            scratch = torch.empty_strided((size,), (1,), dtype=torch.float32, device=lse.device)
            dsinks = None if sinks is None else torch.empty_like(sinks)
            launch_dq(q, k, v, out, dout, sinks, lse, dlse, scratch, dq, cu_seqlens, padding)
            launch_dkdv(q, k, v, dout, scratch, dk, dv, dsinks, cu_seqlens, padding)
            return dsinks

        return run

    def nothing(*tensors) -> None:
        pass

    tensors = dout, dlse, q, k, v, sinks, out, lse, dq, dk, dv, cu_seqlens, padding
    # Short windows leave a Hopper program too little to overlap in dQ (see benchmarks/NOTES.md).
    hopper = None if interpreted else tiles.hopper_kernels(q, k, v, dout, out)
    if hopper is not None and splits(window):
        launch_dq, blocks = hopper.prepare_dq(
            dout, dlse, q, k, v, sinks, out, dq, rows, scale, window, cu_seqlens, padding
        )
    else:
        tile = select("dq", lambda tile: run_with(*dq_with(tile), nothing)(*tensors))
        launch_dq, blocks = dq_with(tile)
    if hopper is not None:
        launch_dkdv = hopper.prepare_dkdv(dout, q, k, v, sinks, dk, rows, blocks, scale, window, cu_seqlens, padding)
    else:
        tile = select("dkdv", lambda tile: run_with(launch_dq, blocks, dkdv_with(tile, blocks))(*tensors))
        launch_dkdv = dkdv_with(tile, blocks)
    return run_with(launch_dq, blocks, launch_dkdv)
