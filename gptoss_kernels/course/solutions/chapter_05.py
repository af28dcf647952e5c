"""Chapter 05, backward on paper."""

from collections.abc import Callable

import torch

from ..check import Mistake


def softmax_backward_with_sink(p: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    """p, dp (..., keys), rows of p sum to less than one -> ds (..., keys)."""
    delta = (p * dp).sum(-1, keepdim=True)
    return p * (dp - delta)


def sink_gradient(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """out, dout (batch, heads, queries, head_dim), lse (batch, heads, queries), sinks (heads,) -> (heads,)."""
    delta = (dout * out).sum(-1)
    p_sink = torch.exp(sinks[None, :, None] - lse)
    return -(p_sink * delta).sum((0, 2))


def delta_with_lse(out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
    """out, dout (..., queries, head_dim), dlse (..., queries) -> (..., queries)."""
    return (dout * out).sum(-1) - dlse


def attention_backward(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
    """One head: all but sink (), lse and dlse (tokens,) are (tokens, head_dim) -> dq, dk, dv, dsink."""
    p = torch.exp(_masked_scores(q, k, scale, window) - lse[:, None])
    delta = delta_with_lse(out, dout, dlse)
    dv = p.T @ dout
    dp = dout @ v.T
    ds = p * (dp - delta[:, None])
    dq = scale * ds @ k
    dk = scale * ds.T @ q
    dsink = -(torch.exp(sink - lse) * delta).sum()
    return dq, dk, dv, dsink


def check_softmax_backward_with_sink(function: Callable) -> None:
    p, dp = _draw_rows(3)
    delta = (p * dp).sum(-1, keepdim=True)
    share = p.sum(-1, keepdim=True)
    right = p * (dp - delta)
    known = {
        "p * dp holds the normaliser still: a score moves it too, which is what delta subtracts": p * dp,
        "multiply dp - delta by p: a key that gets no attention gets no gradient": dp - delta,
        "delta is the sum of p * dp, not of dp alone": p * (dp - dp.sum(-1, keepdim=True)),
        "delta weighs each dp with its p; that was the plain mean": p * (dp - dp.mean(-1, keepdim=True)),
        "delta was divided by the row's sum: what the sink took counts as attention to a value of zero": (
            p * (dp - delta / share)
        ),
        "the rows were renormalised to sum to one: use p as it is, what is missing is the sink's": (
            p / share * (dp - delta / share)
        ),
        "the sign is reversed": -right,
        "delta is one number a row: sum over the last dimension only": p * (dp - (p * dp).sum()),
    }
    _compare("ds", function(p.clone(), dp.clone()), right, known)
    p, dp = torch.tensor([0.25, 0.5], dtype=p.dtype), torch.tensor([8.0, 16.0], dtype=p.dtype)
    one_row = torch.tensor([-0.5, 3.0], dtype=p.dtype)
    _compare("ds of a single row, p = [0.25, 0.5] and dp = [8, 16],", function(p, dp), one_row, {})


def check_sink_gradient(function: Callable) -> None:
    out, dout = _draw(2, 3, 7, 5), _draw(2, 3, 7, 5, seed=1)
    sinks = _draw(3, seed=2)
    z = sinks[None, :, None]
    lse = torch.logaddexp(z, 1.5 + _draw(2, 3, 7, seed=3))
    delta, p_sink = (dout * out).sum(-1), torch.exp(z - lse)
    right = -(p_sink * delta).sum((0, 2))
    by_batch = -(p_sink * delta).sum(-1)
    known = {
        "the sign is reversed: more sink means less output": -right,
        "all rows share the sink, so their gradients add up; that was their mean": right / 14,
        "sum over the batch too: one number a head": by_batch,
        "sum over batch and queries: one number a head": -p_sink * delta,
        "that is the mean over the batch: all its rows share the sink, so add": right / 2,
        "weigh each row's delta by the sink's share exp(z - lse)": -delta.sum((0, 2)),
        "exp(z - lse) is how much the sink takes; multiply by delta, what that does to the loss": -p_sink.sum((0, 2)),
        "lse contains the sink already: do not add it again": (
            -(torch.exp(z - torch.logaddexp(lse, z)) * delta).sum((0, 2))
        ),
        "that divides by the keys' part alone; lse is the whole normaliser": (
            -(p_sink / (1 - p_sink) * delta).sum((0, 2))
        ),
        "p(1 - p) is how the sink's own share moves; the sink has no value, so only delta = sum of p * dp is left": (
            -(p_sink * (1 - p_sink) * delta).sum((0, 2))
        ),
        "the sink is not scaled: neither is its gradient": right * 5**-0.5,
        "the exponent is z - lse: a share is at most one": -(torch.exp(lse - z) * delta).sum((0, 2)),
    }
    _compare("dsinks", function(out.clone(), dout.clone(), lse.clone(), sinks.clone()), right, known)


def check_delta_with_lse(function: Callable) -> None:
    out, dout, dlse = _draw(2, 3, 7, 5), _draw(2, 3, 7, 5, seed=1), _draw(2, 3, 7, seed=2)
    delta = (dout * out).sum(-1)
    right = delta - dlse
    known = {
        "dlse has no effect in it": delta,
        "the sign of dlse is reversed: where dP is zero, dS must be +P * dlse": delta + dlse,
        "that is -(delta - dlse): the sign is reversed": -right,
        "delta itself is missing": -dlse,
        "dlse belongs to a row, and is subtracted once; it was subtracted for each of the head_dim columns": (
            delta - 5 * dlse
        ),
        "a product with dlse: changes add up, dS = P * (dP - delta) + P * dlse": delta * dlse,
    }
    got = function(out.clone(), dout.clone(), dlse.clone())
    if isinstance(got, torch.Tensor) and got.shape == (2, 3, 7, 1):
        raise Mistake("one number a row, shape (..., queries): drop the last dimension")
    _compare("delta", got, right, known)


def check_attention_backward(function: Callable) -> None:
    for window in (None, 3):
        _check_one_head(function, window)


def _check_one_head(function: Callable, window: int | None) -> None:
    tokens, head_dim = 7, 4
    scale, names = 0.3, ("dq", "dk", "dv", "dsink")
    q, k, v, dout = (_draw(tokens, head_dim, seed=seed) for seed in range(4))
    sink, dlse = _draw(1, seed=4)[0] + 1, _draw(tokens, seed=5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
    out, lse = _forward(*leaves, scale, window)
    right = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    given = [x.detach().clone() for x in (q, k, v, sink, out, lse, dout, dlse)]
    got = function(*given, scale) if window is None else function(*given, scale, window)
    if not isinstance(got, (tuple, list)) or len(got) != 4:
        shown = f"{len(got)} of them" if isinstance(got, (tuple, list)) else type(got).__name__
        raise Mistake(f"expected four results, (dq, dk, dv, dsink), got {shown}")
    known = _mistakes(q, k, v, sink, out.detach(), lse.detach(), dout, dlse, scale, window)
    for index in (2, 0, 1, 3):  # dv first: it needs P alone
        of_this = {message: wrong[index] for message, wrong in known.items() if index in wrong}
        where = names[index] if window is None else f"{names[index]} under a window of {window} keys"
        _compare(where, got[index], right[index], of_this)


def _mistakes(q, k, v, sink, out, lse, dout, dlse, scale, window):
    """Message -> {index of the gradient: what that mistake gives}."""
    scores = _masked_scores(q, k, scale, window)
    p = torch.exp(scores - lse[:, None])
    dp, plain, share = dout @ v.T, (dout * out).sum(-1), torch.exp(sink - lse)
    delta = plain - dlse
    ds = p * (dp - delta[:, None])

    def results(ds):
        return {0: scale * ds @ k, 1: scale * ds.T @ q}

    def of_sink(weight, delta):
        return {3: -(weight * delta).sum()}

    alone = torch.softmax(scores, -1)
    open_p = torch.exp(q @ k.T * scale - lse[:, None])
    causal = torch.exp(_masked_scores(q, k, scale, None) - lse[:, None])
    seen_too_much = {"the future keys are not masked: P is zero there": open_p}
    if window is not None:
        seen_too_much["the window is not applied: pass it to masked_scores"] = causal
    found = {message: {2: wrong.T @ dout} for message, wrong in seen_too_much.items()}
    return {
        **found,
        "dV = P^T dO, and P is not transposed": {2: p @ dout},
        "the probabilities are normalised without the sink: P = exp(S - lse), with the lse that was saved": {
            2: alone.T @ dout
        },
        "delta is missing: dS = P * (dP - delta)": results(p * dp),
        "dlse is ignored: it is subtracted from delta": {
            **results(p * (dp - plain[:, None])),
            **of_sink(share, plain),
        },
        "dlse is added to delta, and must be subtracted": {
            **results(p * (dp - (plain + dlse)[:, None])),
            **of_sink(share, plain + dlse),
        },
        "dS is not multiplied by P": results(torch.where(p > 0, dp - delta[:, None], 0.0)),
        "the scale is missing: S = scale * Q K^T, so dQ and dK carry it once": {0: ds @ k, 1: ds.T @ q},
        "the scale is applied twice: dS is the gradient of the scaled scores, so multiply once": {
            0: scale**2 * ds @ k,
            1: scale**2 * ds.T @ q,
        },
        "dP is scaled and delta is not: scale dQ and dK, not dP": {
            0: p * (scale * dp - delta[:, None]) @ k,
            1: (p * (scale * dp - delta[:, None])).T @ q,
        },
        "dK = scale dS^T Q, and dS is not transposed": {1: scale * ds @ q},
        "dQ = scale dS K, and dS is transposed": {0: scale * ds.T @ k},
        "dQ sums over keys: dS times K, not times Q": {0: scale * ds @ q},
        "dK sums over queries: dS^T times Q, not times K": {1: scale * ds.T @ k},
        "the sign of the sink's gradient is reversed": {3: (share * delta).sum()},
        "the sink is not scaled: neither is its gradient": {3: -scale * (share * delta).sum()},
        "the sink's gradient lacks its share exp(z - lse)": {3: -delta.sum()},
        "the sink's gradient is one number: sum over the rows": {3: -share * delta},
        "the sink's gradient is a sum over rows, not their mean": {3: -(share * delta).mean()},
    }


def _masked_scores(q, k, scale, window=None):
    position = torch.arange(len(q), device=q.device)
    distance = position[:, None] - position[None, :]  # query minus key
    seen = (distance >= 0) & (distance < (window or len(q)))
    return (q @ k.T * scale).masked_fill(~seen, float("-inf"))


def _forward(q, k, v, sink, scale, window):
    scores = _masked_scores(q, k, scale, window)
    lse = torch.logaddexp(scores.logsumexp(-1), sink)
    return torch.exp(scores - lse[:, None]) @ v, lse


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _draw_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of five keys beside a sink at 0.5, and a gradient of them."""
    scores = torch.cat([_draw(rows, 5), torch.full((rows, 1), 0.5, dtype=torch.float64)], dim=-1)
    return torch.softmax(scores, dim=-1)[:, :-1], _draw(rows, 5, seed=1)


def _compare(name: str, got, right: torch.Tensor, known: dict[str, torch.Tensor]) -> None:
    """Mistake unless got is right in fp64; its message is the known mistake's whose result it is."""
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"{name}: expected a tensor of shape {tuple(right.shape)}, got {type(got).__name__}")

    def close(wanted, rtol=1e-4, atol=1e-6):
        return got.shape == wanted.shape and torch.allclose(got.to(wanted), wanted, rtol=rtol, atol=atol)

    if close(right, rtol=1e-9, atol=1e-12) and got.dtype == right.dtype:
        return
    if close(right):
        raise Mistake(
            f"{name}: right to fp32's precision, but the inputs are fp64, which this chapter's proofs need: "
            f"compute in their dtype, and return it (got {got.dtype})"
        )
    for message, wrong in known.items():
        if close(wrong):
            raise Mistake(message if name in ("ds", "dsinks", "delta") else f"{name}: {message}")
    if got.shape != right.shape:
        raise Mistake(f"{name}: expected shape {tuple(right.shape)}, got {tuple(got.shape)}")
    if not torch.isfinite(got).all():
        raise Mistake(f"{name}: NaN or infinity; scores that are masked are -inf, and exp(-inf - lse) is zero")
    if right.numel() <= 4:
        shown = [[round(x, 4) for x in values.flatten().tolist()] for values in (right, got)]
        raise Mistake(f"{name}: expected {shown[0]}, got {shown[1]}")
    index = tuple((~torch.isclose(got.to(right), right, rtol=1e-4, atol=1e-6)).nonzero()[0].tolist())
    shown = ", ".join(map(str, index))
    raise Mistake(f"{name}: expected {right[index].item():.4f} at [{shown}], got {got[index].item():.4f}")
