"""Wrong attempts at chapter 10's exercises get the message that names them; other ways to be right are accepted."""

import math

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_10


def rejected(function, name, message):
    function.__name__ = name
    with pytest.raises(check.Mistake, match=message):
        check.attempt(function, chapter=10, strict=True)


def accepted(function, name):
    function.__name__ = name
    assert check.attempt(function, chapter=10, strict=True) is function


@pytest.mark.parametrize("name", ["lora_linear", "adapter_parameters", "learning_rate", "merge_lora"])
def test_the_solution_is_accepted(name):
    accepted(getattr(chapter_10, name), name)


# -------------------------------------------------------------------------------------------------- lora_linear


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, a, b, s: x @ w.T, "the adapter is missing"),
        (lambda x, w, a, b, s: s * x @ a.T @ b.T, "the frozen layer is missing"),
        (lambda x, w, a, b, s: x @ w.T + x @ a.T @ b.T, "the scaling is missing"),
        (lambda x, w, a, b, s: s * (x @ w.T + x @ a.T @ b.T), "to the frozen layer as well"),
        (lambda x, w, a, b, s: s * x @ w.T + x @ a.T @ b.T, "instead of the adapter"),
        (lambda x, w, a, b, s: x @ w.T + (s * x @ a.T) @ (s * b.T), "applied twice"),
        (lambda x, w, a, b, s: x @ w.T + s / a.shape[0] * x @ a.T @ b.T, "by the rank once more"),
        (lambda x, w, a, b, s: x @ w.T - s * x @ a.T @ b.T, "subtracts"),
        (lambda x, w, a, b, s: x @ (w + s * b @ a).T, "B A is formed"),
        (lambda x, w, a, b, s: x @ w.T + s * (x @ (b @ a).T), "B A is formed"),
        (lambda x, w, a, b, s: (x @ w.T + s * x @ a.T @ b.T).detach(), "cut off from autograd"),
        (lambda x, w, a, b, s: (x @ w.T + s * x @ a.T @ b.T).sum(0), "expected shape"),
        (lambda x, w, a, b, s: None, "expected a tensor, got NoneType"),
        (lambda x, w, a, b, s: x @ w.T + s * x @ a.T @ b.T + 1, "the output: expected"),
    ],
)
def test_lora_linear(wrong, message):
    rejected(lambda *given: wrong(*given), "lora_linear", message)


def test_lora_linear_in_other_words():
    linear = torch.nn.functional.linear
    accepted(lambda x, w, a, b, s: linear(x, w) + linear(linear(s * x, a), b), "lora_linear")
    accepted(lambda x, w, a, b, s: linear(x, w) + torch.einsum("...i,ri,or->...o", x, s * a, b), "lora_linear")


# ------------------------------------------------------------------------------------------- adapter_parameters


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s, r: sum(math.prod(x) for x in s), "the layer's own parameters"),
        (lambda s, r: sum(math.prod(x[:-2]) * sum(x[-2:]) for x in s), "the rank is missing"),
        (lambda s, r: sum(math.prod(x[:-2]) * r * r * x[-2] * x[-1] for x in s), "their sizes add up"),
        (lambda s, r: sum(r * math.prod(x) for x in s), "r times the layer's own size"),
        (lambda s, r: sum(math.prod(x[:-2]) * r * x[-1] for x in s), "only A is counted"),
        (lambda s, r: sum(math.prod(x[:-2]) * r * x[-2] for x in s), "only B is counted"),
        (lambda s, r: sum(r * sum(x[-2:]) for x in s), "experts .* an adapter of its own"),
        (lambda s, r: sum(r * sum(x) for x in s), "no side of a matrix"),
        (lambda s, r: sum(r * (x[0] + x[1]) for x in s), "the last two dimensions"),
        (lambda s, r: chapter_10.adapter_parameters(s[:1], r), "expected 70, got 36|two layers"),
        (lambda s, r: [chapter_10.adapter_parameters(s, r)], "expected a number, got list"),
        (lambda s, r: 2 * chapter_10.adapter_parameters(s, r), "expected 36, got 72"),
    ],
)
def test_adapter_parameters(wrong, message):
    rejected(lambda shapes, r: wrong(shapes, r), "adapter_parameters", message)


def test_adapter_parameters_in_other_words():
    def built(shapes, r):
        return sum(
            math.prod(s[:-2]) * sum(torch.empty(shape, device="meta").numel() for shape in ((r, s[-1]), (s[-2], r)))
            for s in shapes
        )

    accepted(built, "adapter_parameters")


