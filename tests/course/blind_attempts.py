"""Wrong attempts at the exercises, written by someone who had seen the notebooks and not their checkers."""

import math

import torch
import triton
import triton.language as tl

from gptoss_kernels import flash_attention
from gptoss_kernels.attention.backward import launch_backward
from gptoss_kernels.lane import interpreting

# ---------------------------------------------------------------- chapter 00


def sink_share__1(scores, sink):
    return torch.sigmoid(scores.logsumexp(-1) - sink)


def sink_share__2(scores, sink):
    maximum = torch.maximum(scores.max(), sink)
    of_sink = torch.exp(sink - maximum)
    return of_sink / (of_sink + torch.exp(scores - maximum).sum(-1))


def sink_share__3(scores, sink):
    maximum = scores.amax(-1)  # (...)
    of_sink = torch.exp(sink - maximum)
    return of_sink / (of_sink + torch.exp(scores - maximum[..., None]).sum(-1))


# ---------------------------------------------------------------- chapter 01


def softmax_with_sink__1(scores, sink):
    maximum = scores.amax(-1).clamp_min(0)  # never -inf - (-inf)
    terms = torch.exp(scores - maximum[..., None])
    normaliser = torch.exp(sink - maximum) + terms.sum(-1)
    return terms / normaliser[..., None], maximum + normaliser.log()


def softmax_with_sink__2(scores, sink):
    maximum = torch.maximum(scores.amax(-1), sink)
    terms = torch.exp(scores - maximum[..., None])
    normaliser = torch.exp(sink - maximum) + terms.sum(-1)
    return terms / normaliser[..., None], torch.logsumexp(scores, dim=-1)


def softmax_with_sink__3(scores, sink):
    maximum = torch.maximum(scores.amax(-1), sink)
    terms = torch.exp(scores - maximum[..., None])
    normaliser = torch.exp(sink) + terms.sum(-1)
    return terms / normaliser[..., None], maximum + normaliser.log()


def add_sink__1(out, lse, sinks):
    z = sinks[:, None]
    return out * torch.sigmoid(z - lse)[..., None], torch.logaddexp(lse, z)


def add_sink__2(out, lse, sinks):
    z = sinks[:, None]
    lse = torch.logaddexp(lse, z)
    return out * torch.sigmoid(lse - z)[..., None], lse


def add_sink__3(out, lse, sinks):
    keep = torch.sigmoid(lse - sinks[:, None])
    return out * keep[..., None], lse


def window_mask__1(q_len, kv_len, sliding_window=None):
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    distance = position - torch.arange(kv_len)[None, :]
    mask = distance >= 0
    if sliding_window is not None:
        mask &= distance <= sliding_window
    return mask


def window_mask__2(q_len, kv_len, sliding_window=None):
    distance = torch.arange(q_len)[:, None] - torch.arange(kv_len)[None, :]
    mask = distance >= 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    return mask


def window_mask__3(q_len, kv_len, sliding_window=None):
    window = q_len if sliding_window is None else sliding_window
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    distance = position - torch.arange(kv_len)[None, :]
    return (distance >= 0) & (distance < window)


def eager_bytes__1(tokens, q_heads, itemsize):
    matrix = q_heads * tokens**2 * itemsize
    return 2 * matrix, matrix


def eager_bytes__2(tokens, q_heads, itemsize):
    matrix = q_heads * tokens**2 * itemsize
    return 3 * matrix, 2 * matrix


def eager_bytes__3(tokens, q_heads, itemsize):
    elements = q_heads * tokens**2
    return elements * (2 * itemsize + 4), elements * 4


# ---------------------------------------------------------------- chapter 02

