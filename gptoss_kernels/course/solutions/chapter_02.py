"""Chapter 02, Triton in one hour."""

import math
import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ...lane import interpreting
from ..check import Mistake

LOG2E = tl.constexpr(1.4426950408889634)
MARGIN = 8  # elements around a checked tensor, more than a tile: a read or write without a mask stays in the buffer
UNTOUCHED = -77.0  # what out holds before the launch

# ------------------------------------------------------------------------------------------------- reverse_kernel


@triton.jit
def reverse_kernel(x, out, numel, BLOCK: tl.constexpr):
    """out[i] = x[numel - 1 - i]. x and out (numel,), contiguous; grid (cdiv(numel, BLOCK),)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < numel  # [BLOCK]
    x_tile = tl.load(x + (numel - 1 - offsets), mask=mask)  # [BLOCK]
    tl.store(out + offsets, x_tile, mask=mask)


def check_reverse_kernel(function: Callable) -> None:
    x = torch.arange(1.0, 11.0)
    got = _reversed(function, x, block=4)
    right = x.flip(0)
    i = torch.arange(8)  # of the two whole blocks
    if torch.equal(got, x):
        raise Mistake("out is x, not reversed: the element for out[i] comes from numel - 1 - i")
    if torch.equal(got[:4], right[:4]) and (got[4:] == UNTOUCHED).all():
        raise Mistake(
            "only the first BLOCK elements were written: offsets have to begin at tl.program_id(0) * BLOCK, so that "
            "each program takes a block of its own"
        )
    if torch.equal(got[1:], right[:-1]):
        raise Mistake("off by one: out[0] is the last element of x, whose offset is numel - 1, not numel")
    if torch.equal(got[:8], x[i // 4 * 4 + 3 - i % 4]):
        raise Mistake("each program reversed its own block in place: the first program has to read the end of x")
    if torch.equal(got[:8], x[10 - (i // 4 + 1) * 4 + i % 4]):
        raise Mistake("the blocks come in reverse, but the elements within a block do not")
    if torch.equal(got[:8], right[:8]) and not torch.equal(got, right):
        raise Mistake(
            f"right, except in the last block, of which only two lanes are elements: expected {right[8:].tolist()}, "
            f"got {got[8:].tolist()}; mask the lanes whose offset into out is not below numel"
        )
    for numel, block in ((10, 4), (8, 4), (5, 8)):
        x = torch.arange(1.0, numel + 1.0)
        got = _reversed(function, x, block)
        if not torch.equal(got, x.flip(0)):
            raise Mistake(
                f"for x = {x.tolist()} and BLOCK = {block}, expected {x.flip(0).tolist()}, got {got.tolist()}"
            )


def _reversed(function: Callable, x: torch.Tensor, block: int) -> torch.Tensor:
    out, intact = _output(x.shape)
    _launch(function, (triton.cdiv(len(x), block),), _fence(x), out, len(x), BLOCK=block)
    if not intact():
        raise Mistake(
            "it wrote beside out: store with a mask too, since the last block's lanes reach past the end; the mask is "
            "about offsets < numel"
        )
    return out.cpu()


# -------------------------------------------------------------------------------------------- eager_softmax_bytes


def eager_softmax_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes that five separate PyTorch operations read and write for the softmax of a (rows, columns) matrix."""
    matrix, vector = rows * columns, rows
    maximum = matrix + vector  # amax: reads the matrix, writes a vector
    shifted = matrix + vector + matrix  # x - maximum
    numerator = matrix + matrix  # exp
    normaliser = matrix + vector  # sum
    quotient = matrix + vector + matrix  # numerator / normaliser
    return itemsize * (maximum + shifted + numerator + normaliser + quotient)


