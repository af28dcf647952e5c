"""Chapter 13, MXFP4 and long context."""

import math
import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from ...lane import interpreting
from ...mxfp4.reference import GROUP, MAGNITUDES, dequantize
from ..check import Mistake
from ..ledger import kept_bytes

# --------------------------------------------------------------------------------------------------- decode_e2m1


def decode_e2m1(code: int) -> float:
    """The number that a code 0 … 15 means: sign 8, exponent 4 and 2 with bias 1, mantissa 1."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -magnitude if sign else magnitude


def check_decode_e2m1(function: Callable) -> None:
    got = [function(code) for code in range(16)]
    for code, value in enumerate(got):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Mistake(f"code {code:04b}: expected a number, got {type(value).__name__}")
    normal = [2.0 ** (e - 1) * (1 + m / 2) for e in range(4) for m in range(2)]
    whole_bit = [2.0 ** (e - 1) * (1 + m) for e in range(4) for m in range(2)]
    mixed = [2.0 ** ((c & 3) - 1) * (1 + (c >> 2) / 2) if c & 3 else (c >> 2) / 2 for c in range(8)]
    signed = lambda magnitudes: [*magnitudes, *(-x for x in magnitudes)]  # noqa: E731
    known = {
        "the sign is ignored: codes from 8 on are the negative ones": [*MAGNITUDES, *MAGNITUDES],
        "the codes are no two's complement: the highest bit alone is the sign": [
            *MAGNITUDES, got[8], *(-x for x in reversed(MAGNITUDES[1:])),
        ],
        "exponent 0 has no hidden one: codes 0 and 1 are 0 and 0.5": signed(normal),
        "exponent 0 is one too small: beside 0 its only number is 0.5": signed([0.0, 0.25, *MAGNITUDES[2:]]),
        "the bias of the exponent is 1: 2 ** (exponent - 1)": signed([x * 2 for x in MAGNITUDES]),
        "the mantissa's bit is worth a half: 1 + mantissa / 2": signed([0.0, 0.5, *whole_bit[2:]]),
        "mantissa and exponent are mixed up: the lowest bit is the mantissa": signed(mixed),
        "that is the code itself, not what its bits mean": [float(c) for c in range(16)],
    }  # fmt: skip
    right = signed(MAGNITUDES)
    if got == right:
        if math.copysign(1, got[8]) > 0:
            raise Mistake("code 8 is minus zero: bit for bit, the sign of a zero counts")
        return
    for message, wrong in known.items():
        if got == wrong:
            raise Mistake(message)
    code = next(c for c in range(16) if got[c] != right[c])
    raise Mistake(f"code {code:04b}: expected {right[code]}, got {got[code]}")


# ---------------------------------------------------------------------------------------------- dequantize_kernel


@triton.jit
def dequantize_kernel(
    blocks,  # (experts, ROWS, GROUPS, 16) uint8, the low nibble first
    scales,  # (experts, ROWS, GROUPS) uint8
    out,  # (experts, GROUPS * 32, ROWS)
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program dequantizes one group of BLOCK rows; grid (cdiv(ROWS, BLOCK), GROUPS, experts)."""
    expert = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    byte = tl.arange(0, 16)[:, None]  # [16, 1]
    index = (expert * ROWS + row) * GROUPS + group
    packed = tl.load(blocks + index * 16 + byte, mask=row < ROWS, other=0).to(tl.int32)  # [16, BLOCK]
    scale = tl.load(scales + index, mask=row < ROWS, other=0).to(tl.int32)  # [1, BLOCK]
    factor = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    target = out + (expert * GROUPS + group) * 32 * ROWS + row
    for nibble in tl.static_range(2):
        code = (packed >> (4 * nibble)) & 15
        bits = ((code & 7) << 22) | ((code >> 3) << 31)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor
        tl.store(target + (2 * byte + nibble) * ROWS, value.to(out.dtype.element_ty), mask=row < ROWS)


UNWRITTEN = -777.0
BLOCK = 4


