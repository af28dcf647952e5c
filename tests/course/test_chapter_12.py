"""Chapter 12's exercises: right answers of any form are accepted, each known mistake gets its message."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gptoss_kernels.course import check


def attempt(function, name):
    function.__name__ = name
    return check.attempt(function, chapter=12, strict=True)


def rejected(function, name, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(function, name)


def accepted(function, name):
    assert attempt(function, name) is function


# ------------------------------------------------------------------------------------------------- sort_by_expert


def right_slot(indices):
    return indices.flatten().sort(stable=True).indices


def unstable(indices):
    backwards = right_slot(indices).flip(0)
    return backwards[indices.flatten()[backwards].argsort(stable=True)]


def right_ends(indices, experts):
    return torch.bincount(indices.flatten(), minlength=experts + 1)[:experts].cumsum(0)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (lambda i, n: right_slot(i).argsort(), "the inverse"),
        (lambda i, n: right_slot(i) // 2, "holds tokens"),
        (lambda i, n: i.flatten().sort().values, "holds the sorted experts"),
        (lambda i, n: torch.arange(i.numel()), "not sorted"),
        (lambda i, n: i.T.flatten().sort(stable=True).indices, "choice by choice"),
        (lambda i, n: right_slot(i)[: (i < n).sum()], "the sentinel's slots stay"),
        (lambda i, n: right_slot(i).view_as(i), "expected slot of shape"),
        (lambda i, n: unstable(i), "keeps their order"),
        (lambda i, n: right_slot(i) * 0, "every slot has to appear once"),
        (lambda i, n: (-i).flatten().sort(stable=True).indices, "expected slot"),
        (lambda i, n: right_slot(i).float(), "expected a tensor of integers"),
    ],
)  # fmt: skip
def test_slot_names_the_mistake(slot, message):
    rejected(lambda i, n: (slot(i, n), right_ends(i, n)), "sort_by_expert", message)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (lambda i, n: right_ends(i, n).diff(prepend=torch.zeros(1, dtype=torch.long)), "holds counts"),
        (lambda i, n: torch.cat([torch.zeros(1).long(), right_ends(i, n)[:-1]]), "where the experts begin"),
        (lambda i, n: right_ends(i, n) - 1, "the last slots themselves"),
        (lambda i, n: torch.cat([torch.zeros(1).long(), right_ends(i, n)]), "begins with a 0"),
        (lambda i, n: right_ends(i, n + 1), "the sentinel is no expert"),
        (lambda i, n: torch.unique_consecutive(right_ends(i, n)), "one an expert, hit or not"),
        (lambda i, n: right_ends(i, n) + 1, "expected ends"),
        (lambda i, n: right_ends(i, n).tolist(), "expected a tensor of integers"),
        (lambda i, n: torch.tensor([3, 3, 7, 9]) if n == 4 else right_ends(i, n).flip(0), "all slots go to the last"),
    ],
)
def test_ends_name_the_mistake(ends, message):
    rejected(lambda i, n: (right_slot(i), ends(i, n)), "sort_by_expert", message)


def test_sort_by_expert_other_ways_to_be_right():
    accepted(lambda i, n: (i.flatten().argsort(stable=True), right_ends(i, n).int()), "sort_by_expert")

    def by_loops(indices, experts):
        flat = indices.flatten().tolist()
        slot = [s for e in range(experts + 1) for s, own in enumerate(flat) if own == e]
        return torch.tensor(slot), torch.tensor([sum(own <= e for own in flat) for e in range(experts)])

    accepted(by_loops, "sort_by_expert")
    rejected(lambda i, n: right_slot(i), "sort_by_expert", "expected a pair")


# ------------------------------------------------------------------------------------------------- combine_kernel


@triton.jit
def any_combine(
    down, bias, weight, row_of_slot, expert_of_slot, out, experts,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """Differently written: masks instead of a branch. WRONG names the line that is wrong."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WRONG == "first block":
        column = tl.arange(0, BLOCK)
    if WRONG == "tokens":
        token = token * 0
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    if WRONG == "half":
        acc = acc.to(down.dtype.element_ty)
    choices: tl.constexpr = 1 if WRONG == "first choice" else TOP_K
    for choice in tl.static_range(choices):
        slot = token * TOP_K + choice
        own = tl.load(expert_of_slot + slot)
        row = tl.load(row_of_slot + slot)
        if WRONG == "slot":
            row = slot
        end = tl.where(own < experts, HIDDEN, 0)
        if WRONG == "sentinel":
            end = HIDDEN
        mask = column < end
        part = tl.load(down + row * HIDDEN + column, mask=mask, other=0.0)
        if WRONG != "half":
            part = part.to(tl.float32)
        w = tl.load(weight + slot)
        if WRONG == "one weight":
            w = tl.load(weight + token * TOP_K)
        if WRONG == "one bias":
            own = tl.load(expert_of_slot + token * TOP_K)
        b = tl.load(bias + own * HIDDEN + column, mask=mask, other=0.0)
        if WRONG == "bias":
            b = b * 0
        if WRONG == "unweighted":
            w = w * 0 + 1
        if WRONG == "bias unweighted":
            part = w * part + b
        else:
            part = w * (part + b)
        if WRONG == "last choice":
            acc = part
        else:
            acc += part
    if WRONG == "mean":
        acc = acc / TOP_K
    if WRONG == "minus":
        acc = -acc
    stored = column < HIDDEN
    if WRONG == "store":
        stored = column < HIDDEN + BLOCK
    if WRONG != "nothing written":
        tl.store(out + token * HIDDEN + column, acc.to(out.dtype.element_ty), mask=stored)