def check_eager_softmax_bytes(function: Callable) -> None:
    known = {
        "that is what one fused kernel moves; here every operation reads and writes its matrix anew": (2, 0),
        "the vectors of maxima and sums travel too: each is written once and read once": (8, 0),
        "each of the two vectors is written by one operation and read by another: four passes, not two": (8, 2),
        "max and sum read a matrix, but write only one number a row": (10, 0),
        "that counts what is read; what is written moves as well": (5, 2),
        "that counts what is written; what is read moves as well": (3, 2),
        "that fuses the subtraction into exp; eager PyTorch writes x - maximum to memory and reads it back": (6, 4),
    }
    for rows, columns, itemsize in ((3, 5, 2), (4, 1000, 4)):
        right = eager_softmax_bytes(rows, columns, itemsize)
        got = function(rows, columns, itemsize)
        try:
            got = float(got)
        except (TypeError, ValueError, RuntimeError):
            raise Mistake(f"expected a number of bytes, got {type(got).__name__}") from None
        for message, (matrices, vectors) in known.items():
            if got == itemsize * (matrices * rows * columns + vectors * rows):
                raise Mistake(message)
        if got == right / itemsize:
            raise Mistake("that is a number of elements: each takes itemsize bytes")
        if got != right:
            raise Mistake(f"expected {right} for {rows} rows, {columns} columns, {itemsize} bytes each, got {got:g}")


# ---------------------------------------------------------------------------------------------- scale_rows_kernel


@triton.jit
def scale_rows_kernel(
    x,  # (rows, columns)
    scale,  # (rows,)
    out,  # (rows, columns)
    stride_xm,
    stride_xn,
    stride_om,
    stride_on,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[m, n] = x[m, n] * scale[m]; grid (cdiv(rows, BLOCK_M), cdiv(columns, BLOCK_N))."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)  # [BLOCK_M, BLOCK_N]
    x_tile = tl.load(x + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)  # [BLOCK_M, BLOCK_N]
    factor = tl.load(scale + offs_m, mask=offs_m < rows)  # [BLOCK_M]
    tl.store(out + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x_tile * factor[:, None], mask=mask)


def check_scale_rows_kernel(function: Callable) -> None:
    x = torch.arange(1.0, 36.0).view(5, 7)
    scale = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    right = x * scale[:, None]
    got = _scaled(function, x, scale)
    if torch.equal(got, x):
        raise Mistake("out is x: every element has to be multiplied by the factor of its row")
    if torch.equal(got[:, :5], x[:, :5] * scale[None, :]):
        raise Mistake("scale went along the columns: factor[None, :] is a row, factor[:, None] is a column")
    if torch.equal(got[:4], right[:4]) and torch.equal(got[4], x[4] * scale[0]):
        raise Mistake("every tile used the first BLOCK_M factors: load scale at offs_m, the rows of this tile")
    if (got[4:] == UNTOUCHED).all() and (got[:, 4:] == UNTOUCHED).all():
        raise Mistake("only the first tile was written: rows begin at tl.program_id(0) * BLOCK_M, columns likewise")
    if (got[4:] == UNTOUCHED).all():
        raise Mistake("rows from BLOCK_M on were not written: begin them at tl.program_id(0) * BLOCK_M")
    if (got[:, 4:] == UNTOUCHED).all():
        raise Mistake("columns from BLOCK_N on were not written: begin them at tl.program_id(1) * BLOCK_N")
    if not torch.equal(got, right):
        raise Mistake(_first_difference(got, right))
    tall = torch.arange(1.0, 34.0).view(11, 3)
    factors = torch.arange(2.0, 13.0)
    got = _scaled(function, tall, factors)
    if (got[4:] == UNTOUCHED).all():
        raise Mistake("the axes are swapped: tl.program_id(0) counts tiles of rows, tl.program_id(1) tiles of columns")
    if torch.equal(got[:3], tall[:3] * factors[:3, None]) and not got[3:].any():
        raise Mistake("the factors are masked by columns: there is one a row, so offs_m < rows")
    if not torch.equal(got, tall * factors[:, None]):
        raise Mistake(_first_difference(got, tall * factors[:, None]))
    transposed = _scaled(function, x, scale, order=(1, 0))
    if not torch.equal(transposed, right):
        raise Mistake(
            "right for a contiguous x, wrong for a transposed one: its columns are not neighbours in memory, so "
            "multiply the column offsets by stride_xn"
        )
    transposed = _scaled(function, x, scale, out_order=(1, 0))
    if not torch.equal(transposed, right):
        raise Mistake("right for a contiguous out, wrong for a transposed one: out has strides of its own")


def _scaled(function: Callable, x: torch.Tensor, scale: torch.Tensor, order=(0, 1), out_order=(0, 1)) -> torch.Tensor:
    out, intact = _output(x.shape, out_order)
    x = _fence(x, order)
    rows, columns = x.shape
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, 4))
    _launch(
        function, grid, x, _fence(scale), out, *x.stride(), *out.stride(), rows, columns, BLOCK_M=4, BLOCK_N=4
    )  # fmt: skip
    if not intact():
        raise Mistake(
            "it wrote beside out: a lane may be stored only if its row is below rows and its column below columns, "
            "both at once; and out is addressed by its own strides"
        )
    return out.cpu()