def check_dequantize_kernel(function: Callable) -> None:
    if not isinstance(function, triton.runtime.KernelInterface):
        try:
            function()
        except NotImplementedError:
            raise
        except Exception:
            pass
        raise Mistake(f"expected a kernel, a function under @triton.jit, got {type(function).__name__}")
    for experts, rows, groups, low, high in ((2, 6, 3, 120, 134), (1, 4, 1, 1, 253), (1, 5, 2, 0, 2)):
        generator = torch.Generator().manual_seed(rows)
        blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(low, high, (experts, rows, groups), generator=generator).to(torch.uint8)
        _check_dequantized(function, blocks, scales)


def _check_dequantized(function: Callable, blocks: torch.Tensor, scales: torch.Tensor) -> None:
    right = dequantize(blocks, scales, torch.float32)
    got = _dequantized(function, blocks, scales)
    if (got == UNWRITTEN).all():
        raise Mistake("nothing was written")
    if (got[:, 1::2] == UNWRITTEN).all() or (got[:, 0::2] == UNWRITTEN).all():
        raise Mistake("half of the weights were not written: a byte holds two codes")
    if (got == UNWRITTEN).any():
        expert, column, row = (got == UNWRITTEN).nonzero()[0].tolist()
        raise Mistake(
            f"out[{expert}, {column}, {row}] was not written: program_id(0) is the block of rows, 1 the group, 2 the "
            "expert; weight 2 * byte + nibble of the group stands in row group * 32 + 2 * byte + nibble of out"
        )
    if _same_bits(got, right):
        return
    for message, wrong in _known(blocks, scales).items():
        if not _same_bits(wrong, right) and (_same_bits(got, wrong) or _same_bits(got, wrong + 0.0)):
            raise Mistake(message)
    if torch.equal(got, right):
        raise Mistake("minus zero lost its sign: code 8 is -0, and bit for bit that is not 0")
    small = scales.amax() < 2
    if small and (got == 0).any() and not torch.equal(got == 0, right == 0):
        raise Mistake(
            "right but for the smallest scale: 2 ** -127 lies below fp32's normal numbers; `0 << 23` is 0, its bits "
            "are 1 << 22"
        )
    expert, column, row = (~_equal_bits(got, right)).nonzero()[0].tolist()
    raise Mistake(
        f"out[{expert}, {column}, {row}]: expected {right[expert, column, row]:.6g}, got "
        f"{got[expert, column, row]:.6g}, with scale {scales[expert, row, column // GROUP]}"
    )


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.contiguous().view(torch.int32) == b.contiguous().view(torch.int32)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(_equal_bits(a, b).all())


