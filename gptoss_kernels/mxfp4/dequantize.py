"""MXFP4 experts to the layout that the experts' matrix products read, in one kernel: reads 17 bytes a group of 32
weights, writes them once. Exact in bf16 and fp32."""

import torch
import triton
import triton.language as tl

from ..launch import launch

BLOCK_N, BLOCK_G, WARPS = 64, 4, 4  # out rows and groups of a tile: 64 bytes read of each row, 128 written of each


@triton.jit
def dequantize_kernel(
    blocks,  # (experts, ROWS, GROUPS, 16) uint8, the low nibble first
    scales,  # (experts, ROWS, GROUPS) uint8
    out,  # (experts, GROUPS * 32, ROWS)
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    byte = tl.arange(0, 16)
    inside = (row < ROWS)[:, None] & (group < GROUPS)[None, :]  # [BLOCK_N, BLOCK_G]
    index = row[:, None] * GROUPS + group[None, :]
    packed = tl.load(
        blocks + expert * (ROWS * GROUPS * 16) + index[:, :, None] * 16 + byte[None, None, :],
        mask=inside[:, :, None], other=0,
    )  # fmt: skip
    scale = tl.load(scales + expert * (ROWS * GROUPS) + index, mask=inside, other=0).to(tl.int32)
    # 2 ** (scale - 127) from its bits; 2 ** -127 is below the normal numbers.
    factor = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    # Transposed as bytes, before there are four times as many.
    packed = tl.permute(packed, (1, 2, 0)).to(tl.int32)  # [BLOCK_G, 16, BLOCK_N]
    factor = tl.permute(factor, (1, 0))[:, None, :]  # [BLOCK_G, 1, BLOCK_N]
    mask = tl.permute(inside, (1, 0))[:, None, :]
    column = group[:, None, None] * 32 + 2 * byte[None, :, None]
    target = out + expert * (GROUPS * 32 * ROWS) + column * ROWS + row[None, None, :]
    for nibble in tl.static_range(2):
        code = (packed >> (4 * nibble)) & 15
        # Exponent and mantissa of E2M1 in fp32's places: off by the biases' difference, below the normal numbers too.
        bits = ((code & 7) << 22) | ((code >> 3) << 31)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor  # 2 ** 126
        tl.store(target + nibble * ROWS, value.to(out.dtype.element_ty), mask=mask)


def launch_dequantize(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out (experts, in, out), contiguous bf16, fp16 or fp32, from blocks uint8 (experts, out, in / 32, 16) and
    scales uint8 (experts, out, in / 32); a range of experts is a slice of all three. Bitwise reproducible."""
    experts, rows, groups, _ = blocks.shape
    launch(
        dequantize_kernel, (triton.cdiv(rows, BLOCK_N), triton.cdiv(groups, BLOCK_G), experts),
        (blocks, scales, out), dict(ROWS=rows, GROUPS=groups, BLOCK_N=BLOCK_N, BLOCK_G=BLOCK_G), num_warps=WARPS,
    )  # fmt: skip