class Kernel(triton.runtime.KernelInterface):
    """A kernel with WRONG bound; launched as the checker launches a kernel."""

    def __init__(self, kernel, wrong):
        self.kernel, self.wrong = kernel, wrong

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.kernel[grid](*arguments, WRONG=self.wrong, **constants)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing written", "nothing was written"),
        ("first block", r"program_id\(0\) is the token"),
        ("tokens", r"program_id\(0\) is the token"),
        ("first choice", "only the first choice"),
        ("last choice", "only the last choice"),
        ("slot", "down is read at the slot"),
        ("sentinel", "NaN with the sentinel"),
        ("one weight", "all choices have the first one's weight"),
        ("one bias", "all choices have the first one's bias"),
        ("bias", "the bias is missing"),
        ("unweighted", "the routing weight is missing"),
        ("bias unweighted", "the bias is not weighted"),
        ("mean", "the mean over choices"),
        ("minus", "token 0, column 0"),
        ("store", "wrote beside its token|token 0|token 1"),
    ],
)
def test_combine_names_the_mistake(wrong, message):
    rejected(Kernel(any_combine, wrong), "combine_kernel", message)


def test_combine_other_ways_to_be_right():
    accepted(Kernel(any_combine, "nothing"), "combine_kernel")


def test_combine_without_jit():
    rejected(lambda *arguments: None, "combine_kernel", "under @triton.jit")


# ---------------------------------------------------------------------------------------- routing_weight_gradient


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda dy, dact, act, b: (dact * act).sum(-1), "the bias is missing"),
        (lambda dy, dact, act, b: dy @ b, "only the bias's part"),
        (lambda dy, dact, act, b: (dact * act).sum(-1) - dy @ b, "wrong sign"),
        (lambda dy, dact, act, b: (dact * act).sum() + (dy @ b).sum(), "one number came back"),
        (lambda dy, dact, act, b: (dact * act).sum(-1, keepdim=True) + (dy @ b)[:, None], "without keepdim"),
        (lambda dy, dact, act, b: (dact * act).mean(-1) + dy @ b, "a mean was taken"),
        (lambda dy, dact, act, b: (dact * act).mean(-1) + (dy * b).mean(-1), "means were taken"),
        (lambda dy, dact, act, b: (dact * act).sum(-1) + b.sum(), "the bias alone"),
        (lambda dy, dact, act, b: dact.sum(-1) + dy @ b, "without act"),
        (lambda dy, dact, act, b: act.sum(-1) + dy @ b, "dy was left out"),
        (lambda dy, dact, act, b: dact * act, "expected shape"),
        (lambda dy, dact, act, b: 2 * ((dact * act).sum(-1) + dy @ b), "row 0: expected"),
        (lambda dy, dact, act, b: [0.0], "expected a tensor"),
    ],
)
def test_routing_weight_gradient_names_the_mistake(wrong, message):
    rejected(wrong, "routing_weight_gradient", message)


def test_routing_weight_gradient_other_ways_to_be_right():
    accepted(lambda dy, dact, act, b: torch.einsum("ri,ri->r", dact, act) + (dy * b).sum(1), "routing_weight_gradient")


# ---------------------------------------------------------------------------------------------- grouped_intensity


def moved(t, k, e, h, w):
    return t * k * h + e * h * w + t * k * w


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t, k, e, h, w, b: t * k * h * w / moved(t, k, e, h, w) / b, "two FLOPs"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / moved(t, k, e, h, w), "multiply by itemsize"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / (t * k * (h + w)) / b, "matrices are missing"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / (t * k * (h + w) + h * w) / b, "one expert's matrix"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / (t * k * h + e * h * w) / b, "what is written"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / (t * k * w + e * h * w) / b, "rows that are read"),
        (lambda t, k, e, h, w, b: 2 * t * h * w / moved(t, 1, e, h, w) / b, "in the FLOPs as well as in the bytes"),
        (lambda t, k, e, h, w, b: 2 * t * h * w / moved(t, k, e, h, w) / b, "in the FLOPs as well"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / moved(t, 1, e, h, w) / b, "in the bytes as well"),
        (lambda t, k, e, h, w, b: 2 * t * k * e * h * w / moved(t, k, e, h, w) / b, "every expert was run"),
        (lambda t, k, e, h, w, b: 2 * t * k * h * w / (t * k * (h + w + h * w)) / b, "read anew for each row"),
        (lambda t, k, e, h, w, b: moved(t, k, e, h, w) * b / (2 * t * k * h * w), "upside down"),
        (lambda t, k, e, h, w, b: 3 * t, "expected .* FLOPs a byte"),
        (lambda t, k, e, h, w, b: None, "expected a number"),
    ],
)
def test_grouped_intensity_names_the_mistake(wrong, message):
    rejected(wrong, "grouped_intensity", message)


def test_grouped_intensity_as_a_tensor_is_accepted():
    accepted(
        lambda t, k, e, h, w, b: torch.tensor(2 * t * k * h * w / moved(t, k, e, h, w) / b, dtype=torch.float64),
        "grouped_intensity",
    )
