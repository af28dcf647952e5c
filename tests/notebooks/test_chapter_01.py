"""Chapter 01's functions against the package: the attention that learners build, and the memory that they predict."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.attention.reference import attention_reference
from gptoss_kernels.testing import AttentionCase, exact_attention, fenced, relative_error


@pytest.fixture(scope="module")
def chapter():
    return extract.load("01_eager_attention_and_sinks")


CASES = [
    AttentionCase(q_len=1),
    AttentionCase(q_len=33, batch=2, q_heads=6, kv_heads=3),
    AttentionCase(q_len=33, window=1),
    AttentionCase(q_len=33, window=8),
    AttentionCase(q_len=33, window=64),
    AttentionCase(q_len=3, kv_len=33, window=8),
    AttentionCase(q_len=33, q_heads=8, kv_heads=1, sinks=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_attention(chapter, case):
    """Outputs and all gradients, with inputs between NaNs."""
    inputs, keywords = case.inputs()
    inputs = [fenced(x.detach().double()).requires_grad_() for x in inputs]
    out, weights, lse = chapter.eager_attention(*inputs, **keywords)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)
    exact = exact_attention(inputs, grad, **keywords)
    for actual, expected in zip((out, lse, *grads), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    share = 1 - weights.sum(-1)
    sinks = inputs[3][:, None] if case.sinks else torch.tensor(-torch.inf)
    torch.testing.assert_close(share, torch.exp(sinks - lse).expand_as(share), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case.sinks], ids=str)
def test_transformers_eager(chapter, case):
    inputs, keywords = case.inputs()
    inputs = [x.detach().double() for x in inputs]
    out = chapter.transformers_eager(*inputs, **keywords)
    assert relative_error(out, attention_reference(*inputs, **keywords)[0]) < 1e-12


def test_forms_of_a_single_head(chapter):
    q, k, v = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, weights = chapter.one_head(q, k, v, 0.5)
    expected, _ = attention_reference(*(x[None, None] for x in (q, k, v)), scale=0.5)
    torch.testing.assert_close(out, expected[0, 0])
    torch.testing.assert_close(chapter.one_query(q[-1], k, v, 0.5)[0], out[-1])
    column, share = chapter.softmax_with_column(q @ k.T, q[0, 0])
    torch.testing.assert_close(column, chapter.softmax_with_sink(q @ k.T, q[0, 0])[0])
    torch.testing.assert_close(share, 1 - column.sum(-1))


def test_sequences_ask_what_they_say(chapter):
    """Where a head is asked, the target is the payload of the one token whose name is asked for, within the window."""
    x, target, asked = chapter.draw(16, torch.Generator().manual_seed(0))
    names, tokens, width = x[..., : chapter.TOKENS], chapter.TOKENS, chapter.WIDTH
    wanted, payload = x[..., tokens : 2 * tokens], x[..., 2 * tokens : 2 * tokens + width]
    match = wanted @ names.mT  # [batch, tokens, tokens]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    assert ((match == 0) | ((distance >= 1) & (distance < chapter.WINDOW))).all()
    assert torch.equal(match.sum(-1), asked.sum(1).float())
    torch.testing.assert_close(target, (match @ payload)[:, None] * asked[..., None])
    assert not target[~asked].any() and payload[:, 0].eq(0).all()


def test_sinks_take_what_is_not_asked_for_whatever_the_seed(chapter):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the notebook: more of them only wait for each other
    generator = torch.Generator().manual_seed(7)
    batches = [chapter.draw(chapter.BATCH, generator) for _ in range(chapter.STEPS)]
    final = {}
    for has_sinks in (True, False):
        layer = chapter.Layer(has_sinks, chapter.WINDOW, seed=7)
        final[has_sinks] = chapter.train(layer, batches)[-20:].mean().item()
    torch.set_num_threads(threads)
    assert final[True] < 0.05 < 0.2 < final[False]


@pytest.mark.parametrize("tokens", [512, 4096])
def test_counted_bytes(chapter, tokens):
    """What the dispatch mode counts on meta is what the prediction says, up to what grows with the tokens alone."""
    peak, kept, both = chapter.count(chapter.modeling_gpt_oss.eager_attention_forward, tokens)
    linear = 40 * 64 * tokens * 64  # twenty bf16 tensors of the size of q
    for counted, predicted in zip((peak, kept), chapter.eager_bytes(tokens, 64, 2), strict=True):
        assert predicted <= counted < predicted + linear
    assert both >= peak


def test_alive_forgets_what_is_collected(chapter):
    with chapter.Alive() as alive:
        a = torch.zeros(1000)
        b = a[:10] + 1
        del a
        assert alive.bytes == 40 and alive.peak == 4040
        b.view(2, 5)
    assert alive.bytes == 40


def test_flash_bytes_against_the_benchmark(chapter):
    """The recorded peak of the benchmark, which counts the same tensors."""
    import csv

    with (extract.ROOT / "benchmarks" / "results" / "attention.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["contender"] in ("ours", "eager")]
    for row in rows:
        tokens, measured = int(row["tokens"]), float(row["peak_extra_gib"]) * 2**30
        predicted = (
            chapter.flash_bytes(tokens) if row["contender"] == "ours" else 4 * chapter.eager_bytes(tokens, 64, 2)[1]
        )
        assert 0.95 < measured / predicted < 1.1, row
