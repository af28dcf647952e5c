"""Chapter 06's kernels and launchers against fp64, through the package's own cases."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_concat, attention_reference
from gptoss_kernels.testing import (
    AttentionCase,
    assert_within_budget,
    exact_attention,
    fenced,
    relative_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("dq", "dk", "dv", "dsinks")

# First rungs: one head count, whole tiles.
CAUSAL = [
    AttentionCase(q_len=64, q_heads=2, kv_heads=2),
    AttentionCase(q_len=128, q_heads=1, kv_heads=1, head_dim=32, batch=2, sinks=False),
    AttentionCase(q_len=64, q_heads=2, kv_heads=2, dtype=torch.float16),
]
# Last rungs: grouped heads, lengths around a tile's edge, windows, decoding.
ANY = [
    AttentionCase(q_len=1),
    AttentionCase(q_len=64),
    AttentionCase(),
    AttentionCase(q_len=70, sinks=False, batch=2),
    AttentionCase(q_len=33, head_dim=32, q_heads=8, kv_heads=1),
    AttentionCase(q_len=33, head_dim=64, q_heads=2, kv_heads=2, window=8),
    AttentionCase(q_len=33, head_dim=128, q_heads=2, kv_heads=1, window=16),
    AttentionCase(window=2),
    AttentionCase(window=33),
    AttentionCase(window=1000),
    AttentionCase(q_len=1, kv_len=71, batch=2),
    AttentionCase(q_len=1, kv_len=71, window=20),
    AttentionCase(q_len=37, kv_len=71),
    AttentionCase(q_len=5, kv_len=71, window=20),
    AttentionCase(dtype=torch.float16),
    AttentionCase(dtype=torch.float16, window=9, q_len=37, kv_len=71),
]
KERNELS = {
    "delta_kernel": ANY,
    "dkdv_causal_kernel": CAUSAL,
    "dq_causal_kernel": CAUSAL,
    "dkdv_kernel": ANY,
    "dq_kernel": ANY,
}

_BF16 = dict.fromkeys(("q", "k", "v", "dout", "out", "sinks", "dq", "dk", "dv"), torch.bfloat16)
_KNOWN = _BF16 | dict.fromkeys(("lse", "delta", "dsinks_partial"), torch.float32)
_KNOWN |= {"scale": "fp32", "length": "i32:16"}
_KNOWN |= dict.fromkeys(("q_heads", "kv_heads", "q_len", "kv_len", "window"), "i32")


def _arguments(names, **constants):
    strides = {f"stride_{tensor}{axis}": "i32:16" for tensor in "qkvdog" for axis in "bhmn"}
    known = _KNOWN | strides
    return {name: known[name] for name in names.split()} | constants


_STRIDES = "stride_qb stride_qh stride_qm stride_db stride_dh stride_dm stride_kb stride_kh stride_kn "
_STRIDES += "stride_vb stride_vh stride_vn stride_gb stride_gh "
_DKDV, _DQ = dict(BLOCK_M=32, BLOCK_N=64), dict(BLOCK_M=64, BLOCK_N=32)
_DELTA = "out dout lse delta sinks dsinks_partial stride_ob stride_oh stride_om "
_DELTA += "stride_db stride_dh stride_dm q_heads q_len"
OFFLINE = {
    "delta_kernel": [
        _arguments(_DELTA, HEAD_DIM=64, BLOCK_M=64, HAS_SINKS=True),
        _arguments(_DELTA, HEAD_DIM=64, BLOCK_M=64, HAS_SINKS=False) | {"sinks": None, "dsinks_partial": None},
    ],
    "dkdv_causal_kernel": [_arguments("q k v dout lse delta dk dv length scale", HEAD_DIM=64, **_DKDV)],
    "dq_causal_kernel": [_arguments("q k v dout lse delta dq length scale", HEAD_DIM=64, **_DQ)],
    "dkdv_kernel": [
        _arguments(
            "q dout k v lse delta dk dv " + _STRIDES + "stride_gn kv_heads q_len kv_len window scale",
            GROUP=8, HEAD_DIM=64, **_DKDV,
        )
    ],
    "dq_kernel": [
        _arguments(
            "q dout k v lse delta dq " + _STRIDES + "stride_gm q_heads q_len kv_len window scale",
            GROUP=8, HEAD_DIM=64, **_DQ,
        )
    ],
}  # fmt: skip
# Triton compiles a kernel anew where an integer is 1, as a constant: decoding one token, a cache of one token.
OFFLINE["delta_kernel"].append(OFFLINE["delta_kernel"][0] | {"q_len": 1})
OFFLINE["dkdv_kernel"].append(OFFLINE["dkdv_kernel"][0] | dict.fromkeys(("q_len", "kv_len", "window", "kv_heads"), 1))
OFFLINE["dq_kernel"].append(OFFLINE["dq_kernel"][0] | {"q_len": 1})


@pytest.fixture(scope="module")
def chapter():
    return extract.load("06_flash_backward")


def problem(case):
    """Inputs, (out, lse) of the package's forward kernel, dout, eager gradients, exact gradients."""
    inputs, keywords = case.inputs(DEVICE)
    with torch.no_grad():
        out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
    generator = torch.Generator(DEVICE).manual_seed(1)
    dout = torch.randn(out.transpose(1, 2).shape, device=DEVICE, generator=generator).to(case.dtype).transpose(1, 2)
    concat, _ = attention_concat(*inputs, **keywords, compute_dtype=case.dtype)
    eager = torch.autograd.grad(concat, inputs, dout)
    exact = exact_attention(inputs, dout, **keywords)[2:]
    return [x.detach() for x in inputs], (out, lse), dout, eager, exact


