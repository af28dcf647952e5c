"""Chapter 13's exercises: right answers of any form are accepted, each known mistake gets its message."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import triton
import triton.language as tl

from gptoss_kernels.course import check

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def attempt(function, name):
    function.__name__ = name
    return check.attempt(function, chapter=13, strict=True)


def rejected(function, name, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(function, name)


def accepted(function, name):
    assert attempt(function, name) is function


# --------------------------------------------------------------------------------------------------- decode_e2m1


def signed(magnitude):
    return lambda code: -magnitude(code & 7) if code & 8 else magnitude(code & 7)


def parts(code):
    return code >> 1 & 3, code & 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: MAGNITUDES[c & 7], "the sign is ignored"),
        (lambda c: MAGNITUDES[c] if c < 8 else -MAGNITUDES[16 - c] if c > 8 else -6.0, "two's complement"),
        (signed(lambda c: 2.0 ** (parts(c)[0] - 1) * (1 + parts(c)[1] / 2)), "no hidden one"),
        (signed(lambda c: (0.0, 0.25, *MAGNITUDES[2:])[c]), "one too small"),
        (signed(lambda c: 2 * MAGNITUDES[c]), "bias of the exponent"),
        (
            signed(lambda c: 2.0 ** (parts(c)[0] - 1) * (1 + parts(c)[1]) if parts(c)[0] else parts(c)[1] / 2),
            "worth a half",
        ),
        (signed(lambda c: 2.0 ** ((c & 3) - 1) * (1 + (c >> 2) / 2) if c & 3 else (c >> 2) / 2), "mixed up"),
        (float, "the code itself"),
        (lambda c: MAGNITUDES[c & 7] * (1 if c <= 8 else -1), "minus zero"),
        (signed(lambda c: (*MAGNITUDES[:7], 8.0)[c]), "code 0111: expected 6.0"),
        (lambda c: None, "expected a number"),
    ],
)
def test_decode_e2m1_names_the_mistake(wrong, message):
    rejected(lambda code: wrong(code), "decode_e2m1", message)


def test_decode_e2m1_other_ways_to_be_right():
    accepted(lambda code: signed(lambda c: MAGNITUDES[c])(code), "decode_e2m1")


# ---------------------------------------------------------------------------------------------- dequantize_kernel


@triton.jit
def any_dequantize(
    blocks, scales, out, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr
):  # fmt: skip
    """Differently written: one row of the tile a weight, powers by exp2. WRONG names the line that is wrong."""
    expert = tl.program_id(2)
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WRONG == "first rows":
        row = tl.arange(0, BLOCK)[None, :]
    weight = tl.arange(0, 32)[:, None]
    index = (expert * ROWS + row) * GROUPS + group
    mask = row < ROWS
    byte = weight // 2
    nibble = weight % 2
    if WRONG == "halves":
        byte = weight % 16
        nibble = weight // 16
    if WRONG == "swapped":
        nibble = 1 - nibble
    source = index
    if WRONG == "first expert's blocks":
        source = row * GROUPS + group
    packed = tl.load(blocks + source * 16 + byte, mask=mask, other=0).to(tl.int32)
    code = (packed >> (4 * nibble)) & 15
    of_scale = index
    if WRONG == "first group's scale":
        of_scale = (expert * ROWS + row) * GROUPS
    if WRONG == "first row's scale":
        of_scale = row * 0 + expert * ROWS * GROUPS + group
    if WRONG == "first expert's scale":
        of_scale = row * GROUPS + group
    if WRONG == "scale order":
        of_scale = (expert * GROUPS + group) * ROWS + row
    scale = tl.load(scales + of_scale, mask=mask, other=127).to(tl.int32)
    bias: tl.constexpr = 128 if WRONG == "bias 128" else 126 if WRONG == "bias 126" else 127
    factor = tl.exp2((scale - bias).to(tl.float32))
    if WRONG == "shift":
        factor = (scale << 23).to(tl.float32, bitcast=True)
    if WRONG == "integer scale":
        factor = scale.to(tl.float32)
    if WRONG == "no scale":
        factor = factor * 0 + 1
    if WRONG == "divides":
        factor = 1.0 / factor
    exponent = (code >> 1) & 3
    mantissa = (code & 1).to(tl.float32)
    value = tl.exp2((exponent - 1).to(tl.float32)) * (1.0 + mantissa / 2)
    if WRONG != "hidden one":
        value = tl.where(exponent == 0, mantissa / 2, value)
    if WRONG == "codes":
        value = code.to(tl.float32)
    elif WRONG == "plus zero":
        value = tl.where((code > 8), -value, value)
    elif WRONG != "sign":
        value = tl.where(code >= 8, -value, value)
    value = value * factor
    if WRONG == "half":
        value = value * 0.5 + 1
    target = out + (expert * GROUPS * 32 + group * 32 + weight) * ROWS + row
    if WRONG == "transposed":
        target = out + (expert * ROWS + row) * GROUPS * 32 + group * 32 + weight
    stored = mask
    if WRONG == "low only":
        stored = mask & (weight % 2 == 0)
    if WRONG == "no mask":
        stored = row < ROWS + BLOCK
    if WRONG == "first group":
        target = out + (expert * GROUPS * 32 + weight) * ROWS + row
    if WRONG != "nothing":
        tl.store(target, value, mask=stored)


class Kernel(triton.runtime.KernelInterface):
    """A kernel with WRONG bound; launched as the checker launches a kernel."""

    def __init__(self, kernel, wrong):
        self.kernel, self.wrong = kernel, wrong

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.kernel[grid](*arguments, WRONG=self.wrong, **constants)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing", "nothing was written"),
        ("low only", "half of the weights"),
        ("first rows", "was not written"),
        ("first group", "was not written"),
        ("no mask", "wrote beside out|expected"),
        ("swapped", "the nibbles are swapped"),
        ("halves", "the 16 low nibbles come first"),
        ("no scale", "the scale is missing"),
        ("bias 128", "not 128"),
        ("bias 126", "not 126"),
        ("integer scale", "as an integer"),
        ("divides", "the scale divides"),
        ("sign", "the sign is missing"),
        ("codes", "the codes themselves"),
        ("hidden one", "no hidden one"),
        ("first group's scale", "all groups got"),
        ("first row's scale", "all rows got"),
        ("first expert's scale", "all experts got the first one's scales"),
        ("first expert's blocks", "all experts got the first one's blocks"),
        ("scale order", "in the order of out"),
        ("transposed", "written as"),
        ("shift", "the smallest scale"),
        ("plus zero", "minus zero lost its sign"),
        ("half", "expected .* with scale"),
    ],
)
def test_dequantize_names_the_mistake(wrong, message):
    rejected(Kernel(any_dequantize, wrong), "dequantize_kernel", message)


def test_dequantize_other_ways_to_be_right():
    accepted(Kernel(any_dequantize, "none"), "dequantize_kernel")


def test_dequantize_without_jit():
    rejected(lambda *arguments: None, "dequantize_kernel", "under @triton.jit")


# ------------------------------------------------------------------------------------------------ longest_context


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, f, n, c, t, o: m // ((min(2, n) if o else n) * c + t), "is not subtracted"),
        (lambda m, f, n, c, t, o: (m - f) // t, "the checkpoints are missing"),
        (lambda m, f, n, c, t, o: (m - f) // (c + t), "one checkpoint was counted"),
        (lambda m, f, n, c, t, o: (m - f) // ((min(2, n) if o else n) * c), "the transients are missing"),
        (lambda m, f, n, c, t, o: (m - f) // ((min(2, n) if o else n) * c + n * t), "counted for each layer"),
        (lambda m, f, n, c, t, o: (m - f) // (n * c + t), "the inputs of two layers stay"),
        (lambda m, f, n, c, t, o: (m - f) // ((0 if o else n) * c + t), "not none"),
        (lambda m, f, n, c, t, o: (m - f) // ((1 if o else n) * c + t), "not one"),
        (lambda m, f, n, c, t, o: (m - f) // ((2 if o else n) * c + t), "no second one"),
        (lambda m, f, n, c, t, o: (m - f) // (2 * c + t), "all layers' inputs stay"),
        (lambda m, f, n, c, t, o: -(-(m - f) // ((min(2, n) if o else n) * c + t)), "rounded up"),
        (lambda m, f, n, c, t, o: (m - f) / ((min(2, n) if o else n) * c + t), "a part of a token"),
        (lambda m, f, n, c, t, o: (m - f) // ((min(2, n) if o else n) * c + t), "the answer is 0"),
        (lambda m, f, n, c, t, o: 7, "expected .* got 7"),
        (lambda m, f, n, c, t, o: None, "expected a whole number"),
    ],
)
def test_longest_context_names_the_mistake(wrong, message):
    rejected(lambda *arguments: wrong(*arguments), "longest_context", message)


def test_longest_context_other_ways_to_be_right():
    def by_counting(memory, fixed, layers, checkpoint, transient, offload):
        kept = [checkpoint] * layers
        return int(max(memory - fixed, 0) / (sum(kept[:2] if offload else kept) + transient))

    accepted(by_counting, "longest_context")


# ------------------------------------------------------------------------------------------------------ in_chunks


def again(function, part):
    return checkpoint(function, part, use_reentrant=False)


def without_gradient(function, x, size):
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f, x, size: f(x), "tokens at once"),
        (lambda f, x, size: again(f, x), "tokens at once"),
        (lambda f, x, size: torch.cat([f(part) for part in x.split(size)]), "nothing was computed again"),
        (without_gradient, "cut off from autograd"),
        (lambda f, x, size: torch.cat([again(f, part).detach() for part in x.split(size)]), "cut off from autograd"),
        (
            lambda f, x, size: torch.cat([again(f, x[i * size : (i + 1) * size]) for i in range(len(x) // size)]),
            "1 tokens are missing",
        ),
        (lambda f, x, size: torch.cat([again(f, p) for p in reversed(x.split(size))]), "in their order"),
        (lambda f, x, size: torch.cat([again(f, p) for p in x.chunk(len(x))]), "8 calls for 8 tokens"),
        (lambda f, x, size: torch.cat([again(f, p) for p in x.split(size)], dim=1), "are missing|expected shape"),
        (lambda f, x, size: [again(f, p) for p in x.split(size)], "expected a tensor"),
        (lambda f, x, size: torch.cat([again(f, p.detach()) for p in x.split(size)]), "no gradient|gradient of x"),
        (
            lambda f, x, size: again(lambda y: torch.cat([f(p) for p in y.split(size)]), x) * 1.01,
            "is wrong",
        ),
    ],
)  # fmt: skip
def test_in_chunks_names_the_mistake(wrong, message):
    rejected(lambda *arguments: wrong(*arguments), "in_chunks", message)


def test_in_chunks_other_ways_to_be_right():
    def by_slices(function, x, size):
        found = []
        for start in range(0, x.shape[0], size):
            found.append(again(function, x[start : start + size]))
        return torch.concatenate(found)

    accepted(by_slices, "in_chunks")
