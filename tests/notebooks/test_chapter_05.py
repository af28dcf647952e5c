"""The backward pass of notebook 05 against the package, in fp64; it defines no kernel."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.attention.reference import attention_concat, attention_reference
from gptoss_kernels.course.solutions import chapter_05
from gptoss_kernels.testing import AttentionCase, exact_attention, relative_error

NOTEBOOK = extract.load("05_backward_on_paper")
CASES = [
    AttentionCase(q_len=23, dtype=torch.float64),
    AttentionCase(q_len=23, q_heads=6, kv_heads=2, window=5, dtype=torch.float64),
    AttentionCase(q_len=9, batch=2, q_heads=3, kv_heads=3, window=1, dtype=torch.float64),
    AttentionCase(q_len=1, q_heads=2, kv_heads=1, dtype=torch.float64),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def gradients_of(case):
    inputs, _ = case.inputs()
    grad_out, grad_lse = NOTEBOOK.draw(*inputs[0].shape, seed=7), NOTEBOOK.draw(*inputs[0].shape[:3], seed=8)
    return inputs, grad_out, grad_lse


@each_case
def test_sink_attention_is_exact(case):
    inputs, grad_out, grad_lse = gradients_of(case)
    out, lse = NOTEBOOK.SinkAttention.apply(*inputs, case.head_dim**-0.5, case.window)
    got = [out, lse, *torch.autograd.grad([out, lse], inputs, [grad_out, grad_lse])]
    exact = exact_attention(inputs, grad_out, grad_lse, sliding_window=case.window)
    for mine, wanted in zip(got, exact, strict=True):
        assert mine.shape == wanted.shape and relative_error(mine, wanted) < 1e-12


@each_case
def test_eager_attention_is_the_concatenated_definition(case):
    inputs, grad_out, _ = gradients_of(case)
    out = NOTEBOOK.eager_attention(*inputs, case.window)
    wanted, _ = attention_concat(*inputs, sliding_window=case.window)
    torch.testing.assert_close(out, wanted)
    mine, theirs = (torch.autograd.grad(x, inputs, grad_out) for x in (out, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 3])
def test_one_head(window):
    q, k, v, dout = (NOTEBOOK.draw(8, 4, seed=seed) for seed in range(4))
    sink = torch.tensor(0.3, dtype=torch.float64)
    out, lse = NOTEBOOK.attention_forward(q, k, v, sink, 0.5, window)
    given = [x[None, None] for x in (q, k, v)]
    wanted = attention_reference(*given, sink[None], scale=0.5, sliding_window=window)
    torch.testing.assert_close((out[None, None], lse[None, None]), wanted)

    dlse = NOTEBOOK.draw(8, seed=9)
    arguments = (q, k, v, sink, out, lse, dout, dlse, 0.5, window)
    torch.testing.assert_close(NOTEBOOK.attention_backward(*arguments), chapter_05.attention_backward(*arguments))


def test_finite_differences():
    x = NOTEBOOK.draw(2, 3, seed=0)
    torch.testing.assert_close(NOTEBOOK.numerical_gradient(lambda x: x.sin().sum(), x), x.cos(), rtol=1e-8, atol=1e-8)
    of_x, of_y = NOTEBOOK.numerical_gradients(lambda x, y: (x * y).sum(), [x, x + 1])
    torch.testing.assert_close((of_x, of_y), (x + 1, x), rtol=1e-8, atol=1e-8)


def test_the_bug_and_the_mistakes_are_wrong():
    q, k, v, dout = (NOTEBOOK.draw(6, 4, seed=seed) for seed in range(4))
    sink = torch.tensor(0.5, dtype=torch.float64)
    out, lse = NOTEBOOK.attention_forward(q, k, v, sink, 0.5)
    arguments = (q, k, v, sink, out, lse, dout)
    right = chapter_05.attention_backward(*arguments, torch.zeros_like(lse), 0.5)

    def wrong(gradients):
        return {
            name for name, a, b in zip(NOTEBOOK.NAMES, gradients, right, strict=True) if relative_error(a, b) > 1e-3
        }

    assert wrong(NOTEBOOK.backward_with_a_bug(*arguments, 0.5)) == {"dq", "dk"}
    at_one = NOTEBOOK.attention_forward(q, k, v, sink, 1.0)
    at_one_arguments = (q, k, v, sink, *at_one, dout)
    torch.testing.assert_close(
        NOTEBOOK.backward_with_a_bug(*at_one_arguments, 1.0),
        chapter_05.attention_backward(*at_one_arguments, torch.zeros_like(lse), 1.0),
    )
    assert wrong(NOTEBOOK.backward_with("none", *arguments, 0.5)) == set()
    assert {mistake: wrong(NOTEBOOK.backward_with(mistake, *arguments, 0.5)) for mistake in NOTEBOOK.MISTAKES} == {
        "delta missing": {"dq", "dk"},
        "scale twice": {"dq", "dk"},
        "lse without sink": {"dq", "dk", "dv", "dsink"},
        "dz of wrong sign": {"dsink"},
        "sink scaled": {"dsink"},
        "P not masked": {"dq", "dk", "dv"},
    }


def test_saved_bytes_counts_each_storage_once():
    x = torch.ones(8, requires_grad=True)
    assert NOTEBOOK.saved_bytes(lambda: x * x) == 32
    assert NOTEBOOK.saved_bytes(lambda: (x * x, x[:4] * x[4:])) == 32


def test_products_are_counted():
    a = torch.ones(4, 4)
    assert NOTEBOOK.products(lambda: a @ a @ a, 2 * 4**3) == 2