def check(name, actual, eager, exact, dtype):
    if name == "dsinks":
        assert relative_error(actual, exact) <= (1e-4 if dtype == torch.float32 else 1e-2)
    else:
        assert_within_budget(name, actual, eager, exact)


def backward(chapter, case, inputs, saved, dout):
    q, k, v, sinks = (*inputs, None)[:4]
    return chapter.flash_backward(dout, q, k, v, sinks, *saved, sliding_window=case.window)


@pytest.mark.parametrize("case", ANY, ids=str)
def test_flash_backward(chapter, case):
    inputs, saved, dout, eager, exact = problem(case)
    gradients = backward(chapter, case, inputs, saved, dout)
    assert (gradients[3] is None) == (not case.sinks)
    for name, actual, e, x in zip(NAMES, gradients, eager, exact, strict=False):
        assert actual.dtype == case.dtype
        check(name, actual, e, x, case.dtype)


def test_a_window_of_one_key(chapter):
    # With one key a row, dP - delta = (1 - p) dP is a small difference of large numbers, and delta comes from a rounded
    # output: the budget of an eager softmax is too small for it. (The package's kernels are over it too.)
    case = AttentionCase(window=1)
    inputs, saved, dout, _, exact = problem(case)
    for actual, x in zip(backward(chapter, case, inputs, saved, dout), exact, strict=True):
        assert relative_error(actual, x) < 20 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_first_rungs(chapter, case):
    inputs, (out, lse), dout, eager, exact = problem(case)
    q, k, v, sinks = (*inputs, None)[:4]
    delta, dsinks = chapter.compute_delta(dout, out, lse, sinks)
    scale = case.head_dim**-0.5
    dk, dv = chapter.dkdv_causal(dout, q, k, v, lse, delta, scale)
    dq = chapter.dq_causal(dout, q, k, v, lse, delta, scale)
    for name, actual, e, x in zip(NAMES, (dq, dk, dv, dsinks), eager, exact, strict=False):
        check(name, actual, e, x, case.dtype)


@pytest.mark.parametrize("case", [AttentionCase(), AttentionCase(q_len=37, kv_len=71, window=9)], ids=str)
def test_reads_nothing_beside_its_inputs(chapter, case):
    inputs, saved, dout, *_ = problem(case)
    plain = backward(chapter, case, inputs, saved, dout)
    q, k, v, sinks = (fenced(x) if x.dim() == 4 else x for x in inputs)
    fences = [q, k, v, sinks], (fenced(saved[0]), saved[1]), fenced(dout)
    assert all(map(torch.equal, plain, backward(chapter, case, *fences)))


def test_scale_and_an_expanded_gradient(chapter):
    inputs, keywords = AttentionCase(q_len=40).inputs(DEVICE)
    out, lse = attention_reference(*inputs, scale=0.5)
    dout = torch.ones((), device=DEVICE).expand(out.shape)  # what .sum() hands back: strides of 0
    exact = exact_attention(inputs, dout, scale=0.5)[2:]
    detached = [x.detach() for x in inputs]
    gradients = chapter.flash_backward(dout, *detached, out.detach(), lse.detach(), scale=0.5)
    for actual, x in zip(gradients, exact, strict=True):
        assert relative_error(actual, x) < 1e-5


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("k_transposed", [False, True])
@pytest.mark.parametrize("v_transposed", [False, True])
def test_every_layout_but_the_padded_launcher(chapter, length, k_transposed, v_transposed):
    case = AttentionCase(q_len=length, q_heads=2)
    inputs, saved, dout, _, exact = problem(case)
    q, k, v, sinks = inputs
    k, v = chapter.laid_out(k, k_transposed), chapter.laid_out(v, v_transposed)
    assert k.is_contiguous() != k_transposed and v.is_contiguous() != v_transposed
    gradients = backward(chapter, case, [q, k, v, sinks], saved, dout)
    for actual, x in zip(gradients, exact, strict=True):
        assert relative_error(actual, x) < 1e-5
    delta, _ = chapter.compute_delta(dout, *saved, sinks)
    dk, dv = chapter.dkdv_padded(dout, q, k, v, saved[1], delta, case.head_dim**-0.5)
    assert relative_error(dk, exact[1]) < 1e-5
    bug = length == 64 and k_transposed != v_transposed  # whole tiles, layouts that differ
    assert (relative_error(dv, exact[2]) > 0.5) == bug


@pytest.mark.parametrize("case", [AttentionCase(q_len=40), AttentionCase(q_len=40, window=9)], ids=str)
def test_two_runs_are_bitwise_equal(chapter, case):
    inputs, saved, dout, *_ = problem(case)
    first, second = (backward(chapter, case, inputs, saved, dout) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_budget_notices_a_wrong_window(chapter):
    case = AttentionCase(window=20)
    inputs, saved, dout, eager, exact = problem(case)
    wrong = backward(chapter, dataclasses.replace(case, window=21), inputs, saved, dout)
    for name, actual, e, x in zip(NAMES[:3], wrong, eager, exact, strict=False):
        with pytest.raises(AssertionError, match="over the budget"):
            assert_within_budget(name, actual, e, x)


def test_counts(chapter):
    assert chapter.count_masked(128, None) == (4, 6)
    position = torch.arange(256)
    distance = position[:, None] - position[None, :]
    for window in (None, 40):
        seen = (distance >= 0) & (distance < (window or 256))
        tiles = seen.unfold(0, 32, 32).unfold(1, 64, 64).flatten(2)
        visited = tiles.any(-1)
        assert chapter.count_masked(256, window) == ((visited & ~tiles.all(-1)).sum(), visited.sum())
