"""The 8-bit AdamW step of reference.py in one pass over a tensor."""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .reference import BLOCK, FIRST, FRACTION, HASH, SECOND

ROWS = 8  # blocks of a program


@triton.jit
def _decode(codes, exponent, BITS: tl.constexpr, FRACTION: tl.constexpr):
    codes = codes.to(tl.int32)
    base = tl.maximum(8 * (exponent.to(tl.int32) + 1) - (1 << BITS), 0)[:, None]
    code = codes & ((1 << BITS) - 1)
    value = tl.where(code > 0, ((code + base) << FRACTION).to(tl.float32, bitcast=True), 0.0)
    return tl.where((codes >> BITS) > 0, -value, value)


@triton.jit
def _encode(moments, random, BITS: tl.constexpr, FRACTION: tl.constexpr):
    size = tl.abs(moments)
    number = size.to(tl.int32, bitcast=True)
    exponent = ((tl.max(number, 1) >> FRACTION) + 1) >> 3  # [ROWS]
    base = tl.maximum(8 * (exponent + 1) - (1 << BITS), 0)[:, None]
    code = ((number + random) >> FRACTION) - base
    if BITS == 8:  # the second moment
        below = size > 0
    else:
        least = ((base + 1) << FRACTION).to(tl.float32, bitcast=True)
        below = random.to(tl.float32) * (1.0 / (1 << FRACTION)) * least < size
    code = tl.where((number >> FRACTION) <= base, below.to(tl.int32), code)
    return (code | ((moments < 0).to(tl.int32) << BITS)).to(tl.uint8), exponent.to(tl.uint8)


@triton.jit(do_not_specialize=["count", "key0", "key1"])
def adamw_kernel(
    parameter,  # (count,) bf16 or fp32
    grad,  # (count,) bf16 or fp32
    exp_avg,  # (count,) uint8
    exp_avg_exponent,  # (blocks,) uint8
    exp_avg_sq,  # (count,) uint8
    exp_avg_sq_exponent,  # (blocks,) uint8
    squares,  # (programs,) fp32: sums of the gradient's squares
    count,
    key0,
    key1,
    step_size,
    root,
    eps,
    decay,
    beta1,
    rest1,  # 1 - beta1, which fp32 would not compute exactly
    beta2,
    rest2,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FRACTION: tl.constexpr,
    HASH0: tl.constexpr,
    HASH1: tl.constexpr,
    HASH2: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)  # [ROWS]
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    inside, row_inside = at < count, row * BLOCK < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = _decode(
        tl.load(exp_avg + at, mask=inside, other=0),
        tl.load(exp_avg_exponent + row, mask=row_inside, other=0),
        7,
        FRACTION,
    )
    v = _decode(
        tl.load(exp_avg_sq + at, mask=inside, other=0),
        tl.load(exp_avg_sq_exponent + row, mask=row_inside, other=0),
        8,
        FRACTION,
    )
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)

    x = at.to(tl.uint32) + key0.to(tl.uint32)
    x = (x ^ (x >> 17)) * HASH0
    x = x ^ (x >> 11) ^ key1.to(tl.uint32)
    x = x * HASH1
    x = (x ^ (x >> 15)) * HASH2
    x = x ^ (x >> 14)

    codes, exponent = _encode(m, ((x * FIRST) >> 12).to(tl.int32), 7, FRACTION)
    tl.store(exp_avg + at, codes, mask=inside)
    tl.store(exp_avg_exponent + row, exponent, mask=row_inside)
    codes, exponent = _encode(v, ((x * SECOND) >> 12).to(tl.int32), 8, FRACTION)
    tl.store(exp_avg_sq + at, codes, mask=inside)
    tl.store(exp_avg_sq_exponent + row, exponent, mask=row_inside)

    old = tl.load(parameter + at, mask=inside, other=0.0).to(tl.float32)
    new = old - (decay * old + step_size * (m / (tl.sqrt(v) * root + eps)))
    if STOCHASTIC:
        bits = new.to(tl.int32, bitcast=True) + (x & 0xFFFF).to(tl.int32)
        new = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    tl.store(parameter + at, new.to(parameter.dtype.element_ty), mask=inside)
    tl.store(squares + program, tl.sum(tl.sum(g * g, 1), 0))


def adamw_step(
    parameter, grad, exp_avg, exp_avg_exponent, exp_avg_sq, exp_avg_sq_exponent,
    step_size, root, eps, decay, betas, key, stochastic,
) -> torch.Tensor:  # fmt: skip
    """As reference.adamw_step."""
    count = parameter.numel()
    programs = triton.cdiv(count, ROWS * BLOCK)
    squares = torch.empty(programs, dtype=torch.float32, device=parameter.device)
    beta1, beta2 = betas
    arguments = (
        parameter, grad, exp_avg, exp_avg_exponent, exp_avg_sq, exp_avg_sq_exponent, squares, count, *key,
        float(step_size), float(root), float(eps), float(decay),
        float(beta1), float(1 - beta1), float(beta2), float(1 - beta2),
    )  # fmt: skip
    constants = dict(
        STOCHASTIC=stochastic and parameter.dtype == torch.bfloat16, ROWS=ROWS, BLOCK=BLOCK, FRACTION=FRACTION,
        HASH0=HASH[0], HASH1=HASH[1], HASH2=HASH[2], FIRST=FIRST, SECOND=SECOND,
    )  # fmt: skip
    launch(adamw_kernel, (programs,), arguments, constants, num_warps=8)
    return squares.sum()
