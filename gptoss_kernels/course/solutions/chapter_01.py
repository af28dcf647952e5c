"""Chapter 01, eager attention and sinks."""

from collections.abc import Callable

import torch

from ..check import Mistake


def softmax_with_sink(scores: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys with the sink in the normaliser. scores (..., keys), sink broadcastable to (...) ->
    weights (..., keys), lse (...)."""
    maximum = torch.maximum(scores.amax(-1), sink).detach()
    weights = torch.exp(scores - maximum[..., None])
    normaliser = torch.exp(sink - maximum) + weights.sum(-1)
    return weights / normaliser[..., None], maximum + normaliser.log()


def check_softmax_with_sink(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    sink = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)  # one a head: (3, 1)
    right, lse = _column(scores, sink)
    plain, plain_lse = torch.softmax(scores, -1), torch.logsumexp(scores, -1)
    top = torch.maximum(scores.amax(-1), sink)
    raised = torch.exp(scores - top[..., None])
    unshifted = raised / (raised.sum(-1) + sink.exp())[..., None]
    result = _broadcast(
        lambda: function(scores, sink),
        "sink has one dimension less than scores: keep the numbers of a row in shape (...), without keepdim, and add "
        "the keys with [..., None] last where they meet the scores",
    )
    got, got_lse = _two_tensors(result, "weights", "lse")

    if got.shape == (2, 3, 4, 6):
        raise Mistake("weights has a column too many: the sink has no value, so drop its weight after the softmax")
    _shape("weights", got, right)
    _shape("lse", got_lse, lse)
    _known(got, {"the sink is missing from the normaliser: these rows still sum to one": plain})
    _known(
        got, {"the sink is not shifted: exp(sink - maximum), since the scores were shifted by it as well": unshifted}
    )
    if not _close(got, right):
        raise Mistake(_expected("weights", got, right))
    _known(
        got_lse,
        {
            "lse is that of the keys alone: the sink belongs to it": plain_lse,
            "lse lacks the maximum that was taken out: add it back": lse - top,
            "lse lacks the maximum over the scores that was taken out: add it back": lse - scores.amax(-1),
            "that is the normaliser; lse is its logarithm": lse.exp(),
        },
    )
    if not _close(got_lse, lse):
        raise Mistake(_expected("lse", got_lse, lse))

    small = scores.float()
    for shift_scores, shift_sink, message in (
        (1000.0, 1000.0, "large scores overflow: take the maximum out before exp"),
        (1000.0, 0.0, "large scores overflow: take the maximum out before exp"),
        (0.0, 1000.0, "a large sink overflows: the maximum is that of the scores and the sink"),
    ):
        raised, raised_sink = small + shift_scores, sink.float() + shift_sink
        got, got_lse = function(raised, raised_sink)
        right, lse = _column(raised.double(), raised_sink.double())
        if not (_close(got, right, 1e-3) and _close(got_lse, lse, 1e-3)):
            raise Mistake(message)
    uneven = small + 1000.0 * (torch.arange(4)[:, None] == 1)  # query 1 far above the others
    got, got_lse = function(uneven, sink.float())
    right, lse = _column(uneven.double(), sink)
    if not (_close(got, right, 1e-3) and _close(got_lse, lse, 1e-3)):
        raise Mistake("the maximum is one for all rows: a row far below it underflows; take it per row")
    empty = scores.masked_fill(torch.arange(4)[:, None] == 2, float("-inf"))  # query 2 sees no key
    got, got_lse = function(empty, sink)
    if not (_close(got, _column(empty, sink)[0]) and _close(got_lse, _column(empty, sink)[1])):
        raise Mistake(
            "a row all of whose scores are -inf has no key: its weights are 0 and its lse is the sink. With the sink "
            "in the maximum nothing is NaN"
        )
    got, got_lse = function(scores, torch.full_like(sink, float("-inf")))
    if not (_close(got, plain) and _close(got_lse, plain_lse)):
        raise Mistake("a sink of -inf is no sink: expected the plain softmax and the lse of the keys")

    masked = scores.masked_fill(torch.ones(4, 5, dtype=torch.bool).triu(2), float("-inf"))
    along = torch.randn(masked.shape, generator=generator, dtype=torch.float64)
    for name, index in (("scores", 0), ("sink", 1)):
        grads = []
        for softmax in (function, _column):
            leaves = [masked.clone().requires_grad_(), sink.clone().requires_grad_()]
            weights, lse = softmax(*leaves)
            loss = (weights * along).sum() + (lse * along[..., 0]).sum()
            if not loss.requires_grad:
                raise Mistake("no gradient: compute weights and lse with torch operations on the arguments")
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True)[index])
        if grads[0] is None or not _close(grads[0], grads[1]):
            raise Mistake(f"the gradient of {name} is wrong: detach nothing but the maximum")


def add_sink(out: torch.Tensor, keys_lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a sink from attention without one. out (batch, heads, q_len, head_dim), keys_lse (batch, heads,
    q_len), sinks (heads,) -> out and lse with the sink."""
    sink = sinks[:, None]  # (heads, 1): one logit for all queries of a head
    return out * torch.sigmoid(keys_lse - sink)[..., None], torch.logaddexp(keys_lse, sink)


def check_add_sink(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, q_len, head_dim in ((4, 4, 4), (3, 5, 2)):  # the first: a wrong axis gives numbers, no error
        plain = torch.randn(2, heads, q_len, head_dim, generator=generator, dtype=torch.float64)
        keys = 1 + torch.randn(2, heads, q_len, generator=generator, dtype=torch.float64)
        sinks = torch.linspace(-1.0, 2.0, heads, dtype=torch.float64)
        z = sinks[:, None]
        right, lse = plain * torch.sigmoid(keys - z)[..., None], torch.logaddexp(keys, z)
        result = _broadcast(
            lambda tensors=(plain, keys, sinks): function(*(x.clone() for x in tensors)),
            "sinks[:, None], (heads, 1), meets keys_lse, (batch, heads, q_len); the factor made of the two has one "
            "dimension less than out: add head_dim with [..., None] last",
        )
        got, got_lse = _two_tensors(result, "out", "lse")
        _shape("out", got, right)
        _shape("lse", got_lse, lse)
        known = {
            "that factor is the sink's share; the keys keep the rest": plain * torch.sigmoid(z - keys)[..., None],
            "out is unchanged: the keys keep only a part of their weight": plain,
            "the factor needs the lse of the keys alone, not the one with the sink in it": plain
            * torch.sigmoid(lse - z)[..., None],
            "the factor must not be exp(lse - sink): the normaliser is a sum, exp(lse) + exp(sink)": plain
            * torch.exp(keys - z)[..., None],
        }
        if heads == q_len:
            known["the sinks lie along the queries: sinks is one logit a head, so index it as sinks[:, None]"] = (
                plain * torch.sigmoid(keys - sinks)[..., None]
            )
        _known(got, known)
        if not _close(got, right):
            raise Mistake(_expected("out", got, right))
        _known(
            got_lse,
            {
                "lse is unchanged: the sink belongs to it": keys,
                "lse + sink is the logarithm of a product; the normaliser is a sum": keys + z,
                "that is the normaliser; lse is its logarithm": lse.exp(),
            },
        )
        if not _close(got_lse, lse):
            raise Mistake(_expected("lse", got_lse, lse))
    plain, sinks = torch.ones(1, 2, 1, 1), torch.tensor([-300.0, 300.0])
    for keys in (torch.full((1, 2, 1), 300.0), torch.full((1, 2, 1), -300.0)):
        got, got_lse = function(plain.clone(), keys.clone(), sinks.clone())
        right = torch.sigmoid(keys - sinks[:, None])[..., None]
        if not (_close(got, right) and _close(got_lse, torch.logaddexp(keys, sinks[:, None]))):
            raise Mistake("logits in the hundreds overflow: use torch.sigmoid and torch.logaddexp")
    empty = torch.full((1, 2, 1), float("-inf"))
    got, got_lse = function(torch.zeros(1, 2, 1, 1), empty, sinks.clone())
    if not (_close(got, torch.zeros(1, 2, 1, 1)) and _close(got_lse, sinks[None, :, None])):
        raise Mistake("a row without keys comes with out 0 and lse -inf: expected out 0 and lse equal to the sink")


def window_mask(q_len: int, kv_len: int, sliding_window: int | None = None) -> torch.Tensor:
    """Which keys a query sees, (q_len, kv_len) bool: itself and the sliding_window - 1 keys before it (None: all before
    it). The last query stands at the last key."""
    position = torch.arange(kv_len - q_len, kv_len)[:, None]
    distance = position - torch.arange(kv_len)[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def check_window_mask(function: Callable) -> None:
    for q_len, kv_len, window in ((6, 6, None), (6, 6, 3), (6, 6, 1), (6, 6, 99), (2, 6, None), (2, 6, 3), (1, 5, 2)):
        right = _mask(q_len, kv_len, 0, window)
        got = function(q_len, kv_len, window)
        call = f"window_mask({q_len}, {kv_len}, {window})"
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor of shape {(q_len, kv_len)}, got {type(got).__name__}")
        if got.shape == (kv_len, q_len) != right.shape:
            raise Mistake(f"rows are queries and columns keys: expected shape {(q_len, kv_len)} for {call}")
        if got.shape != right.shape:
            raise Mistake(f"expected shape {tuple(right.shape)} for {call}, got {tuple(got.shape)}")
        if got.dtype != torch.bool:
            raise Mistake(f"expected a mask of torch.bool, True where a key is seen, got {got.dtype}")
        got = got.cpu()
        if torch.equal(got, right):
            continue
        causal = _mask(q_len, kv_len, 0, None)
        known = {
            "True means seen: this mask is the opposite": ~right,
            "the future is in sight: a query sees no key after its own": right | (~causal),
        }
        if window is None:
            known["the query's own key counts"] = _mask(q_len, kv_len, 1, None)
            if q_len == kv_len:
                known["rows are queries and columns keys: this is the transposed mask"] = right.mT
        else:
            distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
            known["the window is missing: all keys before the query are seen"] = causal
            known[f"{window + 1} keys, not {window}: the query's own key is one of the window's"] = _mask(
                q_len, kv_len, 0, window + 1
            )
            known[f"{window - 1} keys, not {window}: the last one of the window is missing"] = _mask(
                q_len, kv_len, 0, window - 1
            )
            known["the query's own key is missing"] = _mask(q_len, kv_len, 1, window + 1)
            known["the future is in sight: the window lies behind the query, not around it"] = distance.abs() < window
        if q_len < kv_len:
            known["with fewer queries than keys the last query stands at the last key, not the first at key 0"] = _mask(
                kv_len, kv_len, 0, window
            )[:q_len]
        for message, wrong in known.items():
            if torch.equal(got, wrong) and not torch.equal(wrong, right):
                raise Mistake(f"{message} ({call})")
        raise Mistake(f"expected {right.int().tolist()} for {call}, got {got.int().tolist()}")


def eager_bytes(tokens: int, q_heads: int, itemsize: int) -> tuple[int, int]:
    """(peak of the forward pass, kept for the backward pass) in bytes: what the score-sized matrices of Transformers'
    eager attention take in one layer, batch 1."""
    scores = q_heads * tokens * tokens * itemsize
    with_column = q_heads * tokens * (tokens + 1) * itemsize
    return scores + 2 * with_column, with_column


def check_eager_bytes(function: Callable) -> None:
    tokens, q_heads, itemsize = 8192, 64, 2
    got = function(tokens, q_heads, itemsize)
    try:
        peak, kept = (float(x) for x in got)
    except (TypeError, ValueError):
        raise Mistake(f"expected two numbers of bytes (peak, kept), got {got!r}") from None
    unit = q_heads * tokens * tokens * itemsize
    near = lambda x, y: abs(x - y) <= 0.01 * y  # noqa: E731  (one column more or less does not matter)
    for factor, message in (
        (1 / itemsize, "those are elements: each takes itemsize bytes"),
        (2**-30, "those are GiB: expected bytes"),
        (8 / itemsize, "those are bits or fp64: each element takes itemsize bytes"),
        (1 / q_heads, "every query head has a matrix of its own"),
        (1 / tokens, "a matrix has tokens × tokens elements for each head"),
    ):
        if near(peak, 3 * unit * factor) and near(kept, unit * factor):
            raise Mistake(message)
    for count, message in (
        (1, "the peak counts one matrix: while a line runs, its input and its output are both alive"),
        (2, "the peak counts two matrices: attn_weights keeps the masked scores alive until it is assigned again"),
        (4, "the peak counts four matrices: count which are alive at once; combined_logits is assigned twice, and its "
            "first value is free then"),
        (5, "the peak counts five matrices: what a name no longer holds, and autograd does not need, is free"),
        (6, "the peak counts all six that are ever made, but not all of them are alive at once"),
        (7, "the peak counts every line, but a slice, an expand, and dropout with p=0 make no matrix"),
    ):  # fmt: skip
        if near(peak, count * unit):
            raise Mistake(message)
    if not near(peak, 3 * unit):
        raise Mistake(f"expected a peak of about {3 * unit} bytes for {tokens} tokens, {q_heads} heads, got {peak:.0f}")
    if kept < 0.01 * unit:
        raise Mistake("kept is nothing of that size, but autograd keeps the softmax's result")
    for count, message in (
        (2, "kept counts two matrices: scores and attn_weights are views of the softmax's result, one storage"),
        (3, "kept counts three matrices: a product, a sum, a difference and cat need none of their large inputs"),
    ):
        if near(kept, count * unit):
            raise Mistake(message)
    if kept >= 3.9 * unit:
        raise Mistake("kept counts four matrices or more: autograd keeps what a backward needs, not all that was made")
    if not near(kept, unit):
        raise Mistake(f"expected about {unit} bytes kept for {tokens} tokens, {q_heads} heads, got {kept:.0f}")
    for arguments in ((2 * tokens, q_heads, itemsize), (tokens, 16, itemsize), (tokens, q_heads, 4)):
        right = eager_bytes(*arguments)
        if not all(near(float(x), y) for x, y in zip(function(*arguments), right, strict=True)):
            raise Mistake(f"expected about {right} for (tokens, q_heads, itemsize) = {arguments}")


def _column(scores: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.cat([scores, sink.expand(scores.shape[:-1])[..., None]], dim=-1)
    return torch.softmax(logits, -1)[..., :-1], torch.logsumexp(logits, -1)


def _mask(q_len: int, kv_len: int, nearest: int, window: int | None) -> torch.Tensor:
    """Keys at a distance of nearest ... window - 1 behind the query."""
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)[None, :]
    return (distance >= nearest) & (distance < (kv_len + 1 if window is None else window))


def _broadcast(call: Callable, message: str):
    """What call returns; shapes that do not broadcast in it raise message."""
    try:
        return call()
    except RuntimeError as error:
        if "must match" not in str(error):
            raise
        raise Mistake(message) from error


def _two_tensors(got, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(x, torch.Tensor) for x in got):
        kinds = [type(x).__name__ for x in got] if isinstance(got, (tuple, list)) else type(got).__name__
        raise Mistake(f"expected two tensors ({first}, {second}), got {kinds}")
    return got[0], got[1]


def _shape(name: str, got: torch.Tensor, right: torch.Tensor) -> None:
    if got.shape != right.shape:
        raise Mistake(f"{name}: expected shape {tuple(right.shape)}, got {tuple(got.shape)}")


def _known(got: torch.Tensor, known: dict[str, torch.Tensor]) -> None:
    for message, wrong in known.items():
        if _close(got, wrong):
            raise Mistake(message)


def _close(got: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    if not isinstance(got, torch.Tensor) or got.shape != right.shape:
        return False
    return torch.allclose(got.double(), right.double(), rtol=tolerance, atol=tolerance)


def _expected(name: str, got: torch.Tensor, right: torch.Tensor) -> str:
    index = tuple((~torch.isclose(got.double(), right.double(), rtol=1e-5, atol=1e-5)).nonzero()[0].tolist())
    return f"{name}: expected {right[index]:.4f} at {list(index)}, got {got[index]:.4f}"