# --------------------------------------------------------------------------------------------- sink_softmax_kernel


@triton.jit
def sink_softmax_kernel(
    scores,  # (heads, rows, columns)
    sinks,  # (heads,)
    out,  # (heads, rows, columns)
    stride_sh,
    stride_sm,
    stride_sn,
    stride_oh,
    stride_om,
    stride_on,
    columns,
    BLOCK: tl.constexpr,
):
    """Softmax of each row with its head's sink in it; grid (rows, heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    scores += head * stride_sh + row * stride_sm  # this row's first score
    out += head * stride_oh + row * stride_om
    z = tl.load(sinks + head).to(tl.float32)

    tile_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)  # [BLOCK]
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)  # [BLOCK]
        tile_max = tl.maximum(tile_max, s)  # [BLOCK]
    maximum = tl.maximum(tl.max(tile_max, axis=0), z)

    tile_sum = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        s = tl.load(scores + offsets * stride_sn, mask=offsets < columns, other=float("-inf")).to(tl.float32)  # [BLOCK]
        tile_sum += tl.exp2((s - maximum) * LOG2E)  # [BLOCK]
    normaliser = tl.exp2((z - maximum) * LOG2E) + tl.sum(tile_sum, axis=0)

    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        mask = offsets < columns  # [BLOCK]
        s = tl.load(scores + offsets * stride_sn, mask=mask, other=float("-inf")).to(tl.float32)  # [BLOCK]
        p = tl.exp2((s - maximum) * LOG2E) / normaliser  # [BLOCK]
        tl.store(out + offsets * stride_on, p.to(out.dtype.element_ty), mask=mask)


def check_sink_softmax_kernel(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 7, generator=generator)
    sinks = torch.tensor([1.5, -0.5])
    s, z = scores.double(), sinks.double()[:, None, None]
    e, sink = s.exp(), z.exp()
    total = e.sum(-1, keepdim=True)
    top = torch.maximum(s.amax(-1, keepdim=True), z)
    two = torch.exp2(s)
    right = e / (total + sink)
    got = _sink_softmax(function, scores, sinks)
    known = {
        "the sink is missing: it has to join the normaliser": e / total,
        "the sink's term lacks log2(e): what goes into exp2 is (z - maximum) * LOG2E": (
            e / (total + torch.exp2(z - top) * top.exp())
        ),
        "the sink's term lacks log2(e): 2 ** z is not e ** z": e / (total + torch.exp2(z)),
        "log2(e) is missing: exp2(x) is 2 ** x, and e ** x is exp2(x * LOG2E)": (
            two / (two.sum(-1, keepdim=True) + torch.exp2(z))
        ),
        "the sink counts once in every tile: add its term once a row": e / (total + 2 * sink),
        "the sink counts once in every lane: add its term to the sum, not to the tile": e / (total + 4 * sink),
        "the sink counts once in every lane of every tile: add its term once a row": e / (total + 8 * sink),
        "the sink is head 0's in every head: load sinks + head": e / (total + sink[:1]),
        "lanes beyond the row were counted: load them as -inf, or zero them before the sum": e / (total + sink + 1),
        "the weights are not divided by the normaliser": torch.exp(s - top),
        "the normaliser holds the last tile alone: add up the tiles": (
            e / (e[..., 4:].sum(-1, keepdim=True) + sink)
        ),
        "the normaliser holds the first tile alone: add up the tiles": (
            e / (e[..., :4].sum(-1, keepdim=True) + sink)
        ),
        "these are logarithms of the weights: apply exp2 before the division": right.log(),
    }  # fmt: skip
    for message, wrong in known.items():
        if _close(got, wrong):
            raise Mistake(message)
    by_row = e[:, :2] / (total[:, :2] + sinks.double().exp()[None, :, None])
    if _close(got[:, :2], by_row):
        raise Mistake("the sink was chosen by row: it belongs to the head, load sinks + head")
    if (got[..., 4:] == UNTOUCHED).all():
        raise Mistake("only the first tile of each row was written: the last loop has to visit every tile")
    if not _close(got, right):
        raise Mistake(_first_difference(got, right))

    if not _close(_sink_softmax(function, scores, sinks, order=(2, 0, 1)), right):
        raise Mistake("right for contiguous scores, wrong for a permuted view: multiply the offsets by stride_sn")
    if not _close(_sink_softmax(function, scores, sinks, out_order=(2, 0, 1)), right):
        raise Mistake("right for a contiguous out, wrong for a permuted view: multiply its offsets by stride_on")
    if not _close(_sink_softmax(function, scores + 200, sinks + 200), right):
        raise Mistake("scores of 200 overflow: subtract the maximum before exp2, from the sink's term too")
    if not _close(_sink_softmax(function, scores - 200, sinks - 200), right):
        raise Mistake(
            "scores of -200 come out wrong: is a lane beyond the row in the maximum? Load it as -inf, not as 0"
        )
    masked = scores.clone()
    masked[:, 1] = -math.inf
    if not _close(_sink_softmax(function, masked, sinks)[:, 1], torch.zeros(2, 7)):
        raise Mistake(
            "a row whose scores are all -inf must come out as zeros, for the sink takes everything: let the maximum "
            "begin with z, which is finite; -inf - -inf is NaN"
        )


def _sink_softmax(
    function: Callable, scores: torch.Tensor, sinks: torch.Tensor, order=(0, 1, 2), out_order=(0, 1, 2)
) -> torch.Tensor:
    heads, rows, columns = scores.shape
    out, intact = _output(scores.shape, out_order)
    scores = _fence(scores, order)
    _launch(function, (rows, heads), scores, _fence(sinks), out, *scores.stride(), *out.stride(), columns, BLOCK=4)
    if not intact():
        raise Mistake(
            "it wrote beside out: a lane may be stored only if its offset is below columns; and tl.program_id(0) is "
            "the row, tl.program_id(1) the head"
        )
    return out.cpu()


# ----------------------------------------------------------------------------------------------------------- shared


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")


def _surround(shape, value: float, order) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer filled with value, and a view of `shape` in its middle whose strides decrease in the given order."""
    order = tuple(range(len(shape))) if len(order) != len(shape) else order
    buffer = torch.full([shape[d] + 2 * MARGIN for d in order], value, device=_device())
    view = buffer
    for position, d in enumerate(order):
        view = view.narrow(position, MARGIN, shape[d])
    return buffer, view.permute([order.index(d) for d in range(len(shape))])


