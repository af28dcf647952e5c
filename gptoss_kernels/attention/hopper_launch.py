"""Launches the kernels of hopper.py, where the tensors are such as they take."""

from collections.abc import Callable

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import Prepared
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


def _describer(shape, strides, bits: int, *block: int) -> Callable[[torch.Tensor], TensorDescriptor]:
    """What makes the TMA descriptor of a tensor of this shape, these strides and so many bits an element."""
    layout = gl.NVMMASharedLayout(128 if bits == 16 else 0, bits, len(block))
    shape, block = list(shape), list(block)
    strides = [s if n > 1 else HEAD_DIM for n, s in zip(shape[:-1], strides, strict=False)] + [1]

    def describe(base):
        made = object.__new__(TensorDescriptor)  # its own checks, which `supports` has made, take longer than a launch
        made.base, made.shape, made.strides, made.block_shape, made.layout = base, shape, strides, block, layout
        return made

    return describe


def _like(x: torch.Tensor, rows: int) -> Callable[[torch.Tensor], TensorDescriptor]:
    """The same for tensors like x, in tiles of so many rows."""
    return _describer(x.shape, x.stride(), 16, 1, 1, rows, HEAD_DIM)


def _masks(window, cu_seqlens, padding) -> tuple[tuple[int, ...], dict]:
    """Numbers and constants that say which keys a query sees."""
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = dict(HAS_WINDOW=window is not None, PACKED=cu_seqlens is not None, PADDED=padding is not None)
    return (window or 0, documents, documents.bit_length()), constants


def _instead(stand_in: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors; a stand-in, which is not read, for those that are not there."""
    return [stand_in if x is None else x for x in tensors]


def prepare_forward(q, k, v, sinks, out, scale, window, cu_seqlens, padding) -> Callable:
    """What launches the kernel on tensors like these, as forward.py does."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    bounds, masks = _masks(window, cu_seqlens, padding)
    keys = 128 if splits(window) and padding is None else 64  # as many as registers hold
    constants = dict(GROUP=q_heads // kv_heads, BLOCK_N=keys, STAGES=STAGES[keys], HAS_SINKS=sinks is not None, **masks)
    launch = Prepared(
        hopper.forward_hopper_kernel, (batch * q_heads, triton.cdiv(q_len, TILE)),
        (*out.stride()[:3], q_heads, q_len, kv_len, *bounds, scale * LOG2E.value), constants, num_warps=4,
    )  # fmt: skip

    q_desc, k_desc, v_desc = _like(q, WIDTH), _like(k, keys), _like(v, keys)

    def run(q, k, v, sinks, out, lse, cu_seqlens, padding):
        launch(out, lse, q_desc(q), k_desc(k), v_desc(v), *_instead(lse, sinks, cu_seqlens, padding))

    return run


def prepare_dq(dout, dlse, q, k, v, sinks, out, dq, rows, scale, window, cu_seqlens, padding) -> tuple[Callable, int]:
    """What launches the kernel on tensors like these, as backward.py does, and the number of row blocks whose shares of
    the sinks' gradient it leaves. rows, of lse2 and delta in scratch, is a multiple of WIDTH."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    bounds, masks = _masks(window, cu_seqlens, padding)
    constants = dict(
        GROUP=q_heads // kv_heads, BLOCK_N=DQ_KEYS, STAGES=DQ_STAGES, HAS_SINKS=sinks is not None,
        HAS_DLSE=dlse is not None, **masks,
    )  # fmt: skip
    strides = (*dq.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride()))
    launch = Prepared(
        hopper.dq_hopper_kernel, (batch * q_heads, triton.cdiv(rows, TILE)),  # rows past q_len have delta, too
        (*strides, q_heads, rows, q_len, kv_len, *bounds, scale), constants, num_warps=4,
    )  # fmt: skip

    q_desc, do_desc, o_desc = (_like(x, WIDTH) for x in (q, dout, out))
    k_desc, v_desc = _like(k, DQ_KEYS), _like(v, DQ_KEYS)

    def run(q, k, v, out, dout, sinks, lse, dlse, scratch, dq, cu_seqlens, padding):
        some_dlse, *others = _instead(lse, dlse, sinks, cu_seqlens, padding)
        described = q_desc(q), do_desc(dout), o_desc(out), k_desc(k), v_desc(v)
        launch(dq, lse, some_dlse, scratch, *described, *others)

    return run, rows // WIDTH


def prepare_dkdv(dout, q, k, v, sinks, dk, rows, blocks, scale, window, cu_seqlens, padding) -> Callable:
    """What launches the kernel on tensors like these, as backward.py does; dk and dv have the same strides."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    bounds, masks = _masks(window, cu_seqlens, padding)
    constants = dict(
        GROUP=q_heads // kv_heads, BLOCK_M=DKDV_QUERIES, STAGES=DKDV_STAGES, HAS_SINKS=sinks is not None, **masks
    )
    launch = Prepared(
        hopper.dkdv_hopper_kernel, (batch * kv_heads, triton.cdiv(kv_len, 2 * WIDTH)),
        (*dk.stride()[:3], kv_heads, batch, blocks, rows, q_len, kv_len, *bounds, scale), constants, num_warps=4,
        launch_pdl=True,  # overlaps with the end of dQ: the kernel waits for it (gdc_wait)
    )  # fmt: skip

    k_desc, v_desc = _like(k, WIDTH), _like(v, WIDTH)
    q_desc, do_desc = _like(q, DKDV_QUERIES), _like(dout, DKDV_QUERIES)
    rows_desc = _describer((2 * batch * q_heads, rows), (rows, 1), 32, 1, DKDV_QUERIES)  # of lse2 and delta

    def run(q, k, v, dout, scratch, dk, dv, dsinks, cu_seqlens, padding):
        described = k_desc(k), v_desc(v), q_desc(q), do_desc(dout), rows_desc(scratch)
        launch(dk, dv, *described, scratch, *_instead(scratch, dsinks, cu_seqlens, padding))

    return run
