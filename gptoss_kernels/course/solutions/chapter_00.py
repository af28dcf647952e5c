"""Chapter 00, start here."""

from collections.abc import Callable

import torch

from ..check import Mistake


def sink_share(scores: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """The share of a row's attention that its sink takes. scores (..., keys), sink () -> (...)."""
    return torch.sigmoid(sink - torch.logsumexp(scores, dim=-1))


def check_sink_share(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    sink = torch.tensor(0.5, dtype=torch.float64)
    column = torch.cat([scores, sink.expand(5, 1)], dim=-1)
    right = torch.softmax(column, dim=-1)[:, -1]
    known = {
        "that is the share which the keys keep; the sink takes the rest": 1 - right,
        "exp(sink) must be divided by the whole normaliser, in which the sink itself counts too": right / (1 - right),
        "that is the logarithm of the share: apply exp": right.log(),
        "torch.sum of the scores is not their log-sum-exp": torch.sigmoid(sink - scores.sum(-1)),
        "every row has a sink of its own: reduce over the last dimension only": torch.sigmoid(
            sink - torch.logsumexp(scores.flatten(), dim=0)
        ).expand(5),
    }
    got = function(scores, sink)
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"expected a tensor of shape (5,), got {type(got).__name__}")
    for message, wrong in known.items():
        if got.shape in (wrong.shape, ()) and torch.allclose(got.to(wrong.dtype), wrong):
            raise Mistake(message)
    if got.shape != right.shape:
        raise Mistake(f"expected shape {tuple(right.shape)} for scores {tuple(scores.shape)}, got {tuple(got.shape)}")
    if not torch.allclose(got.to(right.dtype), right):
        raise Mistake(f"expected {right[0]:.4f} for scores {scores[0].tolist()} and sink {sink}, got {got[0]:.4f}")
    huge = function(scores + 1000, sink + 1000)
    if not torch.allclose(huge.to(right.dtype), right):
        raise Mistake("large scores overflow: let torch.logsumexp take out the maximum before exp")
    apart = torch.tensor([[2.0, 1.0, 0.0], [1000.0, 999.0, 998.0]], dtype=torch.float64)
    if not torch.allclose(function(apart, sink)[:1].to(right.dtype), sink_share(apart, sink)[:1]):
        raise Mistake("one maximum for all rows: a row far below it underflows; take the maximum of each row")
    if not torch.allclose(function(scores, sink + 1000).to(right.dtype), torch.ones(5, dtype=right.dtype)):
        raise Mistake("a sink far above the scores overflows: it belongs into the maximum, too")