# ------------------------------------------------------------------------------------------------ learning_rate


def schedule(up=None, down=None, from_start=False):
    def attempt(step, steps, warmup, peak, floor):
        if step < warmup and not from_start:
            return up(step / warmup, peak, floor) if up else peak * step / warmup
        progress = step / steps if from_start else (step - warmup) / (steps - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return down(progress, cosine, peak, floor) if down else peak * (floor + (1 - floor) * cosine)

    return attempt


def early(step, steps, warmup, peak, floor):
    if step < warmup:
        return peak * step / warmup
    return schedule(from_start=True)(step, steps, warmup, peak, floor)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (schedule(down=lambda x, c, p, f: p * c), "the floor is missing"),
        (schedule(down=lambda x, c, p, f: f + (p - f) * c), "a share of the peak"),
        (schedule(down=lambda x, c, p, f: p * max(f, c)), "cut off at the floor"),
        (schedule(down=lambda x, c, p, f: p * (f + c)), "added on top"),
        (schedule(from_start=True), "there is no warm-up"),
        (early, "before the warm-up was over"),
        (schedule(down=lambda x, c, p, f: p * (f + (1 - f) * (1 + math.cos(2 * math.pi * x)) / 2)), "one whole wave"),
        (schedule(down=lambda x, c, p, f: p * (f + (1 - f) * math.cos(math.pi / 2 * x))), "a quarter of a wave"),
        (schedule(down=lambda x, c, p, f: p * (f + (1 - f) * (1 - x))), "straight line"),
        (schedule(up=lambda x, p, f: p), "stays at the peak"),
        (schedule(up=lambda x, p, f: p * (f + (1 - f) * x)), "rises from the floor"),
        (lambda step, steps, warmup, peak, floor: schedule()(step, steps, warmup, 1, floor), "the peak is missing"),
        (schedule(down=lambda x, c, p, f: 2 * p), "at step 4 expected 2.0000, got 4.0000"),
    ],
)
def test_learning_rate(wrong, message):
    rejected(lambda *given: wrong(*given), "learning_rate", message)


def test_learning_rate_without_warmup():
    def attempt(step, steps, warmup, peak, floor):
        return min(peak * step / warmup, chapter_10.learning_rate(max(step, warmup), steps, warmup, peak, floor))

    rejected(attempt, "learning_rate", "divides by zero")


def test_learning_rate_in_other_words():
    def clamped(step, steps, warmup, peak, floor):
        down = peak - peak * (1 - floor) * math.sin(math.pi / 2 * max(0, step - warmup) / (steps - warmup)) ** 2
        return torch.tensor(peak * step / warmup if step < warmup else down, dtype=torch.float64)

    accepted(clamped, "learning_rate")


# --------------------------------------------------------------------------------------------------- merge_lora


def in_place(w, a, b, s):
    w += (s * b @ a).to(w.dtype)
    return w


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w, a, b, s: (w.float() + b @ a).to(w.dtype), "the scaling is missing"),
        (lambda w, a, b, s: (s * b @ a).to(w.dtype), "the adapter alone"),
        (lambda w, a, b, s: (s * (w.float() + b @ a)).to(w.dtype), "applied to the weight, too"),
        (lambda w, a, b, s: (w.float() - s * b @ a).to(w.dtype), "subtracted"),
        (lambda w, a, b, s: w.clone(), "as it was"),
        (lambda w, a, b, s: w.float() + s * b @ a, "the weight's dtype was torch.bfloat16"),
        (lambda w, a, b, s: w + (s * b @ a).to(w.dtype), "off by a rounding"),
        (lambda w, a, b, s: w + s * b.to(w.dtype) @ a.to(w.dtype), "off by a rounding"),
        (in_place, "has changed"),
        (lambda w, a, b, s: (w.float() + s * b @ a).to(w.dtype).T, "expected the weight's shape"),
        (lambda w, a, b, s: (w.float() + s * b @ a).tolist(), "expected a tensor, got list"),
        (lambda w, a, b, s: (w.float() + s * b @ a + 1).to(w.dtype), "got something else"),
    ],
)
def test_merge_lora(wrong, message):
    rejected(lambda *given: wrong(*given), "merge_lora", message)


def test_merge_lora_in_other_words():
    def in_double(weight, a, b, scaling):
        return torch.addmm(weight.double(), b.double(), a.double(), alpha=scaling).to(weight.dtype)

    accepted(in_double, "merge_lora")
