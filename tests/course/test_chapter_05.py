"""Chapter 05: each known mistake in the exercises is named; right answers in another form are accepted."""

import re

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_05
from gptoss_kernels.course.solutions.chapter_05 import _masked_scores as masked_scores


def verdict(name, function):
    function.__name__ = name
    with pytest.raises(check.Mistake) as caught:
        check.attempt(function, chapter=5, strict=True)
    return str(caught.value)


def accepted(name, function):
    function.__name__ = name
    assert check.attempt(function, chapter=5, strict=True) is function


def row_sum(x):
    return x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, dp: p * dp, "holds the normaliser still"),
        (lambda p, dp: dp - row_sum(p * dp), "multiply dp - delta by p"),
        (lambda p, dp: p * (dp - row_sum(dp)), "not of dp alone"),
        (lambda p, dp: p * (dp - dp.mean(-1, keepdim=True)), "plain mean"),
        (lambda p, dp: p * (dp - row_sum(p * dp) / row_sum(p)), "divided by the row's sum"),
        (lambda p, dp: p / row_sum(p) * (dp - row_sum(p * dp) / row_sum(p)), "renormalised"),
        (lambda p, dp: p * (row_sum(p * dp) - dp), "sign is reversed"),
        (lambda p, dp: p * (dp - (p * dp).sum()), "last dimension only"),
        (lambda p, dp: 0.0, "expected a tensor of shape"),
        (lambda p, dp: row_sum(p * dp), r"ds: expected shape \(3, 5\), got \(3, 1\)"),
        (lambda p, dp: 7 * p, "ds: expected .* at"),
        (lambda p, dp: p * (dp - row_sum(p * dp)) / 0, "NaN or infinity"),
        (lambda p, dp: p.float() * (dp - row_sum(p * dp)).float(), "compute in their dtype"),
        (
            lambda p, dp: p * (dp - torch.einsum("ij,ij->i", p, dp)[:, None]) if p.dim() == 2 else 2 * p,
            r"single row.* expected \[-0.5, 3.0\], got \[0.5, 1.0\]",
        ),
    ],
)
def test_softmax_backward_with_sink(wrong, message):
    assert re.search(message, verdict("softmax_backward_with_sink", wrong))


def test_softmax_backward_in_other_words():
    def in_place(p, dp):
        dp -= torch.einsum("...k,...k->...", p, dp).unsqueeze(-1)
        return dp.mul_(p)

    def by_jacobian(p, dp):
        jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
        return (jacobian @ dp[..., None]).squeeze(-1)

    accepted("softmax_backward_with_sink", in_place)
    accepted("softmax_backward_with_sink", by_jacobian)


def delta_of(out, dout):
    return (dout * out).sum(-1)


def share(lse, sinks):
    return torch.exp(sinks[None, :, None] - lse)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda o, do, lse, z: (share(lse, z) * delta_of(o, do)).sum((0, 2)), "sign is reversed"),
        (lambda o, do, lse, z: -(share(lse, z) * delta_of(o, do)).mean((0, 2)), "that was their mean"),
        (lambda o, do, lse, z: -(share(lse, z) * delta_of(o, do)).sum(-1), "sum over the batch too"),
        (lambda o, do, lse, z: -(share(lse, z) * delta_of(o, do)).sum(-1).mean(0), "mean over the batch"),
        (lambda o, do, lse, z: -share(lse, z) * delta_of(o, do), "sum over batch and queries"),
        (lambda o, do, lse, z: -delta_of(o, do).sum((0, 2)), "weigh each row's delta"),
        (lambda o, do, lse, z: -share(lse, z).sum((0, 2)), "multiply by delta"),
        (
            lambda o, do, lse, z: -(share(torch.logaddexp(lse, z[None, :, None]), z) * delta_of(o, do)).sum((0, 2)),
            "contains the sink already",
        ),
        (
            lambda o, do, lse, z: -(share(lse, z) / (1 - share(lse, z)) * delta_of(o, do)).sum((0, 2)),
            "keys' part alone",
        ),
        (
            lambda o, do, lse, z: -(share(lse, z) * (1 - share(lse, z)) * delta_of(o, do)).sum((0, 2)),
            "how the sink's own share moves",
        ),
        (lambda o, do, lse, z: chapter_05.sink_gradient(o, do, lse, z) * o.shape[-1] ** -0.5, "not scaled"),
        (lambda o, do, lse, z: -(delta_of(o, do) / share(lse, z)).sum((0, 2)), "at most one"),
        (lambda o, do, lse, z: None, "expected a tensor"),
        (lambda o, do, lse, z: torch.zeros(2, dtype=z.dtype), "expected shape"),
        (lambda o, do, lse, z: z, "dsinks: expected"),
    ],
)
def test_sink_gradient(wrong, message):
    assert message in verdict("sink_gradient", wrong)


def test_sink_gradient_in_other_words():
    def by_einsum(out, dout, lse, sinks):
        return -torch.einsum("bhqd,bhqd,bhq->h", out, dout, torch.exp(sinks.view(1, -1, 1) - lse))

    accepted("sink_gradient", by_einsum)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda o, do, dlse: delta_of(o, do), "no effect"),
        (lambda o, do, dlse: delta_of(o, do) + dlse, "sign of dlse"),
        (lambda o, do, dlse: dlse - delta_of(o, do), "sign is reversed"),
        (lambda o, do, dlse: -dlse, "delta itself is missing"),
        (lambda o, do, dlse: (do * o - dlse[..., None]).sum(-1), "head_dim columns"),
        (lambda o, do, dlse: delta_of(o, do) * dlse, "changes add up"),
        (lambda o, do, dlse: (delta_of(o, do) - dlse)[..., None], "drop the last dimension"),
        (lambda o, do, dlse: (do * o).sum() - dlse, "delta: expected"),
        (lambda o, do, dlse: 1, "expected a tensor"),
    ],
)
def test_delta_with_lse(wrong, message):
    assert message in verdict("delta_with_lse", wrong)


