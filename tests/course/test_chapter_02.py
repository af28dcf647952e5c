"""Chapter 02's checkers: known mistakes get the message that names them, other ways to be right are accepted."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gptoss_kernels.course import check  # noqa: E402
from gptoss_kernels.course.solutions.chapter_02 import LOG2E  # noqa: E402


def named(kernel, name):
    kernel.__name__ = name
    return kernel


def refused(kernel, name, message):
    with pytest.raises(check.Mistake, match=message):
        check.attempt(named(kernel, name), chapter=2, strict=True)


# One kernel a family of attempts; WRONG, a string known at compile time, says what is wrong with it.


@triton.jit
def reverse(x, out, numel, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    offsets = pid * BLOCK + lanes
    if WRONG == "first block":
        offsets = lanes
    source = numel - 1 - offsets
    if WRONG == "copy":
        source = offsets
    if WRONG == "off by one":
        source = numel - offsets
    if WRONG == "own block":
        source = pid * BLOCK + BLOCK - 1 - lanes
    if WRONG == "block order":
        source = numel - (pid + 1) * BLOCK + lanes
    if WRONG == "arithmetic":
        source = numel - 3 - offsets
    mask = offsets < numel
    if WRONG == "last block":
        mask = offsets < numel // BLOCK * BLOCK
    if WRONG == "store mask":
        tl.store(out + offsets, tl.load(x + source, mask=mask))
    else:
        tl.store(out + offsets, tl.load(x + source, mask=mask), mask=mask)


@triton.jit
def scale_rows(
    x, scale, out, xm, xn, om, on, rows, columns, WRONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WRONG == "rows" or WRONG == "tile":
        m = tl.arange(0, BLOCK_M)
    if WRONG == "columns" or WRONG == "tile":
        n = tl.arange(0, BLOCK_N)
    if WRONG == "x stride":
        xn = 1
    if WRONG == "out stride":
        on = 1
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    stored = mask
    if WRONG == "or":
        stored = (m[:, None] < rows) | (n[None, :] < columns)
    tile = tl.load(x + m[:, None] * xm + n[None, :] * xn, mask=mask)
    if WRONG == "along columns":
        tile = tile * tl.load(scale + n, mask=n < rows)[None, :]
    elif WRONG == "first factors":
        tile = tile * tl.load(scale + tl.arange(0, BLOCK_M))[:, None]
    elif WRONG == "plus":
        tile = tile + tl.load(scale + m, mask=m < rows)[:, None]
    elif WRONG != "unscaled":
        tile = tile * tl.load(scale + m, mask=m < rows)[:, None]
    tl.store(out + m[:, None] * om + n[None, :] * on, tile, mask=stored)


@triton.jit
def sink_softmax(
    scores, sinks, out, sh, sm, sn, oh, om, on, columns, WRONG: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Other than the packaged one: the row in one tile, whatever BLOCK is; natural exponentials."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    if WRONG == "grid":
        row = tl.program_id(1)
        head = tl.program_id(0)
    if WRONG == "stride":
        sn = 1
    if WRONG == "out stride":
        on = 1
    offsets = tl.arange(0, 8)
    mask = offsets < columns
    fill: tl.constexpr = 0.0 if WRONG == "padding" or WRONG == "padded maximum" else float("-inf")
    s = tl.load(scores + head * sh + row * sm + offsets * sn, mask=mask, other=fill)
    z = tl.load(sinks + head)
    if WRONG == "head 0":
        z = tl.load(sinks)
    if WRONG == "by row":
        z = tl.load(sinks + row)
    maximum = tl.maximum(tl.max(s, axis=0), z)
    if WRONG == "maximum":
        maximum = tl.max(s, axis=0)
    if WRONG == "overflow":
        maximum = 0.0
    e = tl.exp(s - maximum)
    if WRONG == "padded maximum":
        e = tl.where(mask, e, 0.0)
    sink = tl.exp(z - maximum)
    if WRONG == "log2e":
        sink = tl.exp2(z - maximum)
    if WRONG == "power of two":
        sink = tl.exp2(z) * tl.exp(-maximum)
    if WRONG == "base":
        e = tl.exp2(s - maximum)
        sink = tl.exp2(z - maximum)
    total = tl.sum(e, axis=0) + sink
    if WRONG == "no sink":
        total = tl.sum(e, axis=0)
    if WRONG == "tiles":
        total += sink
    if WRONG == "lanes":
        total += 3 * sink
    if WRONG == "lanes of tiles":
        total += 7 * sink
    if WRONG == "last tile":
        total = tl.sum(tl.where(offsets >= 4, e, 0.0), axis=0) + sink
    if WRONG == "first tile":
        total = tl.sum(tl.where(offsets < 4, e, 0.0), axis=0) + sink
    if WRONG == "division":
        total = total * 0 + 1
    p = e / total
    if WRONG == "logarithm":
        p = tl.log(p)
    if WRONG == "half":
        p = p / 2
    if WRONG == "one tile":
        mask = offsets < 4
    if WRONG == "store mask":
        mask = offsets < 8
    tl.store(out + head * oh + row * om + offsets * on, p, mask=mask)


class Attempt:
    """A kernel with WRONG bound; launched as the checker launches a kernel."""

    def __init__(self, kernel, wrong):
        self.kernel, self.wrong, self.run = kernel, wrong, kernel.run

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.kernel[grid](*arguments, WRONG=self.wrong, **constants)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("copy", "not reversed"),
        ("first block", "only the first BLOCK elements"),
        ("off by one", "off by one"),
        ("own block", "its own block"),
        ("block order", "the blocks come in reverse"),
        ("last block", "except in the last block"),
        ("store mask", "wrote beside out"),
        ("arithmetic", "expected \\["),
    ],
)
def test_reverse_names_the_mistake(wrong, message):
    refused(Attempt(reverse, wrong), "reverse_kernel", message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("unscaled", "out is x"),
        ("along columns", "scale went along the columns"),
        ("first factors", "the first BLOCK_M factors"),
        ("rows", "rows from BLOCK_M on"),
        ("columns", "columns from BLOCK_N on"),
        ("tile", "only the first tile"),
        ("or", "wrote beside out"),
        ("x stride", "wrong for a transposed one: its columns"),
        ("out stride", "wrote beside out|strides of its own"),
        ("plus", "expected .* at"),
    ],
)
def test_scale_rows_names_the_mistake(wrong, message):
    refused(Attempt(scale_rows, wrong), "scale_rows_kernel", message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no sink", "the sink is missing"),
        ("log2e", "lacks log2"),
        ("power of two", "lacks log2"),
        ("base", "log2\\(e\\) is missing"),
        ("tiles", "once in every tile"),
        ("lanes", "once in every lane: "),
        ("lanes of tiles", "once in every lane of every tile"),
        ("head 0", "head 0's in every head"),
        ("by row", "chosen by row"),
        ("grid", "tl.program_id\\(0\\) is the row"),
        ("padding", "lanes beyond the row were counted"),
        ("padded maximum", "scores of -200"),
        ("division", "not divided"),
        ("logarithm", "logarithms"),
        ("last tile", "the last tile alone"),
        ("first tile", "the first tile alone"),
        ("one tile", "only the first tile of each row"),
        ("store mask", "wrote beside out"),
        ("stride", "stride_sn"),
        ("out stride", "wrote beside out|stride_on"),
        ("overflow", "overflow"),
        ("maximum", "all -inf must come out as zeros"),
        ("half", "expected .* at"),
    ],
)
def test_sink_softmax_names_the_mistake(wrong, message):
    refused(Attempt(sink_softmax, wrong), "sink_softmax_kernel", message)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(reverse, "reverse_kernel"), (scale_rows, "scale_rows_kernel"), (sink_softmax, "sink_softmax_kernel")],
)
def test_other_solutions_are_accepted(kernel, name):
    attempt = named(Attempt(kernel, "nothing"), name)
    assert check.attempt(attempt, chapter=2, strict=True) is attempt


@triton.jit
def sink_softmax_kernel(scores, sinks, out, sh, sm, sn, oh, om, on, columns, BLOCK: tl.constexpr):
    """One pass for maximum and sum, scores in base 2."""
    row, head = tl.program_id(0), tl.program_id(1)
    scores += head * sh + row * sm
    out += head * oh + row * om
    maximum = tl.load(sinks + head) * LOG2E
    total = 1.0
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * sn, mask=offsets < columns, other=float("-inf")) * LOG2E
        larger = tl.maximum(maximum, tl.max(s, axis=0))
        total = total * tl.exp2(maximum - larger) + tl.sum(tl.exp2(s - larger), axis=0)
        maximum = larger
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = tl.load(scores + offsets * sn, mask=offsets < columns, other=float("-inf")) * LOG2E
        tl.store(out + offsets * on, tl.exp2(s - maximum) / total, mask=offsets < columns)


def test_an_online_softmax_is_accepted():
    assert check.attempt(sink_softmax_kernel, chapter=2, strict=True) is sink_softmax_kernel


@pytest.mark.parametrize("name", ["reverse_kernel", "scale_rows_kernel", "sink_softmax_kernel"])
def test_without_jit(name):
    def plain(x, out, numel, BLOCK):
        out.copy_(x)

    refused(plain, name, "keep the line @triton.jit")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda r, c, b: 2 * r * c * b, "one fused kernel"),
        (lambda r, c, b: 8 * r * c * b, "vectors of maxima and sums travel too"),
        (lambda r, c, b: (8 * r * c + 2 * r) * b, "four passes, not two"),
        (lambda r, c, b: 10 * r * c * b, "only one number a row"),
        (lambda r, c, b: (5 * r * c + 2 * r) * b, "what is read;"),
        (lambda r, c, b: (3 * r * c + 2 * r) * b, "what is written;"),
        (lambda r, c, b: (6 * r * c + 4 * r) * b, "fuses the subtraction"),
        (lambda r, c, b: 8 * r * c + 4 * r, "itemsize bytes"),
        (lambda r, c, b: r, "expected 264 for"),
        (lambda r, c, b: None, "expected a number of bytes, got NoneType"),
        (lambda r, c, b: torch.zeros(2), "expected a number of bytes, got Tensor"),
    ],
)
def test_eager_softmax_bytes_names_the_mistake(wrong, message):
    refused(wrong, "eager_softmax_bytes", message)


def test_bytes_as_float_or_tensor_are_accepted():
    for kind in (float, torch.tensor):
        function = named(lambda r, c, b, kind=kind: kind(b * (8 * r * c + 4 * r)), "eager_softmax_bytes")
        assert check.attempt(function, chapter=2, strict=True) is function
