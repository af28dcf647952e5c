"""Chapter 12's layer, as the notebook shows it, against fp64 through the package's own cases."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.experts.reference import experts_reference
from gptoss_kernels.experts.routing import route
from gptoss_kernels.testing import ExpertsCase, assert_within_budget, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    ExpertsCase(),
    ExpertsCase(tokens=1, experts=2, top_k=1, intermediate=1),
    ExpertsCase(tokens=16, intermediate=32, hidden=64, top_k=4, size=0.5),
    ExpertsCase(routing="one", tokens=9),
    ExpertsCase(routing="sentinel", tokens=20),
    ExpertsCase(dtype=torch.float16, size=1.0),
]
KERNELS = {"bias_swiglu_kernel": CASES, "combine_kernel": CASES, "swiglu_backward_kernel": CASES}

_COUNTS = {"rows": "i32", "experts": "i32", "alpha": "fp32", "limit": "fp32", "expert": torch.int32}
_BLOCKS = {"INTERMEDIATE": 2880, "BLOCK_R": 16, "BLOCK_I": 32}
_HALF = dict.fromkeys(("hidden", "bias"), torch.bfloat16) | _COUNTS | _BLOCKS
_BACKWARD = _HALF | dict.fromkeys(("weight", "dact", "dhidden"), torch.bfloat16) | {"dweight": torch.float32}
_COMBINE = dict.fromkeys(("down", "bias", "weight", "out"), torch.bfloat16)
_COMBINE |= {"row_of_slot": torch.int32, "expert_of_slot": torch.int64, "experts": "i32"}
_COMBINE |= {"HIDDEN": 2880, "TOP_K": 4, "BLOCK": 64}
OFFLINE = {
    "bias_swiglu_kernel": [_HALF | {"act": torch.bfloat16}],
    "combine_kernel": [_COMBINE, _COMBINE | dict.fromkeys(("down", "bias", "weight", "out"), torch.float32)],
    "swiglu_backward_kernel": [_BACKWARD],
}


@pytest.fixture(scope="module")
def chapter():
    return extract.load("12_experts")


def problem(case):
    """Leaves x, w1, b1, w2, b2, weights; indices; the same leaves in fp64; y and gradients, plain and exact"""
    leaves, indices = case.inputs(DEVICE)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(3)).to(leaves[0])
    results = []
    for x, w1, b1, w2, b2, weights in (leaves, exact_leaves):
        y = experts_reference(x, w1, b1, w2, b2, indices, weights)
        results.append([y, *torch.autograd.grad(y, [x, weights], dy.to(y.dtype))])
    return leaves, indices, dy, *results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_and_its_gradients(chapter, case):
    leaves, indices, dy, plain, exact = problem(case)
    y = chapter.CourseExperts.apply(*leaves, indices)
    got = [y, *torch.autograd.grad(y, [leaves[0], leaves[5]], dy)]
    for name, mine, eager, wanted in zip(("y", "dx", "dweights"), got, plain, exact, strict=True):
        assert mine.dtype == case.dtype
        # Plain fp16 computes in fp32 inside: the kernels, whose products round, get the layer's own roundings.
        if case.dtype == torch.float32:
            assert_within_budget(name, mine, eager, wanted)
        assert relative_error(mine, wanted) < 20 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_the_rungs_before_it(chapter, case):
    leaves, indices, dy, plain, exact = problem(case)
    for function in (chapter.experts_loop, chapter.experts_sorted):
        y = function(*leaves, indices)
        got = [y, *torch.autograd.grad(y, [leaves[0], leaves[5]], dy)]
        for name, mine, eager, wanted in zip(("y", "dx", "dweights"), got, plain, exact, strict=True):
            assert_within_budget(f"{function.__name__} {name}", mine, eager, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_packages(chapter, case):
    _, indices = case.inputs(DEVICE)
    for mine, packaged in zip(chapter.sorted_rows(indices, case.experts), route(indices, case.experts), strict=True):
        assert torch.equal(mine, packaged) and mine.dtype == packaged.dtype


def test_two_runs_give_the_same_bits(chapter):
    leaves, indices = ExpertsCase().inputs(DEVICE)
    runs = [chapter.CourseExperts.apply(*leaves, indices) for _ in range(2)]
    grads = [torch.autograd.grad(y, [leaves[0], leaves[5]], torch.ones_like(y)) for y in runs]
    assert torch.equal(*runs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_bug_shows_beyond_the_limits_only(chapter):
    hidden = torch.randn(30, 20, dtype=torch.float64).clamp(-6, 6)
    assert torch.equal(chapter.swiglu_with_a_bug(hidden), chapter.swiglu(hidden))
    hidden[0, 1] = -8.0
    assert not torch.allclose(chapter.swiglu_with_a_bug(hidden), chapter.swiglu(hidden))


def test_swiglu_backward_by_finite_differences(chapter):
    hidden = 5 * torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    da = torch.ones(4, 6, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(chapter.swiglu(hidden), hidden, da)
    torch.testing.assert_close(chapter.swiglu_backward(hidden.detach(), da), wanted)


def test_useful_counts_whole_tiles(chapter):
    assert chapter.useful(1, 0.0, experts=8, top_k=2, tile=128)[0] == pytest.approx(1 / 128)
    assert chapter.useful(64, 0.0, experts=2, top_k=2, tile=64) == (1.0, 1.0)
