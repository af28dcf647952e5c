"""Chapter 07's checkers: each known mistake gets its own message, and a right answer may be written differently."""

import pytest
import torch

pytest.importorskip("triton")

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_07
from gptoss_kernels.course.solutions.chapter_07 import _empty_heads_last, _run_backward


def attempt(name, function):
    function.__name__ = name
    return check.attempt(function, chapter=7, strict=True)


# ------------------------------------------------------------------------------------------------------------- backward


def run(ctx, dout, scale=None, window="own"):
    dout = dout.contiguous()
    window = ctx.window if window == "own" else window
    return list(_run_backward(dout, *ctx.saved_tensors, scale or ctx.scale, window))


def swapped(ctx, dout, dlse):
    dq, dk, dv, dsinks = run(ctx, dout)
    return dq, dv, dk, dsinks, None, None


def sinks_first(ctx, dout, dlse):
    dq, dk, dv, dsinks = run(ctx, dout)
    return dsinks, dq, dk, dv, None, None


def trusting(ctx, dout, dlse):
    if 0 in dout.stride():
        dout = dout.contiguous()
    return *_run_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.window), None, None


def half_trusting(ctx, dout, dlse):  # copies transposed ones only; what it does with an expanded one stays in bounds
    if dout.stride(-1) == 0:
        return *run(ctx, 2 * dout), None, None
    return *run(ctx, dout), None, None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda ctx, dout, dlse: None, "is there a return"),
        (lambda ctx, dout, dlse: dout, "expected a tuple"),
        (lambda ctx, dout, dlse: tuple(run(ctx, dout)), "None stands in their places"),
        (lambda ctx, dout, dlse: (*run(ctx, dout), None), "expected 6 values"),
        (lambda ctx, dout, dlse: (None, None, *run(ctx, dout)), "dq: expected a tensor in place 0, got NoneType"),
        (lambda ctx, dout, dlse: (*run(ctx, dout), dout, None), "are no tensors"),
        (swapped, "dv stands in dk's place"),
        (sinks_first, "dsinks stands in dq's place"),
        (lambda ctx, dout, dlse: (*run(ctx, dout, window=None), None, None), "ctx.window was not"),
        (lambda ctx, dout, dlse: (*run(ctx, dout, scale=0.25), None, None), "ctx.scale was not"),
        (lambda ctx, dout, dlse: (*(2 * g for g in run(ctx, dout)), None, None), "the relative error is"),
        (lambda ctx, dout, dlse: (*(g[None] for g in run(ctx, dout)), None, None), "has its input's shape"),
        (trusting, "whose last stride is not 1"),
        (half_trusting, "every stride 0"),
    ],
)
def test_attention_backward_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt("attention_backward", wrong)


def test_attention_backward_accepts_another_way():
    def right(ctx, dout, dlse):
        gradients = _run_backward(dout.clone(memory_format=torch.contiguous_format), *ctx.saved_tensors, 0.3, 9)
        return [gradient.clone() for gradient in gradients] + [None, None]

    assert attempt("attention_backward", right) is right


# ----------------------------------------------------------------------------------------------------------------- fake


def lse_of(q, dtype=torch.float32, shape=None, device=None):
    return torch.empty(q.shape[:3] if shape is None else shape, dtype=dtype, device=device or q.device)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, *rest: None, "two tensors"),
        (lambda q, *rest: _empty_heads_last(q), "two tensors"),
        (lambda q, *rest: (q, lse_of(q)), "share no memory"),
        (lambda q, k, *rest: (_empty_heads_last(k), lse_of(q)), "out: expected q's shape"),
        (lambda q, *rest: (_empty_heads_last(q.float()), lse_of(q)), "out: expected q's dtype"),
        (lambda q, *rest: (torch.empty_like(q), lse_of(q)), "empty_like copies the layout"),
        (lambda q, *rest: (q.new_empty(q.shape), lse_of(q)), "out is contiguous"),
        (lambda q, *rest: (q.new_empty(q.shape[::-1]).permute(3, 2, 1, 0), lse_of(q)), "out: expected strides"),
        (lambda q, *rest: (_empty_heads_last(q), lse_of(q, q.dtype)), "torch.float32 whatever"),
        (lambda q, *rest: (_empty_heads_last(q), lse_of(q, shape=(*q.shape[:3], 1))), "keep no dimension"),
        (lambda q, *rest: (_empty_heads_last(q), lse_of(q, shape=q.shape[:2])), "lse: expected \\(batch"),
        (lambda q, *rest: (_empty_heads_last(q), lse_of(q, device="cpu")), "torch.empty does not"),
        (lambda q, *rest: (_empty_heads_last(q), lse_of(q).mT.contiguous().mT), "lse: expected strides"),
        (lambda q, *rest: (_empty_heads_last(q) * q.max().item(), lse_of(q)), "without data"),
    ],
)
def test_attention_forward_fake_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt("attention_forward_fake", wrong)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_launching_in_a_fake_is_told():
    with pytest.raises(check.Mistake, match="must not launch"):
        attempt("attention_forward_fake", lambda *arguments: chapter_07._run_forward(*arguments))


