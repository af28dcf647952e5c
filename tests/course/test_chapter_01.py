"""Chapter 01's checkers: known mistakes get the message that names them, other ways to be right are accepted."""

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_01 as solutions

INF = float("inf")


def rejected(name, wrong, message):
    wrong.__name__ = name
    with pytest.raises(check.Mistake, match=message):
        check.attempt(wrong, chapter=1, strict=True)


def accepted(name, other):
    other.__name__ = name
    assert check.attempt(other, chapter=1, strict=True) is other


def column(scores, sink):
    return torch.cat([scores, sink.expand(scores.shape[:-1])[..., None]], -1)


def lse_of(scores, sink):
    return torch.logaddexp(scores.logsumexp(-1), sink)


def with_maximum(maximum):
    """The right formula with a wrong maximum."""

    def softmax(scores, sink):
        top = maximum(scores, sink)
        weights = torch.exp(scores - top[..., None])
        normaliser = torch.exp(sink - top) + weights.sum(-1)
        return weights / normaliser[..., None], top + normaliser.log()

    return softmax


def unshifted_sink(scores, sink):
    top = torch.maximum(scores.amax(-1), sink)
    weights = torch.exp(scores - top[..., None])
    normaliser = torch.exp(sink) + weights.sum(-1)
    return weights / normaliser[..., None], top + normaliser.log()


def without_the_maximum_in_lse(scores, sink):
    weights, lse = solutions.softmax_with_sink(scores, sink)
    return weights, lse - torch.maximum(scores.amax(-1), sink)


def sink_made_finite(scores, sink):
    return solutions.softmax_with_sink(scores, sink.clamp(min=-5.0))


def right(scores, sink):
    return solutions.softmax_with_sink(scores, sink)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores, sink: torch.softmax(scores, -1), r"expected two tensors \(weights, lse\), got Tensor"),
        (lambda scores, sink: (right(scores, sink)[0], None), "got .*NoneType"),
        (lambda scores, sink: (column(scores, sink).softmax(-1), lse_of(scores, sink)), "a column too many"),
        (lambda scores, sink: (right(scores, sink)[0], lse_of(scores, sink)[..., None]), "lse: expected shape"),
        (lambda scores, sink: (right(scores, sink)[0].sum(-1), lse_of(scores, sink)), "weights: expected shape"),
        (lambda scores, sink: (scores.softmax(-1), lse_of(scores, sink)), "missing from the normaliser"),
        (unshifted_sink, "the sink is not shifted"),
        (lambda scores, sink: (right(scores, sink)[0] * 0.9, lse_of(scores, sink)), "weights: expected .* at"),
        (lambda scores, sink: (right(scores, sink)[0], scores.logsumexp(-1)), "lse is that of the keys alone"),
        (without_the_maximum_in_lse, "lacks the maximum that was taken out"),
        (
            lambda scores, sink: (right(scores, sink)[0], lse_of(scores, sink) - scores.amax(-1)),
            "lacks the maximum over the scores",
        ),
        (lambda scores, sink: (right(scores, sink)[0], lse_of(scores, sink).exp()), "lse is its logarithm"),
        (lambda scores, sink: (right(scores, sink)[0], lse_of(scores, sink) + 1), "lse: expected .* at"),
        (with_maximum(lambda scores, sink: torch.zeros_like(scores[..., 0])), "large scores overflow"),
        (with_maximum(lambda scores, sink: sink.expand(scores.shape[:-1])), "large scores overflow"),
        (with_maximum(lambda scores, sink: scores.amax(-1)), "a large sink overflows"),
        (with_maximum(lambda scores, sink: torch.maximum(scores.amax(), sink.amax())), "one for all rows"),
        (with_maximum(lambda scores, sink: torch.maximum(scores.amax(-1, keepdim=True), sink)), "one dimension less"),
        (lambda scores, sink: (torch.exp(scores - lse_of(scores, sink)), lse_of(scores, sink)), "one dimension less"),
        (
            lambda scores, sink: (
                (scores.softmax(-1) * torch.sigmoid(scores.logsumexp(-1) - sink)[..., None],) + (lse_of(scores, sink),)
            ),
            "has no key: its weights are 0",
        ),
        (sink_made_finite, "a sink of -inf is no sink"),
        (lambda scores, sink: right(scores, sink.detach()), "the gradient of sink is wrong"),
        (lambda scores, sink: right(scores.detach(), sink), "the gradient of scores is wrong"),
        (lambda scores, sink: right(scores.detach(), sink.detach()), "no gradient"),
    ],
)
def test_softmax_with_sink_names_the_mistake(wrong, message):
    rejected("softmax_with_sink", wrong, message)