def _fence(x: torch.Tensor, order=()) -> torch.Tensor:
    """x amid NaN, so that a read beside it shows."""
    _, view = _surround(x.shape, math.nan, order)
    return view.copy_(x)


def _output(shape, order=()) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A tensor to be written, and a function that says whether what surrounds it is as it was."""
    buffer, view = _surround(shape, UNTOUCHED, order)

    def intact() -> bool:
        inside = view.clone()
        view.fill_(UNTOUCHED)
        unchanged = bool((buffer == UNTOUCHED).all())
        view.copy_(inside)
        return unchanged

    return view, intact


def _launch(function: Callable, grid: tuple[int, ...], *arguments, **constants) -> None:
    if not hasattr(function, "run"):  # a plain function: let a stub say so itself
        try:
            function()
        except TypeError:
            pass
        raise Mistake(f"expected a Triton kernel, got {type(function).__name__}: keep the line @triton.jit above it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter passes on NumPy's, and the verdict says what is wrong
        function[grid](*arguments, **constants)


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-6)


def _first_difference(got: torch.Tensor, right: torch.Tensor) -> str:
    bad = ~torch.isclose(got.double(), right.double(), rtol=1e-4, atol=1e-6)
    index = tuple(bad.nonzero()[0].tolist())
    return f"expected {right[index].item():.5g} at {list(index)}, got {got[index].item():.5g}"