def test_attention_forward_fake_accepts_another_way():
    def right(q, k, v, sinks, scale, window):
        batch, heads, length, head_dim = q.shape
        out = torch.empty_strided(
            q.shape,
            (length * heads * head_dim, head_dim, heads * head_dim, 1),
            dtype=q.dtype,
            device=q.device,
        )
        return [out, torch.zeros(batch, heads, length, device=q.device)]

    assert attempt("attention_forward_fake", right) is right


# --------------------------------------------------------------------------------------------------------------- counts


def counted(pairs, products=lambda backward: 5 if backward else 2):
    def attention_flops(tokens, heads, head_dim, window=None, backward=False):
        return products(backward) * 2 * head_dim * heads * pairs(tokens, window)

    return attention_flops


def seen(tokens, window=None):
    return sum(min(i + 1, window or tokens) for i in range(tokens))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *_, **__: None, "expected a number"),
        (counted(lambda n, w: n * n), "whole square"),
        (counted(lambda n, w: n * n / 2), "half of the diagonal"),
        (counted(lambda n, w: n * (n - 1) // 2), "the diagonal is missing"),
        (counted(seen, lambda backward: 1), "two FLOPs"),
        (lambda n, h, d, window=None, backward=False: 4 * d * seen(n), "heads are missing"),
        (counted(lambda n, w: 7), "expected 2880 \\(15 pairs a head\\), got 1344"),
        (counted(lambda n, w: seen(n) if w is None else n * w), "first rows see fewer"),
        (counted(lambda n, w: seen(n, w and w + 1)), "counts the query's own"),
        (counted(lambda n, w: seen(n)), "window is ignored"),
        (counted(lambda n, w: seen(n) if w is None else 8), "rows see 1, 2, 2, 2, 2 keys"),
        (counted(lambda n, w: seen(n) if w is None else n * w - w * (w - 1) // 2), "longer than the text"),
        (counted(seen, lambda backward: 2), "backward is ignored"),
        (counted(seen, lambda backward: 4 if backward else 2), "not four"),
        (counted(seen, lambda backward: 7 if backward else 2), "backward alone"),
        (counted(seen, lambda backward: 3 if backward else 2), "backward, 5 tokens"),
        (counted(lambda n, w: seen(n, w) if n < 99 else 2.0**33), "not exact"),
    ],
)
def test_attention_flops_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt("attention_flops", wrong)


def test_attention_flops_accepts_a_sum():
    right = counted(seen)
    assert attempt("attention_flops", right) is right


# ------------------------------------------------------------------------------------------------------------ occupancy


def limits(registers, shared, num_warps):
    per_warp = -(-32 * registers // 256) * 256
    return 65536 // (per_warp * num_warps), 228 * 1024 // (shared + 1024), 64 // num_warps


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda r, s, w: None, "expected a whole number"),
        (lambda r, s, w: min(65536 / (32 * r * w), 228 * 1024 / (s + 1024), 64 / w) + 0.5, "divide with //"),
        (lambda r, s, w: min(limits(r, s, w)[1:]), "warps and shared memory allow"),
        (lambda r, s, w: max(limits(r, s, w)), "the smallest counts"),
        (lambda r, s, w: min(65536 // (r * w), *limits(r, s, w)[1:]), "a block has 32"),
        (lambda r, s, w: min(limits(r, s, w)[0], limits(r, s, w)[2]), "shared memory is missing"),
        (lambda r, s, w: min(limits(r, s, w)[:2]), "64 warps is missing"),
        (lambda r, s, w: min(65536 // (32 * r * w), *limits(r, s, w)[1:]), "units of 256"),
        (lambda r, s, w: min(limits(r, s, w)[0], 228 * 1024 // max(s, 1), 64 // w), "1 KiB of shared memory more"),
        (lambda r, s, w: min(limits(r, s, w)[0], 227 * 1024 // (s + 1024), 64 // w), "227 is the most for one"),
        (lambda r, s, w: 1, "expected 2 blocks, got 1"),
    ],
)
def test_blocks_per_sm_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        attempt("blocks_per_sm", wrong)


def test_blocks_per_sm_accepts_other_ways():
    def right(registers, shared, num_warps):
        rounded = (registers + 7) // 8 * 8
        warps = min(64, 4 * (16384 // (32 * rounded)))  # four partitions of 16,384 registers
        return float(min(warps // num_warps, 233472 // (shared + 1024)))

    assert attempt("blocks_per_sm", right) is right
