"""Chapter 06's exercises: right answers of any form are accepted, each known mistake gets its message."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_06


def attempt(function, name):
    function.__name__ = name
    return check.attempt(function, chapter=6, strict=True)


# ----------------------------------------------------------------------------------------------- dq_causal_kernel


@triton.jit
def any_dq(
    q, k, v, dout, lse, delta, dq, length, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MISTAKE: tl.constexpr,
):  # fmt: skip
    """Differently written: scores transposed, the scale on ds, exp2. MISTAKE names the line that is wrong."""
    start_m = tl.program_id(0) * BLOCK_M
    base = tl.program_id(1) * length * HEAD_DIM
    dim = tl.arange(0, HEAD_DIM)
    row = start_m + tl.arange(0, BLOCK_M)
    q_tile = tl.load(q + base + row[:, None] * HEAD_DIM + dim[None, :])
    do_tile = tl.load(dout + base + row[:, None] * HEAD_DIM + dim[None, :])
    row_lse = tl.load(lse + tl.program_id(1) * length + row)
    row_delta = tl.load(delta + tl.program_id(1) * length + row)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    end = start_m + BLOCK_M
    if MISTAKE == "diagonal":
        end = start_m
    if MISTAKE == "no mask" or MISTAKE == "future":
        end = length
    if MISTAKE == "one":
        end = start_m + 1
    if MISTAKE == "block_n":
        end = start_m + BLOCK_N
    step = BLOCK_N
    if MISTAKE == "step":
        step = BLOCK_M
    for start_n in range(0, end, step):
        key = start_n + tl.arange(0, BLOCK_N)
        stored = key < length
        if MISTAKE == "stuck":
            key = tl.arange(0, BLOCK_N)
        k_tile = tl.load(k + base + key[:, None] * HEAD_DIM + dim[None, :], mask=stored[:, None], other=0.0)
        v_tile = tl.load(v + base + key[:, None] * HEAD_DIM + dim[None, :], mask=stored[:, None], other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if MISTAKE != "scores":
            scores *= scale
        if MISTAKE != "lse":
            scores -= row_lse[None, :]
        p = tl.exp2(scores * 1.4426950408889634)
        if MISTAKE == "strict":
            p = tl.where(key[:, None] < row[None, :], p, 0.0)
        elif MISTAKE == "future":
            p = tl.where(key[:, None] >= row[None, :], p, 0.0)
        elif MISTAKE != "no mask" and MISTAKE != "no mask, right loop":
            p = tl.where(key[:, None] <= row[None, :], p, 0.0)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        if MISTAKE == "plus delta":
            dp += row_delta[None, :]
        elif MISTAKE == "scaled delta":
            dp -= row_delta[None, :] * scale
        elif MISTAKE != "delta":
            dp -= row_delta[None, :]
        ds = p * dp
        if MISTAKE == "no p":
            ds = tl.where(key[:, None] <= row[None, :], dp, 0.0)
        if MISTAKE == "p":
            ds = p
        if MISTAKE != "scale":
            ds *= scale
        factor = k_tile
        if MISTAKE == "v":
            factor = v_tile
        if MISTAKE != "no cast":
            ds = ds.to(factor.dtype)
        product = tl.dot(tl.trans(ds), factor, input_precision="ieee")
        if MISTAKE == "last":
            acc = product
        elif MISTAKE != "first" or start_n == 0:
            acc += product
    if MISTAKE == "twice":
        acc *= scale
    if MISTAKE == "nan":
        acc += float("nan")
    if MISTAKE == "half":
        acc *= 1.1
    if MISTAKE == "half sum":
        if q.dtype.element_ty == tl.float16:
            acc *= 1.1
    target = dq + base + row[:, None] * HEAD_DIM + dim[None, :]
    if MISTAKE == "beside":
        target += HEAD_DIM
    if MISTAKE == "some rows":
        tl.store(target, acc, mask=row[:, None] < start_m + BLOCK_M - 1)
    elif MISTAKE != "no store":
        tl.store(target, acc)


class Attempt(triton.runtime.KernelInterface):
    """any_dq with a mistake, launched as a learner's kernel is."""

    __name__ = "dq_causal_kernel"

    def __init__(self, mistake):
        self.mistake = mistake

    def run(self, *args, grid, warmup, **constants):
        return any_dq[grid](*args, **constants, MISTAKE=self.mistake)


def test_dq_kernel_differently_written_is_accepted():
    check.attempt(Attempt(""), chapter=6, strict=True)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("scale", "scale is missing"),
        ("twice", "applied twice"),
        ("no mask", "the mask is missing: queries"),
        ("no mask, right loop", "the mask is missing in the last tiles"),
        ("strict", "hides a query's own key"),
        ("future", "wrong way round"),
        ("diagonal", "ends before the diagonal"),
        ("one", r"the first query's key: it has to reach start_m \+ BLOCK_M"),
        ("block_n", r"the first query's key: it has to reach start_m \+ BLOCK_M"),
        ("last", "only the last tile"),
        ("first", "only the first tile"),
        ("delta", "delta is missing"),
        ("plus delta", "delta is added"),
        ("scaled delta", "delta is scaled"),
        ("no p", "p is missing"),
        ("p", "takes dS, not P"),
        ("lse", "lse is missing"),
        ("scores", "scores in p are not scaled"),
        ("v", "takes K, not V"),
        ("nan", "NaN or infinity"),
        ("some rows", "row 31 of head 0 was not written, with BLOCK_M=32"),
        ("no store", "nothing was written"),
        ("beside", "wrote beside its own tile"),
        ("half", r"with BLOCK_M=32, BLOCK_N=16, row \d+ of head 0: expected dq \["),
        ("step", "start_n moves on by BLOCK_M"),
        ("no cast", "fails on half-precision inputs: round ds"),
        ("half sum", "right on fp32 inputs, but on fp16"),
        ("stuck", "expected dq"),
    ],
)
def test_dq_kernel_names_the_mistake(mistake, message):
    with pytest.raises(check.Mistake, match=message):
        check.attempt(Attempt(mistake), chapter=6, strict=True)