_02_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def reverse_kernel__1(x, out, numel, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * BLOCK + lane
    source = tl.program_id(0) * BLOCK + BLOCK - 1 - lane
    tile = tl.load(x + source, mask=source < numel, other=0.0)
    tl.store(out + offsets, tile, mask=offsets < numel)


@triton.jit
def reverse_kernel__2(x, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    tl.store(out + offsets, tl.load(x + numel - offsets, mask=mask), mask=mask)


@triton.jit
def reverse_kernel__3(x, out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = numel - 1 - offsets
    mask = source > 0
    tl.store(out + offsets, tl.load(x + source, mask=mask), mask=mask)


def eager_softmax_bytes__1(rows, columns, itemsize):
    return 8 * rows * columns * itemsize


def eager_softmax_bytes__2(rows, columns, itemsize):
    matrix, vector = rows * columns, rows
    return (8 * matrix + 2 * vector) * itemsize  # maximum and normaliser are written once each


def eager_softmax_bytes__3(rows, columns, itemsize):
    matrix, vector = rows * columns, columns
    return (8 * matrix + 4 * vector) * itemsize


@triton.jit
def scale_rows_kernel__1(
    x, scale, out, stride_xm, stride_xn, stride_om, stride_on, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
    tile = tl.load(x + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    factor = tl.load(scale + offs_m, mask=offs_m < rows)
    tl.store(out + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, tile * factor[:, None], mask=mask)


@triton.jit
def scale_rows_kernel__2(
    x, scale, out, stride_xm, stride_xn, stride_om, stride_on, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
    offsets = offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
    tile = tl.load(x + offsets, mask=mask)
    factor = tl.load(scale + offs_m, mask=offs_m < rows)
    tl.store(out + offsets, tile * factor[:, None], mask=mask)


@triton.jit
def scale_rows_kernel__3(
    x, scale, out, stride_xm, stride_xn, stride_om, stride_on, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
    tile = tl.load(x + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    factor = tl.load(scale + offs_m, mask=offs_m < columns, other=0.0)
    tl.store(out + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, tile * factor[:, None], mask=mask)


@triton.jit
def sink_softmax_kernel__1(
    scores, sinks, out, stride_sh, stride_sm, stride_sn, stride_oh, stride_om, stride_on, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    scores += head * stride_sh + row * stride_sm
    out += head * stride_oh + row * stride_om
    z = tl.load(sinks + head).to(tl.float32)
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, s)
    maximum = tl.maximum(tl.max(largest, axis=0), z)
    partial = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        partial += tl.exp2((s - maximum) * _02_LOG2E)
    normaliser = tl.exp2(z - maximum) + tl.sum(partial, axis=0)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        p = tl.exp2((s - maximum) * _02_LOG2E) / normaliser
        tl.store(out + offsets * stride_on, p.to(out.dtype.element_ty), mask=offsets < columns)


@triton.jit
def sink_softmax_kernel__2(
    scores, sinks, out, stride_sh, stride_sm, stride_sn, stride_oh, stride_om, stride_on, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    scores += head * stride_sh + row * stride_sm
    out += head * stride_oh + row * stride_om
    z = tl.load(sinks + head).to(tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, s)
    maximum = tl.maximum(tl.max(largest, axis=0), z)
    partial = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        partial += tl.exp2((s - maximum) * _02_LOG2E)
    normaliser = tl.exp2((z - maximum) * _02_LOG2E) + tl.sum(partial, axis=0)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        p = tl.exp2((s - maximum) * _02_LOG2E) / normaliser
        tl.store(out + offsets * stride_on, p.to(out.dtype.element_ty), mask=offsets < columns)


@triton.jit
def sink_softmax_kernel__3(
    scores, sinks, out, stride_sh, stride_sm, stride_sn, stride_oh, stride_om, stride_on, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    scores += head * stride_sh + row * stride_sm
    out += head * stride_oh + row * stride_om
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, s)
    maximum = tl.max(largest, axis=0)
    partial = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        partial += tl.exp2((s - maximum) * _02_LOG2E)
    z = tl.load(sinks + head).to(tl.float32)
    normaliser = tl.exp2((z - maximum) * _02_LOG2E) + tl.sum(partial, axis=0)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        p = tl.exp2((s - maximum) * _02_LOG2E) / normaliser
        tl.store(out + offsets * stride_on, p.to(out.dtype.element_ty), mask=offsets < columns)


# ---------------------------------------------------------------- chapter 03


def expected_rescales__1(keys):
    return float(sum(1 / j for j in range(1, keys + 1)))


def expected_rescales__2(keys):
    return math.log(keys)


def expected_rescales__3(keys):
    return float(sum(1 / j for j in range(2, keys)))


def online_update__1(acc, running_max, running_sum, scores, v_tile):
    new_max = torch.maximum(running_max, scores.amax(dim=-1))
    rescale = torch.exp(running_max - new_max)
    p = torch.exp(scores - new_max[..., None])
    return acc + p @ v_tile, new_max, running_sum * rescale + p.sum(dim=-1)


def online_update__2(acc, running_max, running_sum, scores, v_tile):
    new_max = scores.amax(dim=-1)
    rescale = torch.exp(running_max - new_max)
    p = torch.exp(scores - new_max[..., None])
    return acc * rescale[..., None] + p @ v_tile, new_max, running_sum * rescale + p.sum(dim=-1)


def online_update__3(acc, running_max, running_sum, scores, v_tile):
    new_max = torch.maximum(running_max, scores.amax(dim=-1))
    rescale = torch.exp(running_max - new_max)
    p = torch.exp(scores - new_max[..., None])
    running_sum = running_sum * rescale + p.sum(dim=-1)
    acc = acc * rescale[..., None] + p @ v_tile
    return acc, running_max, running_sum


def merge_states__1(first, second):
    (acc_1, max_1, sum_1), (acc_2, max_2, sum_2) = first, second
    new_max = torch.maximum(max_1, max_2)
    rescale = torch.exp(max_1 - new_max)
    return acc_1 * rescale[..., None] + acc_2, new_max, sum_1 * rescale + sum_2


def merge_states__2(first, second):
    (acc_1, max_1, sum_1), (acc_2, max_2, sum_2) = first, second
    rescale = torch.exp(max_1 - max_2)  # to the exponent of the second
    return acc_1 * rescale[..., None] + acc_2, max_2, sum_1 * rescale + sum_2


def merge_states__3(first, second):
    (acc_1, max_1, sum_1), (acc_2, max_2, sum_2) = first, second
    if (sum_1 == 0).any():
        return second
    if (sum_2 == 0).any():
        return first
    new_max = torch.maximum(max_1, max_2)
    r_1, r_2 = torch.exp(max_1 - new_max), torch.exp(max_2 - new_max)
    return acc_1 * r_1[..., None] + acc_2 * r_2[..., None], new_max, sum_1 * r_1 + sum_2 * r_2


def recover_probabilities__1(q, k, lse, scale):
    scores = q @ k.mT * scale
    future = ~torch.ones_like(scores, dtype=torch.bool).tril()
    return torch.exp(scores - lse[:, None]).masked_fill(future, 0.0)


def recover_probabilities__2(q, k, lse, scale):
    scores = q @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool).tril(len(k) - len(q))
    return torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)


def recover_probabilities__3(q, k, lse, scale):
    scores = (q @ k.mT * scale).tril(len(k) - len(q))
    return torch.exp(scores - lse[:, None])


# ---------------------------------------------------------------- chapter 04 (online_update: 4 to 6)


@triton.jit
def online_update__4(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    rescale = tl.exp(running_max - new_max)
    p = tl.exp(scores - new_max[:, None])
    running_sum = running_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum


@triton.jit
def online_update__5(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    rescale = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    running_sum += tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum


@triton.jit
def online_update__6(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.max(scores, 1)
    rescale = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum


def key_range__1(start_m, block_m, block_n, q_len, kv_len, window):
    end = min(start_m + block_m, q_len) + kv_len - q_len
    return max(end - window, 0) // block_n * block_n, end


def key_range__2(start_m, block_m, block_n, q_len, kv_len, window):
    offset = kv_len - q_len
    end = min(start_m + block_m, q_len) + offset
    return max(start_m + offset - window, 0) // block_n * block_n, end


def key_range__3(start_m, block_m, block_n, q_len, kv_len, window):
    first = start_m + kv_len - q_len
    return max(first - window + 1, 0) // block_n * block_n, first + block_m


def tiles_in_window__1(block_m, block_n, window):
    return block_m // block_n + math.ceil(window / block_n)


def tiles_in_window__2(block_m, block_n, window):
    return (block_m + window - 1) // block_n


def tiles_in_window__3(block_m, block_n, window):
    return 1 + math.ceil((window - 1) / block_n)


def document_starts__1(cu_seqlens, tokens):
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token) - 1
    return cu_seqlens[document.clamp_min(0)]


def document_starts__2(cu_seqlens, tokens):
    begins = cu_seqlens[:-1].long()
    starts = torch.zeros(tokens, dtype=torch.long, device=cu_seqlens.device)
    starts[begins] = begins
    return starts.cummax(0).values


def document_starts__3(cu_seqlens, tokens):
    documents = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    return documents.repeat_interleave(cu_seqlens.diff())


# ---------------------------------------------------------------- chapter 05


def _05_masked_scores(q, k, scale, window=None):
    position = torch.arange(len(q), device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (distance < (window or len(q)))
    return (q @ k.T * scale).masked_fill(~seen, float("-inf"))


def softmax_backward_with_sink__1(p, dp):
    return p * dp - (p * dp).sum(-1, keepdim=True)


def softmax_backward_with_sink__2(p, dp):
    delta = (p * dp).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)  # the weighted mean of dp
    return p * (dp - delta)


def softmax_backward_with_sink__3(p, dp):
    delta = (p * dp).sum(1, keepdim=True)
    return p * (dp - delta)


def sink_gradient__1(out, dout, lse, sinks):
    delta = (out * dout).sum(-1)
    return (torch.exp(sinks[None, :, None] - lse) * delta).sum((0, 2))


def sink_gradient__2(out, dout, lse, sinks):
    delta = (out * dout).sum(-1)
    return -(torch.exp(sinks[None, :, None] - lse) * delta).mean(0).sum(-1)


def sink_gradient__3(out, dout, lse, sinks):
    delta = (out * dout).sum(-1)
    return -(torch.sigmoid(sinks[None, :, None] - lse) * delta).sum((0, 2))


def delta_with_lse__1(out, dout, dlse):
    return (out * dout).sum(-1) + dlse


def delta_with_lse__2(out, dout, dlse):
    return (out * dout - dlse[..., None]).sum(-1)


def delta_with_lse__3(out, dout, dlse):
    return (out * dout).sum(-1, keepdim=True) - dlse


def attention_backward__1(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
    p = torch.exp(_05_masked_scores(q, k, scale, window) - lse[:, None])
    delta = (dout * out).sum(-1) - dlse
    dv = p.T @ dout
    ds = p * (dout @ v.T - delta[:, None]) * scale
    return scale * ds @ k, scale * ds.T @ q, dv, -(torch.exp(sink - lse) * delta).sum()


def attention_backward__2(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
    p = torch.exp(_05_masked_scores(q, k, scale, window) - lse[:, None])
    delta = (dout * out).sum(-1)
    dv = p.T @ dout
    ds = p * (dout @ v.T - delta[:, None] + dlse[:, None])
    return scale * ds @ k, scale * ds.T @ q, dv, -(torch.exp(sink - lse) * delta).sum()


def attention_backward__3(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
    p = torch.exp(_05_masked_scores(q, k, scale) - lse[:, None])
    delta = (dout * out).sum(-1) - dlse
    dv = p.T @ dout
    ds = p * (dout @ v.T - delta[:, None])
    return scale * ds @ k, scale * ds.T @ q, dv, -(torch.exp(sink - lse) * delta).sum()


# ---------------------------------------------------------------- chapter 06


@triton.jit
def dq_causal_kernel__1(
    q, k, v, dout, lse, delta, dq, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64) * length
    dim = tl.arange(0, HEAD_DIM)[None, :]
    row = start_m + tl.arange(0, BLOCK_M)
    own = (head + row)[:, None] * HEAD_DIM + dim
    q_tile = tl.load(q + own)
    do_tile = tl.load(dout + own)
    row_lse = tl.load(lse + head + row)
    row_delta = tl.load(delta + head + row)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for start_n in range(0, start_m + BLOCK_M, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        there = (head + key)[:, None] * HEAD_DIM + dim
        k_tile = tl.load(k + there)
        v_tile = tl.load(v + there)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.exp(scores - row_lse[:, None])
        p = tl.where(row[:, None] >= key[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    tl.store(dq + own, acc.to(dq.dtype.element_ty))


@triton.jit
def dq_causal_kernel__2(
    q, k, v, dout, lse, delta, dq, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64) * length
    dim = tl.arange(0, HEAD_DIM)[None, :]
    row = start_m + tl.arange(0, BLOCK_M)
    own = (head + row)[:, None] * HEAD_DIM + dim
    q_tile = tl.load(q + own)
    do_tile = tl.load(dout + own)
    row_lse = tl.load(lse + head + row)
    row_delta = tl.load(delta + head + row)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    for start_n in range(0, diagonal + BLOCK_N, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        there = (head + key)[:, None] * HEAD_DIM + dim
        k_tile = tl.load(k + there)
        v_tile = tl.load(v + there)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.exp(scores - row_lse[:, None])
        p = tl.where(row[:, None] >= key[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    tl.store(dq + own, (acc * scale).to(dq.dtype.element_ty))


@triton.jit
def dq_causal_kernel__3(
    q, k, v, dout, lse, delta, dq, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64) * length
    dim = tl.arange(0, HEAD_DIM)[None, :]
    row = start_m + tl.arange(0, BLOCK_M)
    own = (head + row)[:, None] * HEAD_DIM + dim
    q_tile = tl.load(q + own)
    do_tile = tl.load(dout + own)
    row_lse = tl.load(lse + head + row)
    row_delta = tl.load(delta + head + row)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for start_n in range(0, start_m + BLOCK_M, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        there = (head + key)[:, None] * HEAD_DIM + dim
        k_tile = tl.load(k + there)
        v_tile = tl.load(v + there)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.exp(scores - row_lse[:, None])
        p = tl.where(row[:, None] > key[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    tl.store(dq + own, (acc * scale).to(dq.dtype.element_ty))


def query_range__1(start_n, block_m, block_n, q_len, kv_len, sliding_window=None):
    offset = kv_len - q_len
    begin = max(start_n - offset, 0) // block_m * block_m
    end = q_len if sliding_window is None else min(q_len, start_n + sliding_window - offset)
    return begin, end


def query_range__2(start_n, block_m, block_n, q_len, kv_len, sliding_window=None):
    offset = kv_len - q_len
    begin = max(start_n - offset, 0) // block_m * block_m
    end = q_len if sliding_window is None else min(q_len, start_n + block_n + sliding_window - offset)
    return begin, end


def query_range__3(start_n, block_m, block_n, q_len, kv_len, sliding_window=None):
    offset = kv_len - q_len
    begin = (start_n - offset) // block_m * block_m
    end = q_len if sliding_window is None else min(q_len, start_n + block_n - 1 + sliding_window - offset)
    return begin, end


def empty_gradients__1(k, v):
    return torch.empty_like(k), torch.empty_like(v)


def empty_gradients__2(k, v):
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    return dk, torch.empty_like(dk)


def empty_gradients__3(k, v):
    dk = dv = k.new_empty(k.shape)
    return dk, dv


# ---------------------------------------------------------------- chapter 07 (attention_backward: 4 to 6)


def _07_empty_heads_last(x):
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _07_run_backward(dout, q, k, v, sinks, out, lse, scale, window):
    dq, dk, dv = _07_empty_heads_last(q), _07_empty_heads_last(k), _07_empty_heads_last(v)
    dsinks = launch_backward(
        dout, None, q, k, v, sinks, out, lse, dq, dk, dv, scale, window, None, None, interpreting()
    )
    return dq, dk, dv, dsinks.to(sinks.dtype)


_07_REGISTERS_PER_SM = 65536
_07_SHARED_PER_SM = 228 * 1024
_07_WARPS_PER_SM = 64


def attention_backward__4(ctx, dout, dlse):
    dout = dout.clone()  # a tensor of its own, no view
    return *_07_run_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.window), None, None


def attention_backward__5(ctx, dout, dlse):
    return _07_run_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.window)


def attention_backward__6(ctx, dout, dlse):
    q, k, v, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = _07_run_backward(dout.contiguous(), q, k, v, sinks, out, lse, ctx.scale, None)
    return dq, dk, dv, dsinks, None, None


def attention_forward_fake__1(q, k, v, sinks, scale, window):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_forward_fake__2(q, k, v, sinks, scale, window):
    return _07_empty_heads_last(q), q.new_empty(q.shape[:3])


def attention_forward_fake__3(q, k, v, sinks, scale, window):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_flops__1(tokens, heads, head_dim, window=None, backward=False):
    if window is None or window >= tokens:
        pairs = tokens**2 // 2
    else:
        pairs = tokens * window - window * (window - 1) // 2
    return (5 if backward else 2) * 2 * head_dim * heads * pairs


def attention_flops__2(tokens, heads, head_dim, window=None, backward=False):
    w = tokens if window is None else min(window, tokens)
    pairs = tokens * w - w * (w - 1) // 2
    return (7 if backward else 2) * 2 * head_dim * heads * pairs


def attention_flops__3(tokens, heads, head_dim, window=None, backward=False):
    w = tokens if window is None else window
    pairs = tokens * w - w * (w - 1) // 2
    return (5 if backward else 2) * 2 * head_dim * heads * pairs


def blocks_per_sm__1(registers, shared, num_warps):
    of_block = math.ceil(32 * registers * num_warps / 256) * 256
    return min(_07_REGISTERS_PER_SM // of_block, _07_SHARED_PER_SM // (shared + 1024), _07_WARPS_PER_SM // num_warps)


def blocks_per_sm__2(registers, shared, num_warps):
    of_warp = math.ceil(32 * registers / 256) * 256
    limits = [_07_REGISTERS_PER_SM // (of_warp * num_warps), _07_WARPS_PER_SM // num_warps]
    if shared > 0:
        limits.append(_07_SHARED_PER_SM // shared)
    return min(limits)


def blocks_per_sm__3(registers, shared, num_warps):
    of_warp = math.ceil(32 * registers / 256) * 256
    return min(_07_REGISTERS_PER_SM // (of_warp * num_warps), _07_SHARED_PER_SM // (shared + 1024))


# ---------------------------------------------------------------- chapter 08


def attention_adapter__1(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0,
    *, sliding_window=None, s_aux=None, cu_seqlens=None, **kwargs,
):  # fmt: skip
    if dropout != 0:
        raise ValueError("the kernels have no dropout")
    out = flash_attention(
        query, key, value, s_aux, scale=scaling, sliding_window=sliding_window, cu_seqlens=cu_seqlens,
        key_padding_mask=attention_mask,
    )  # fmt: skip
    batch, q_heads, q_len, head_dim = query.shape
    return out.reshape(batch, q_len, q_heads, head_dim), None


def attention_adapter__2(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0,
    *, sliding_window=None, s_aux=None, cu_seqlens=None, **kwargs,
):  # fmt: skip
    if module.training and dropout > 0:
        raise ValueError("the kernels have no dropout")
    out = flash_attention(
        query, key, value, s_aux, scale=scaling, sliding_window=sliding_window, cu_seqlens=cu_seqlens,
        key_padding_mask=attention_mask,
    )  # fmt: skip
    return out.transpose(1, 2), None


def attention_adapter__3(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0,
    *, sliding_window=None, s_aux=None, cu_seqlens=None, **kwargs,
):  # fmt: skip
    if dropout:
        raise ValueError("the kernels have no dropout")
    out = flash_attention(
        query, key, value, s_aux, sliding_window=sliding_window, cu_seqlens=cu_seqlens,
        key_padding_mask=attention_mask,
    )  # fmt: skip
    return out.transpose(1, 2), None


def layer_padding__1(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
    return None if attention_mask is None else attention_mask[:, :kv_length]


def layer_padding__2(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
    return None if attention_mask is None else attention_mask[:, q_offset : q_offset + kv_length]


def layer_padding__3(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
    return None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + q_length]


def influence__1(run, embeddings, first):
    leaf = embeddings.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf)[:, first:].sum(), leaf)
    return gradient[0, :first].norm(dim=-1)


def influence__2(run, embeddings, first):
    leaf = embeddings.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    return gradient[0, :first].norm(dim=-1)


def influence__3(run, embeddings, first):
    leaf = embeddings.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf)[:, first:].square().sum(), leaf)
    return gradient[0, :first].sum(-1).abs()


def cu_seqlens_from_positions__1(position_ids):
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)


def cu_seqlens_from_positions__2(position_ids):
    starts = (position_ids[0].diff() < 0).nonzero().flatten() + 1
    ends = starts.new_tensor([position_ids.shape[1]])
    return torch.cat([starts.new_zeros(1), starts, ends]).to(torch.int32)


def cu_seqlens_from_positions__3(position_ids):
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_tensor([position_ids.shape[1]])])


ATTEMPTS = [
    (0, "sink_share", sink_share__1, "the keys' share, not the sink's: sign inside the sigmoid"),
    (0, "sink_share", sink_share__2, "one maximum for all rows: 0 / 0 in rows far below it"),
    (0, "sink_share", sink_share__3, "the sink is not in the maximum: overflows when it is far above the scores"),
    (1, "softmax_with_sink", softmax_with_sink__1, "maximum of the scores and 0 instead of the sink"),
    (1, "softmax_with_sink", softmax_with_sink__2, "lse of the keys alone"),
    (1, "softmax_with_sink", softmax_with_sink__3, "the sink's term is not shifted by the maximum"),
    (1, "add_sink", add_sink__1, "scales by the sink's share instead of the keys'"),
    (1, "add_sink", add_sink__2, "takes the factor from the new lse, sink already in it"),
    (1, "add_sink", add_sink__3, "returns lse without the sink"),
    (1, "window_mask", window_mask__1, "window as a reach: one key too many"),
    (1, "window_mask", window_mask__2, "queries stand at the first keys instead of the last"),
    (1, "window_mask", window_mask__3, "without a window only q_len keys are seen"),
    (1, "eager_bytes", eager_bytes__1, "peak of two: attn_weights taken for freed"),
    (1, "eager_bytes", eager_bytes__2, "keeps two: the softmax and its slice counted as separate"),
    (1, "eager_bytes", eager_bytes__3, "softmax taken to be in fp32"),
    (2, "reverse_kernel", reverse_kernel__1, "reverses within each block only"),
    (2, "reverse_kernel", reverse_kernel__2, "off by one: x[numel - i]"),
    (2, "reverse_kernel", reverse_kernel__3, "mask source > 0: the last element is never written"),
    (2, "eager_softmax_bytes", eager_softmax_bytes__1, "vectors not counted"),
    (2, "eager_softmax_bytes", eager_softmax_bytes__2, "vectors written counted, vectors read not"),
    (2, "eager_softmax_bytes", eager_softmax_bytes__3, "vectors as long as columns"),
    (2, "scale_rows_kernel", scale_rows_kernel__1, "program axes swapped"),
    (2, "scale_rows_kernel", scale_rows_kernel__2, "x's strides used for out"),
    (2, "scale_rows_kernel", scale_rows_kernel__3, "scale masked by columns: rows beyond get 0"),
    (2, "sink_softmax_kernel", sink_softmax_kernel__1, "sink's term without log2(e)"),
    (2, "sink_softmax_kernel", sink_softmax_kernel__2, "maxima begin at 0: all very low scores underflow"),
    (2, "sink_softmax_kernel", sink_softmax_kernel__3, "sink in the normaliser but not in the maximum"),
    (3, "expected_rescales", expected_rescales__1, "counts the first key"),
    (3, "expected_rescales", expected_rescales__2, "log(keys) instead of the harmonic sum"),
    (3, "expected_rescales", expected_rescales__3, "leaves the last key out"),
    (3, "online_update", online_update__1, "acc is not rescaled"),
    (3, "online_update", online_update__2, "the tile's own maximum: NaN in a masked row"),
    (3, "online_update", online_update__3, "returns the old maximum"),
    (3, "merge_states", merge_states__1, "rescales the first state only"),
    (3, "merge_states", merge_states__2, "always the second's maximum: overflows, NaN if it is empty"),
    (3, "merge_states", merge_states__3, "one empty row throws the whole state away"),
    (3, "recover_probabilities", recover_probabilities__1, "causal mask without the offset kv_len - q_len"),
    (3, "recover_probabilities", recover_probabilities__2, "softmax anew: ignores lse and with it the sink"),
    (3, "recover_probabilities", recover_probabilities__3, "masked scores are 0, so masked probabilities are not"),
    (4, "online_update", online_update__4, "exp for scores in base 2"),
    (4, "online_update", online_update__5, "running_sum is not rescaled"),
    (4, "online_update", online_update__6, "the tile's own maximum: NaN where all of it is masked"),
    (4, "key_range", key_range__1, "begins with the last row's oldest key"),
    (4, "key_range", key_range__2, "window one too long: an extra tile at an edge"),
    (4, "key_range", key_range__3, "end is not cut at kv_len"),
    (4, "tiles_in_window", tiles_in_window__1, "counts the first query's own key twice"),
    (4, "tiles_in_window", tiles_in_window__2, "rounds down"),
    (4, "tiles_in_window", tiles_in_window__3, "a tile of block_n queries instead of block_m"),
    (4, "document_starts", document_starts__1, "a document's first token belongs to the document before"),
    (4, "document_starts", document_starts__2, "returns int64"),
    (4, "document_starts", document_starts__3, "numbers of documents instead of their starts"),
    (5, "softmax_backward_with_sink", softmax_backward_with_sink__1, "delta is not multiplied by p"),
    (5, "softmax_backward_with_sink", softmax_backward_with_sink__2, "delta normalised by the sum of p"),
    (5, "softmax_backward_with_sink", softmax_backward_with_sink__3, "sums over axis 1 instead of the last"),
    (5, "sink_gradient", sink_gradient__1, "sign"),
    (5, "sink_gradient", sink_gradient__2, "mean over the batch"),
    (5, "sink_gradient", sink_gradient__3, "sigmoid of z - lse, although lse has the sink in it"),
    (5, "delta_with_lse", delta_with_lse__1, "sign of dlse"),
    (5, "delta_with_lse", delta_with_lse__2, "subtracts dlse head_dim times"),
    (5, "delta_with_lse", delta_with_lse__3, "keepdim: (..., queries, queries) comes out"),
    (5, "attention_backward", attention_backward__1, "scale applied twice"),
    (5, "attention_backward", attention_backward__2, "the sink's gradient forgets dlse"),
    (5, "attention_backward", attention_backward__3, "window ignored"),
    (6, "dq_causal_kernel", dq_causal_kernel__1, "scale forgotten"),
    (6, "dq_causal_kernel", dq_causal_kernel__2, "one diagonal tile only, although BLOCK_M may exceed BLOCK_N"),
    (6, "dq_causal_kernel", dq_causal_kernel__3, "mask leaves out the query's own key"),
    (6, "query_range", query_range__1, "end from the tile's first key"),
    (6, "query_range", query_range__2, "end one row too far"),
    (6, "query_range", query_range__3, "begin negative where the tile lies before all queries"),
    (6, "empty_gradients", empty_gradients__1, "keeps the strides of k and v"),
    (6, "empty_gradients", empty_gradients__2, "dv with k's dtype"),
    (6, "empty_gradients", empty_gradients__3, "dk and dv are one tensor"),
    (7, "attention_backward", attention_backward__4, "clone keeps the strides of a transposed dout"),
    (7, "attention_backward", attention_backward__5, "four values: none for scale and window"),
    (7, "attention_backward", attention_backward__6, "window not handed on"),
    (7, "attention_forward_fake", attention_forward_fake__1, "empty_like keeps q's strides"),
    (7, "attention_forward_fake", attention_forward_fake__2, "lse in q's dtype"),
    (7, "attention_forward_fake", attention_forward_fake__3, "out contiguous in (batch, heads, length, head_dim)"),
    (7, "attention_flops", attention_flops__1, "half the square for a full layer, without half the diagonal"),
    (7, "attention_flops", attention_flops__2, "seven products in backward"),
    (7, "attention_flops", attention_flops__3, "window not cut at the number of tokens"),
    (7, "blocks_per_sm", blocks_per_sm__1, "registers rounded per block instead of per warp"),
    (7, "blocks_per_sm", blocks_per_sm__2, "forgets the 1 KiB that each block costs"),
    (7, "blocks_per_sm", blocks_per_sm__3, "forgets the limit of 64 warps"),
    (8, "attention_adapter", attention_adapter__1, "reshape instead of transpose"),
    (8, "attention_adapter", attention_adapter__2, "accepts dropout outside of training"),
    (8, "attention_adapter", attention_adapter__3, "scaling not handed on"),
    (8, "layer_padding", layer_padding__1, "first columns: kv_offset ignored"),
    (8, "layer_padding", layer_padding__2, "q_offset for kv_offset"),
    (8, "layer_padding", layer_padding__3, "q_length for kv_length"),
    (8, "influence", influence__1, "plain sum, constant where outputs sum to a constant"),
    (8, "influence", influence__2, "outputs of document 1 count too"),
    (8, "influence", influence__3, "sum of the gradient instead of its norm: it can cancel"),
    (8, "cu_seqlens_from_positions", cu_seqlens_from_positions__1, "documents begin at position 0 only"),
    (8, "cu_seqlens_from_positions", cu_seqlens_from_positions__2, "only steps back: 0 0 is one document"),
    (8, "cu_seqlens_from_positions", cu_seqlens_from_positions__3, "returns int64"),
]