def test_delta_with_lse_in_other_words():
    accepted("delta_with_lse", lambda o, do, dlse: (do[..., None, :] @ o[..., None])[..., 0, 0].sub(dlse))


def backward(edit):
    """The solution with one line changed: edit(name, value, everything so far) returns another value for it."""

    def attempt(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
        x = dict(q=q, k=k, v=v, sink=sink, out=out, lse=lse, dout=dout, dlse=dlse, scale=scale, window=window)
        for name, line in {
            "scores": lambda: masked_scores(q, k, scale, window),
            "p": lambda: torch.exp(x["scores"] - lse[:, None]),
            "delta": lambda: (dout * out).sum(-1) - dlse,
            "dv": lambda: x["p"].T @ dout,
            "dp": lambda: dout @ v.T,
            "ds": lambda: x["p"] * (x["dp"] - x["delta"][:, None]),
            "dq": lambda: scale * x["ds"] @ k,
            "dk": lambda: scale * x["ds"].T @ q,
            "dsink": lambda: -(torch.exp(sink - lse) * x["delta"]).sum(),
        }.items():
            x[name] = edit(name, line(), x)
        return x["dq"], x["dk"], x["dv"], x["dsink"]

    return attempt


def instead(wanted, line):
    return backward(lambda name, value, x: line(value, x) if name == wanted else value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (instead("scores", lambda s, x: x["q"] @ x["k"].T * x["scale"]), "dv: the future keys are not masked"),
        (instead("scores", lambda s, x: masked_scores(x["q"], x["k"], x["scale"])), "3 keys: the window is not"),
        (instead("p", lambda p, x: torch.softmax(x["scores"], -1)), "dv: the probabilities are normalised without"),
        (instead("dv", lambda dv, x: x["p"] @ x["dout"]), "dv: dV = P^T dO"),
        (instead("ds", lambda ds, x: x["p"] * x["dp"]), "dq: delta is missing"),
        (instead("ds", lambda ds, x: torch.where(x["p"] > 0, x["dp"] - x["delta"][:, None], 0.0)), "multiplied by P"),
        (instead("delta", lambda d, x: d + x["dlse"]), "dq: dlse is ignored"),
        (instead("delta", lambda d, x: d + 2 * x["dlse"]), "dq: dlse is added"),
        (instead("dq", lambda g, x: x["ds"] @ x["k"]), "dq: the scale is missing"),
        (instead("dk", lambda g, x: x["ds"].T @ x["q"]), "dk: the scale is missing"),
        (instead("ds", lambda g, x: g * x["scale"]), "dq: the scale is applied twice"),
        (
            backward(
                lambda name, value, x: (
                    value * x["scale"] if name == "dp" else value / x["scale"] if name in ("dq", "dk") else value
                )
            ),
            "dq: dP is scaled and delta is not",
        ),
        (instead("dk", lambda g, x: x["scale"] * x["ds"] @ x["q"]), "dk: dK = scale dS^T Q"),
        (instead("dq", lambda g, x: x["scale"] * x["ds"].T @ x["k"]), "dq: dQ = scale dS K"),
        (instead("dq", lambda g, x: x["scale"] * x["ds"] @ x["q"]), "dq: dQ sums over keys"),
        (instead("dk", lambda g, x: x["scale"] * x["ds"].T @ x["k"]), "dk: dK sums over queries"),
        (instead("dsink", lambda g, x: -g), "dsink: the sign"),
        (instead("dsink", lambda g, x: x["scale"] * g), "dsink: the sink is not scaled"),
        (instead("dsink", lambda g, x: -x["delta"].sum()), "dsink: the sink's gradient lacks its share"),
        (instead("dsink", lambda g, x: -torch.exp(x["sink"] - x["lse"]) * x["delta"]), "sum over the rows"),
        (instead("dsink", lambda g, x: g / len(x["lse"])), "not their mean"),
        (
            instead("dsink", lambda g, x: -(torch.exp(x["sink"] - x["lse"]) * (x["delta"] + x["dlse"])).sum()),
            "dsink: dlse is ignored",
        ),
        (instead("dsink", lambda g, x: g.item()), "dsink: expected a tensor of shape ()"),
        (instead("dsink", lambda g, x: g[None]), "dsink: expected shape ()"),
        (instead("dq", lambda g, x: g.T), "dq: expected shape"),
        (instead("dv", lambda g, x: g + 1), "dv: expected"),
        (lambda *given: given[0], "expected four results, (dq, dk, dv, dsink), got Tensor"),
        (lambda *given: given[:3], "got 3 of them"),
    ],
)
def test_attention_backward(wrong, message):
    assert message in verdict("attention_backward", wrong)


def test_attention_backward_in_other_words():
    def other(q, k, v, sink, out, lse, dout, dlse, scale, window=None):
        """Scaled queries, delta from P and dP, and a list."""
        q = q * scale
        p = torch.exp(masked_scores(q, k, 1, window) - lse.unsqueeze(-1))
        dp = torch.einsum("id,jd->ij", dout, v)
        delta = torch.einsum("ij,ij->i", p, dp) - dlse
        ds = p * (dp - delta[:, None])
        p_sink = 1 - p.sum(-1)
        return [ds @ k * scale, torch.einsum("ij,id->jd", ds, q), (dout.T @ p).T, -p_sink @ delta]

    accepted("attention_backward", other)
    accepted("attention_backward", backward(lambda name, value, x: value))