@pytest.mark.parametrize(
    "other",
    [
        lambda scores, sink: (column(scores, sink).softmax(-1)[..., :-1], column(scores, sink).logsumexp(-1)),
        lambda scores, sink: (torch.exp(scores - lse_of(scores, sink)[..., None]), lse_of(scores, sink)),
        lambda scores, sink: [x.double() for x in right(scores, sink)],
        with_maximum(lambda scores, sink: torch.maximum(scores.amax(-1), sink)),  # gradient through the maximum
    ],
)
def test_softmax_with_sink_accepts_other_ways(other):
    accepted("softmax_with_sink", other)


def by(factor, lse=lambda lse, sink: torch.logaddexp(lse, sink)):
    """out times factor(lse, sink (heads, 1))."""
    return lambda out, keys, sinks: (out * factor(keys, sinks[:, None])[..., None], lse(keys, sinks[:, None]))


def along_queries(out, lse, sinks):
    return out * torch.sigmoid(lse - sinks)[..., None], torch.logaddexp(lse, sinks)


def keep(lse, sink):
    return torch.sigmoid(lse - sink)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda out, lse, sinks: out, r"expected two tensors \(out, lse\)"),
        (lambda out, lse, sinks: (out[0], lse), "out: expected shape"),
        (lambda out, lse, sinks: (out * keep(lse, sinks[:, None])[..., None], lse[..., None]), "lse: expected shape"),
        (lambda out, lse, sinks: (out * keep(lse, sinks[:, None]), lse), "has one dimension less than out"),
        (lambda out, lse, sinks: (out * keep(lse, sinks[:, None, None])[..., None], lse), r"sinks\[:, None\], \(heads"),
        (by(lambda lse, sink: torch.sigmoid(sink - lse)), "that factor is the sink's share"),
        (by(lambda lse, sink: torch.ones_like(lse)), "out is unchanged"),
        (by(lambda lse, sink: torch.sigmoid(torch.logaddexp(lse, sink) - sink)), "the lse of the keys alone"),
        (by(lambda lse, sink: torch.exp(lse - sink)), "the normaliser is a sum"),
        (along_queries, "the sinks lie along the queries"),
        (by(lambda lse, sink: keep(lse, sink / 8)), "out: expected .* at"),
        (by(keep, lambda lse, sink: lse), "lse is unchanged"),
        (by(keep, lambda lse, sink: lse + sink), "logarithm of a product"),
        (by(keep, lambda lse, sink: torch.logaddexp(lse, sink).exp()), "lse is its logarithm"),
        (by(keep, lambda lse, sink: torch.logaddexp(lse, sink) + 1), "lse: expected .* at"),
        (by(lambda lse, sink: lse.exp() / (lse.exp() + sink.exp())), "overflow"),
        (by(lambda lse, sink: torch.exp(torch.logaddexp(lse, sink) * 0 + lse - torch.logaddexp(lse, sink)),
            lambda lse, sink: lse + torch.nn.functional.softplus(sink - lse)), "row without keys"),
    ],
)  # fmt: skip
def test_add_sink_names_the_mistake(wrong, message):
    rejected("add_sink", wrong, message)


def in_place(out, lse, sinks):
    new = torch.logaddexp(lse, sinks.view(1, -1, 1))
    out *= torch.exp(lse - new).unsqueeze(-1)
    return out, new


def by_share(out, lse, sinks):
    sink = sinks.reshape(1, -1, 1).expand_as(lse)
    return (1 - torch.sigmoid(sink - lse))[..., None] * out, torch.stack([lse, sink]).logsumexp(0)


@pytest.mark.parametrize("other", [in_place, by_share])
def test_add_sink_accepts_other_ways(other):
    accepted("add_sink", other)


def distance(q_len, kv_len):
    return torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)


def band(low, high):
    """Keys at a distance of low ... high(window) - 1."""

    def mask(q_len, kv_len, window):
        d = distance(q_len, kv_len)
        return (d >= low) & (d < (kv_len + 1 if window is None else high(window)))

    return mask