def test_dq_kernel_must_be_a_kernel():
    with pytest.raises(check.Mistake, match="@triton.jit"):
        attempt(lambda q, k: q, "dq_causal_kernel")


@triton.jit
def dq_causal_kernel(
    q, k, v, dout, lse, delta, dq, length, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    tl.static_assert(False, "your turn")


def test_dq_kernel_stub_is_not_attempted(capsys):
    assert check.attempt(dq_causal_kernel, chapter=6, strict=False) is chapter_06.dq_causal_kernel
    assert "not attempted yet" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- query_range


def by_looking(start_n, block_m, block_n, q_len, kv_len, sliding_window=None):
    """Right, in another form: an exact end, an empty range where nobody sees the tile."""
    rows = [
        row
        for row in range(q_len)
        for key in range(start_n, min(start_n + block_n, kv_len))
        if 0 <= row + kv_len - q_len - key < (sliding_window or kv_len)
    ]
    return (min(rows) // block_m * block_m, max(rows) + 1) if rows else (0, 0)


def tensors(*args):
    return torch.tensor(by_looking(*args)[0]), torch.tensor(by_looking(*args)[1])


@pytest.mark.parametrize("right", [by_looking, tensors, lambda *args: list(by_looking(*args))])
def test_query_range_in_another_form_is_accepted(right):
    attempt(lambda *args: right(*args), "query_range")


@pytest.mark.parametrize("message", chapter_06._wrong_ranges())
def test_query_range_names_the_mistake(message):
    with pytest.raises(check.Mistake) as caught:
        attempt(chapter_06._wrong_ranges()[message], "query_range")
    assert str(caught.value).startswith(message) and "visits" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda start_n, block_m, *rest: start_n, "expected two ints"),
        (lambda start_n, block_m, *rest: (start_n / block_m, 3), "expected two ints .* divide with //"),
        (lambda *args: ("a", "b"), "expected two ints"),
        (lambda *args: (0, 0), "the loop has to visit"),
    ],
)
def test_query_range_says_what_was_expected(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(wrong, "query_range")


# ------------------------------------------------------------------------------------------------ empty_gradients


def heads_last(k, v):
    """As the package allocates."""
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (k, v))


def one_storage(k, v):
    if k.dtype != v.dtype:
        return filled(k, v)
    return tuple(torch.empty(2, *k.shape, dtype=k.dtype, device=k.device))


def filled(k, v):
    return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]


@pytest.mark.parametrize("right", [heads_last, one_storage, filled])
def test_empty_gradients_in_another_form_is_accepted(right):
    attempt(lambda k, v: right(k, v), "empty_gradients")


def as_strided(k, v):
    return tuple(torch.empty(1000, dtype=k.dtype, device=k.device).as_strided(k.shape, k.stride()) for _ in "kv")


def overlapping(k, v):
    return tuple(torch.empty(1000, dtype=k.dtype, device=k.device).as_strided(k.shape, (24, 4, 4, 1)) for _ in "kv")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda k, v: (torch.zeros_like(k), torch.zeros_like(v)), "the strides differ, with k contiguous"),
        (lambda k, v: (torch.empty_like(k), torch.empty_like(k)), "the last stride is not 1"),
        (as_strided, "the last stride is not 1|share memory"),
        (overlapping, "elements share memory"),
        (lambda k, v: (k.new_empty(1).expand(k.shape),) * 2, "the last stride is not 1"),
        (lambda k, v: (k.new_empty(k.shape[-1]).expand(k.shape),) * 2, "elements share memory"),
        (lambda k, v: (k.new_empty(k.shape),) * 2, "they are two tensors"),
        (lambda k, v: (k.contiguous(), v.contiguous()), "shares memory with k or v"),
        (lambda k, v: k.new_empty(k.shape), "expected two tensors"),
        (lambda k, v: (k.new_empty(k.shape), None), "dv: expected a tensor, got NoneType"),
        (lambda k, v: (k.new_empty(k.shape), v.new_empty(v.shape[1:])), r"dv: expected shape \(2, 2, 6, 4\)"),
        (lambda k, v: (torch.empty(k.shape), torch.empty(v.shape)), "dk: expected torch.float16"),
        (
            lambda k, v: tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in "kv"),
            "dv: expected torch.float32 on cpu, got torch.float16",
        ),
        (lambda k, v: tuple(torch.empty(x.shape, dtype=x.dtype) for x in (k, v)), "on meta"),
    ],
)
def test_empty_gradients_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(wrong, "empty_gradients")
