"""The wide half of an adapter's product, added where it belongs in one pass over memory."""

import torch
import triton
import triton.language as tl

from ..launch import launch


@triton.jit(do_not_specialize=["rows"])
def add_low_rank_kernel(
    out,  # (rows, WIDTH), read and written
    low,  # (rows, RANK)
    factor,  # (experts, RANK, WIDTH)
    expert,  # (rows,) int32, sorted; >= experts: the row stays as it is
    rows,
    experts,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    own = tl.load(expert + row, mask=row < rows, other=experts)
    mask = (own < experts)[:, None] & (column < WIDTH)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.float32)
    # Sorted rows: a tile holds those of one expert, or of neighbours.
    for e in range(tl.min(own, 0), tl.minimum(tl.max(own, 0), experts - 1) + 1):
        for start in tl.static_range(0, RANK, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (own == e)[:, None] & (k < RANK)[None, :]
            a = tl.load(low + row.to(tl.int64)[:, None] * RANK + k[None, :], mask=inside, other=0.0)
            inside = (k < RANK)[:, None] & (column < WIDTH)[None, :]
            source = factor + (tl.cast(e, tl.int64) * RANK + k[:, None]) * WIDTH + column[None, :]
            b = tl.load(source, mask=inside, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    target = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


def add_low_rank(out: torch.Tensor, low: torch.Tensor, factor: torch.Tensor, expert: torch.Tensor) -> None:
    """out += low times the matrix of each row's expert, in fp32 and rounded once. Bitwise reproducible.

    Args:
        out: (rows, width), contiguous, changed in place; rows past those of all experts are left alone.
        low: (rows, rank), contiguous, out's dtype.
        factor: (experts, rank, width), contiguous, out's dtype.
        expert: (rows,) int32, sorted, as `Routing.expert`.
    """
    (rows, width), (experts, rank, _) = out.shape, factor.shape
    block_r, block_w, block_k = 32, 128, max(16, min(64, triton.next_power_of_2(rank)))
    constants = dict(RANK=rank, WIDTH=width, BLOCK_R=block_r, BLOCK_W=block_w, BLOCK_K=block_k)
    launch(
        add_low_rank_kernel, (triton.cdiv(rows, block_r), triton.cdiv(width, block_w)),
        (out, low, factor, expert, rows, experts), constants, num_warps=4,
    )  # fmt: skip