def top_left(q_len, kv_len, window):
    return solutions.window_mask(kv_len, kv_len, window)[:q_len]


def around(q_len, kv_len, window):
    causal = solutions.window_mask(q_len, kv_len)
    return causal if window is None else distance(q_len, kv_len).abs() < window


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q_len, kv_len, window: [[True]], "expected a tensor"),
        (lambda q_len, kv_len, window: torch.ones(kv_len, dtype=torch.bool), "expected shape"),
        (lambda q_len, kv_len, window: solutions.window_mask(q_len, kv_len, window).float(), "torch.bool"),
        (lambda q_len, kv_len, window: ~solutions.window_mask(q_len, kv_len, window), "the opposite"),
        (lambda q_len, kv_len, window: torch.ones(q_len, kv_len, dtype=torch.bool), "the future is in sight"),
        (lambda q_len, kv_len, window: solutions.window_mask(q_len, kv_len, window).mT.contiguous(), "rows are"),
        (lambda q_len, kv_len, window: solutions.window_mask(q_len, kv_len), "the window is missing"),
        (band(0, lambda window: window + 1), "4 keys, not 3"),
        (band(0, lambda window: window - 1), "2 keys, not 3"),
        (lambda q_len, kv_len, window: band(0 if window is None else 1, lambda w: w + 1)(q_len, kv_len, window),
         "own key is missing"),
        (band(1, lambda window: window), "own key counts"),
        (around, "not around it"),
        (top_left, "the last query stands at the last key"),
        (lambda q_len, kv_len, window: solutions.window_mask(q_len, kv_len, 2), "expected \\[\\["),
    ],
)  # fmt: skip
def test_window_mask_names_the_mistake(wrong, message):
    rejected("window_mask", wrong, message)


def tril_triu(q_len, kv_len, sliding_window=None):
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    return mask if sliding_window is None else mask.triu(kv_len - q_len - sliding_window + 1)


def row_by_row(q_len, kv_len, sliding_window=None):
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        last = i + kv_len - q_len
        mask[i, max(0, last + 1 - (sliding_window or kv_len)) : last + 1] = True
    return mask


@pytest.mark.parametrize("other", [tril_triu, row_by_row])
def test_window_mask_accepts_other_ways(other):
    accepted("window_mask", other)


def matrices(peak, kept, factor=1.0):
    return lambda tokens, q_heads, itemsize: tuple(x * factor * q_heads * tokens**2 * itemsize for x in (peak, kept))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tokens, q_heads, itemsize: tokens, "expected two numbers"),
        (lambda tokens, q_heads, itemsize: (3 * q_heads * tokens**2, q_heads * tokens**2), "those are elements"),
        (matrices(3, 1, 2**-30), "those are GiB"),
        (lambda tokens, q_heads, itemsize: (24 * q_heads * tokens**2, 8 * q_heads * tokens**2), "those are bits"),
        (lambda tokens, q_heads, itemsize: (3 * tokens**2 * itemsize, tokens**2 * itemsize), "every query head"),
        (lambda tokens, q_heads, itemsize: (3 * q_heads * tokens * itemsize, q_heads * tokens * 2), "a matrix has"),
        *[(matrices(peak, 1), f"counts {name}") for peak, name in
          ((1, "one"), (2, "two"), (4, "four"), (5, "five"), (6, "all six"), (7, "every line"))],
        (matrices(3.5, 1), "expected a peak of about"),
        (matrices(3, 2), "kept counts two"),
        (matrices(3, 3), "kept counts three"),
        (matrices(3, 0), "autograd keeps the softmax's result"),
        (matrices(3, 4), "not all that was made"),
        (matrices(3, 6), "not all that was made"),
        (matrices(3, 0.5), "expected about .* bytes kept"),
        (lambda tokens, q_heads, itemsize: matrices(3, 1)(tokens, 64, itemsize), "expected about .* for"),
    ],
)  # fmt: skip
def test_eager_bytes_names_the_mistake(wrong, message):
    rejected("eager_bytes", wrong, message)


@pytest.mark.parametrize("other", [matrices(3, 1), lambda *args: torch.tensor(matrices(3, 1)(*args))])
def test_eager_bytes_accepts_other_ways(other):
    accepted("eager_bytes", other)