def _known(blocks: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """What known wrong kernels write, fp32."""
    right = dequantize(blocks, scales, torch.float32)
    swapped = blocks << 4 | blocks >> 4
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()  # [experts, rows, groups, 32]

    def decoded(table, factor):
        return (torch.tensor(table)[codes] * factor[..., None]).flatten(-2).mT.contiguous()

    table = [*MAGNITUDES, *(-x for x in MAGNITUDES)]
    factor = torch.exp2(scales.float() - 127)
    hidden_one = [2.0 ** (e - 1) * (1 + m / 2) for e in range(4) for m in range(2)]
    halves = torch.cat([blocks & 15, blocks >> 4], dim=-1)  # all low nibbles first
    halves = halves[..., 0::2] | halves[..., 1::2] << 4
    flat = scales.flatten()
    return {
        "the nibbles are swapped: the low one is the first weight": dequantize(swapped, scales, torch.float32),
        "the 16 low nibbles come first, then the high ones: a byte's two weights are neighbours": dequantize(
            halves, scales, torch.float32
        ),
        "the scale is missing": decoded(table, torch.ones_like(factor)),
        "the scale's bias is 127, not 128": decoded(table, factor / 2),
        "the scale's bias is 127, not 126": decoded(table, factor * 2),
        "the scale is multiplied as an integer: it is an exponent, 2 ** (scale - 127)": decoded(table, scales.float()),
        "the scale divides: it is a factor": decoded(table, 1 / factor),
        "the sign is missing: bit 8 of a code": decoded([*MAGNITUDES] * 2, factor),
        "the codes themselves were written, not what they mean": decoded([float(c) for c in range(16)], factor),
        "codes 0 and 1 have no hidden one: they are 0 and 0.5": decoded(
            [*hidden_one, *(-x for x in hidden_one)], factor
        ),
        "all groups got the first one's scale": decoded(table, factor[..., :1].expand_as(factor)),
        "all rows got the first one's scale": decoded(table, factor[:, :1].expand_as(factor)),
        "all experts got the first one's scales": decoded(table, factor[:1].expand_as(factor)),
        "all experts got the first one's blocks": dequantize(
            blocks[:1].expand_as(blocks).contiguous(), scales, torch.float32
        ),
        "the scales were read in the order of out, (groups, rows): they lie as (rows, groups)": decoded(
            table, torch.exp2(flat.view(scales.shape[0], scales.shape[2], -1).mT.float() - 127)
        ),
        "out is written as (rows, in): it is transposed, (in, rows)": right.mT.contiguous().view(right.shape),
    }


def _dequantized(function: Callable, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """out of one launch between fences. (experts, in, rows) fp32"""
    device = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
    experts, rows, groups, _ = blocks.shape
    size = experts * groups * GROUP * rows
    buffer = torch.full((size + 512,), UNWRITTEN, device=device)
    out = buffer[256 : 256 + size].view(experts, groups * GROUP, rows)
    grid = (triton.cdiv(rows, BLOCK), groups, experts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function[grid](_fence(blocks, device), _fence(scales, device), out, ROWS=rows, GROUPS=groups, BLOCK=BLOCK)
    if (buffer[:256] != UNWRITTEN).any() or (buffer[256 + size :] != UNWRITTEN).any():
        raise Mistake("it wrote beside out: mask the rows that are not below ROWS, in the stores as well")
    return out.cpu()


def _fence(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x amid bytes of its own, so that a read beside it gives wrong numbers and no crash."""
    buffer = torch.full((x.numel() + 2048,), 171, dtype=x.dtype, device=device)
    view = buffer[1024 : 1024 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


# -------------------------------------------------------------------------------------------------- longest_context


def longest_context(memory: int, fixed: int, layers: int, checkpoint: int, transient: int, offload: bool) -> int:
    """Most tokens that fit.

    Args:
        memory: bytes of the GPU.
        fixed: bytes that do not depend on the tokens.
        layers: of the model; each keeps its input.
        checkpoint: bytes of one layer's input, a token.
        transient: bytes a token of what lives while one layer is computed.
        offload: whether the inputs go to the host, all but those of two layers.
    """
    kept = min(2, layers) if offload else layers
    return max(0, (memory - fixed) // (kept * checkpoint + transient))


def check_longest_context(function: Callable) -> None:
    for memory, fixed, layers, checkpoint_, transient in (
        (80_000_003, 13_000_000, 24, 5760, 185_000),
        (1_000_000, 400_000, 7, 100, 1_000),
        (1_000_000, 400_000, 1, 100, 1_000),
    ):
        for offload in (False, True):
            got = function(memory, fixed, layers, checkpoint_, transient, offload)
            if isinstance(got, bool) or not isinstance(got, (int, float)):
                raise Mistake(f"expected a whole number of tokens, got {type(got).__name__}")
            kept = min(2, layers) if offload else layers
            free = memory - fixed
            right = free // (kept * checkpoint_ + transient)
            if got == right:
                continue
            known = {
                "what does not depend on the tokens is not subtracted": memory // (kept * checkpoint_ + transient),
                "the transients are missing: while a layer is computed they live beside all checkpoints": free
                // (kept * checkpoint_),
                "the transients were counted for each layer: only one layer is computed at a time": free
                // (kept * checkpoint_ + layers * transient),
                "rounded up: a token more does not fit": right + 1,
            }
            if offload:
                known |= {
                    "with offloading the inputs of two layers stay on the GPU": free
                    // (layers * checkpoint_ + transient),
                    "with offloading two layers' inputs stay, not none": free // transient,
                    "with offloading two layers' inputs stay, not one": free // (checkpoint_ + transient),
                    "a model of one layer has no second one to keep": free // (2 * checkpoint_ + transient),
                }
            else:
                known |= {
                    "the checkpoints are missing: every layer keeps its input": free // transient,
                    "one checkpoint was counted: every layer keeps its input": free // (checkpoint_ + transient),
                    "without offloading all layers' inputs stay, not two": free // (2 * checkpoint_ + transient),
                }
            if isinstance(got, float) and not got.is_integer() and math.floor(got) == right:
                raise Mistake("a part of a token: round down to a whole number")
            for message, wrong in known.items():
                if math.floor(got) == wrong and wrong != right:
                    raise Mistake(message)
            raise Mistake(
                f"for memory {memory}, fixed {fixed}, layers {layers}, checkpoint {checkpoint_}, transient {transient} "
                f"and offload {offload} expected {right}, got {got}"
            )
    if function(100, 200, 3, 1, 1, False) != 0:
        raise Mistake("where not even the weights fit, no token does: the answer is 0, not a negative number")


# ------------------------------------------------------------------------------------------------------ in_chunks


def in_chunks(function: Callable, x: torch.Tensor, size: int) -> torch.Tensor:
    """function(x) for a function that treats each token by itself, `size` tokens at a time, each part computed again
    in the backward pass.

    Args:
        function: (n, hidden) -> (n, anything), differentiable.
        x: (tokens, hidden).
        size: tokens of a part; the last one may be shorter.
    """
    return torch.cat([checkpoint(function, part, use_reentrant=False) for part in x.split(size)])


def check_in_chunks(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    calls = []

    def layer(part):
        calls.append(tuple(part.shape))
        wide = torch.cat([part, part.sin()], dim=1)
        for _ in range(6):  # so that it pays to keep the input alone
            wide = wide.tanh() + 0.1 * wide
        return wide @ weight

    for tokens, size in ((8, 4), (7, 3), (3, 5)):
        x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).requires_grad_()
        right = layer(x)
        dy = torch.randn(right.shape, generator=generator, dtype=torch.float64)
        wanted = torch.autograd.grad(right, [x, weight], dy)
        calls.clear()
        got = function(layer, x, size)
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor, got {type(got).__name__}: put the parts together with torch.cat")
        forward = [shape[0] for shape in calls]
        if forward and max(forward) > size:
            raise Mistake(f"the function was called with {max(forward)} tokens at once, more than size = {size}")
        if got.shape[0] < tokens:
            raise Mistake(f"{tokens - got.shape[0]} tokens are missing: the last part is shorter, but belongs to it")
        if got.shape != right.shape:
            raise Mistake(f"expected shape {tuple(right.shape)}, got {tuple(got.shape)}: concatenate along the tokens")
        if not torch.allclose(got, right, rtol=1e-10):
            row = ((got - right).abs().amax(1) > 1e-10).nonzero()[0].item()
            raise Mistake(f"token {row} is wrong: do the parts come back in their order?")
        if len(forward) > -(-tokens // size):
            raise Mistake(f"{len(forward)} calls for {tokens} tokens in parts of {size}: expected {-(-tokens // size)}")
        if not got.requires_grad:
            raise Mistake("the result is cut off from autograd: no torch.no_grad() and no detach() around the parts")
        calls.clear()
        try:
            gradients = torch.autograd.grad(got, [x, weight], dy)
        except RuntimeError as error:
            raise Mistake(f"no gradient came back: {error}") from error
        if not calls:
            raise Mistake(
                "nothing was computed again in the backward pass, so all parts' intermediates were kept: wrap each "
                "call in torch.utils.checkpoint.checkpoint(function, part, use_reentrant=False)"
            )
        if max(shape[0] for shape in calls) > size:
            raise Mistake("in the backward pass all tokens are computed at once: checkpoint each part, not the whole")
        for name, mine, exact in zip(("x", "the weight"), gradients, wanted, strict=True):
            if not torch.allclose(mine, exact, rtol=1e-9):
                raise Mistake(f"the gradient of {name} is wrong")
    kept = kept_bytes(lambda: function(layer, x, size), ignore=[weight])
    if kept > 2 * x.nbytes:
        raise Mistake(f"{kept} bytes are kept for an input of {x.nbytes}: of each part its input alone is needed")
