"""Launches the kernels of hopper.py and hopper_window.py, where the tensors are such as they take."""

import functools

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch
from . import hopper
from .masks import LOG2E, splits

HEAD_DIM, WIDTH, TILE = hopper.HEAD_DIM.value, hopper.WIDTH.value, hopper.TILE.value
STAGES = {128: 3, 64: 6}  # of the forward kernel, by keys of a tile
DQ_KEYS, DQ_STAGES = 64, 4
DKDV_QUERIES, DKDV_STAGES = 64, 4
LEAST = 1024  # queries of all rows together


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these (batch, heads, length, head_dim) tensors, of which the first has the queries.

    That is head_dim 64, 16 bits, and bases and strides of whole 16 bytes, as TMA reads them. With fewer than LEAST
    queries what counts is the time of the host, and descriptors take some.
    """
    return tensors[0].shape[0] * tensors[0].shape[2] >= LEAST and all(map(_readable, tensors))


def _readable(x: torch.Tensor) -> bool:
    if x.shape[3] != HEAD_DIM or x.element_size() != 2 or x.data_ptr() % 16:
        return False
    a, b, c, _ = x.stride()
    if a > 0 and b > 0 and c > 0 and not (a | b | c) % 8:
        return True
    # The stride of a dimension of one element may be anything.
    return all(n == 1 or (s > 0 and s % 8 == 0) for n, s in zip(x.shape[:3], x.stride(), strict=False))


@functools.cache
def _layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128 if bits == 16 else 0, bits, rank)


def _descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    made = object.__new__(TensorDescriptor)  # its own checks, which `supports` has made, take longer than a launch
    made.base, made.shape, made.block_shape = x, list(x.shape), list(block)
    made.strides = [s if n > 1 else HEAD_DIM for n, s in zip(made.shape[:-1], x.stride(), strict=False)] + [1]
    made.layout = _layout(x.element_size() * 8, len(block))
    return made


def launch_forward(q, k, v, sinks, out, lse, scale, window, cu_seqlens, padding) -> None:
    """As forward.launch_forward."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keys = 128 if splits(window) and padding is None else 64  # as many as registers hold
    arguments = (
        out, lse, *(_descriptor(x, 1, 1, rows, head_dim) for x, rows in ((q, WIDTH), (k, keys), (v, keys))),
        *(lse if x is None else x for x in (sinks, cu_seqlens, padding)),  # lse stands in for what is not read
        *out.stride()[:3], q_heads, q_len, kv_len, window or 0, documents,
        documents.bit_length(), scale * LOG2E.value,
    )  # fmt: skip
    constants = dict(
        GROUP=q_heads // kv_heads, BLOCK_N=keys, STAGES=STAGES[keys], HAS_SINKS=sinks is not None,
        HAS_WINDOW=window is not None, PACKED=cu_seqlens is not None, PADDED=padding is not None,
    )  # fmt: skip
    grid = (batch * q_heads, triton.cdiv(q_len, TILE))
    launch(hopper.forward_hopper_kernel, grid, arguments, constants, num_warps=4)


def launch_dq(
    dout, dlse, q, k, v, sinks, out, lse, dq, delta, lse2, scale, window, cu_seqlens, padding
) -> torch.Tensor | None:
    """Fill dq, and delta and lse2 (batch, q_heads, rows) fp32; return the sinks' gradient by row block.

    rows is a multiple of WIDTH."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = delta.shape[-1]
    partial = None
    if sinks is not None:
        partial = torch.empty(batch, q_heads, rows // WIDTH, dtype=torch.float32, device=q.device)
    # lse stands in for what is not read.
    some_dlse, some_partial, *others = (lse if x is None else x for x in (dlse, partial, sinks, cu_seqlens, padding))
    arguments = (
        dq, lse, some_dlse, delta, lse2, some_partial, *(_descriptor(x, 1, 1, WIDTH, head_dim) for x in (q, dout, out)),
        *(_descriptor(x, 1, 1, DQ_KEYS, head_dim) for x in (k, v)), *others, *dq.stride()[:3], *some_dlse.stride(),
        q_heads, rows, q_len, kv_len, window or 0, documents, documents.bit_length(), scale,
    )  # fmt: skip
    constants = dict(
        GROUP=q_heads // kv_heads, BLOCK_N=DQ_KEYS, STAGES=DQ_STAGES, HAS_SINKS=sinks is not None,
        HAS_DLSE=dlse is not None, HAS_WINDOW=window is not None, PACKED=cu_seqlens is not None,
        PADDED=padding is not None,
    )  # fmt: skip
    # Rows past q_len have delta and lse2 too.
    launch(hopper.dq_hopper_kernel, (batch * q_heads, triton.cdiv(rows, TILE)), arguments, constants, num_warps=4)
    return partial


def launch_dkdv(dout, q, k, v, dk, dv, delta, lse2, scale, window, cu_seqlens, padding) -> None:
    """Fill dk and dv, which have the same strides, from what launch_dq left in delta and lse2."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    arguments = (
        dk, dv, *(_descriptor(x, 1, 1, WIDTH, head_dim) for x in (k, v)),
        *(_descriptor(x, 1, 1, DKDV_QUERIES, head_dim) for x in (q, dout)),
        *(_descriptor(x.view(batch * q_heads, -1), 1, DKDV_QUERIES) for x in (lse2, delta)),
        *(lse2 if x is None else x for x in (cu_seqlens, padding)),  # lse2 stands in for what is not read
        *dk.stride()[:3], kv_heads, q_len, kv_len, window or 0, documents, documents.bit_length(), scale,
    )  # fmt: skip
    constants = dict(
        GROUP=q_heads // kv_heads, BLOCK_M=DKDV_QUERIES, STAGES=DKDV_STAGES, HAS_WINDOW=window is not None,
        PACKED=cu_seqlens is not None, PADDED=padding is not None,
    )  # fmt: skip
    grid = (batch * kv_heads, triton.cdiv(kv_len, 2 * WIDTH))
    launch(hopper.dkdv_hopper_kernel, grid, arguments, constants, num_warps=4)
