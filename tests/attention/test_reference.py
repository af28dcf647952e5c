"""The two definitions of attention with sinks prove each other in fp64."""

import math

import pytest
import torch

from gptoss_kernels.attention.reference import attention_concat, attention_reference
from gptoss_kernels.testing import AttentionCase

CASES = [
    AttentionCase(),
    AttentionCase(sinks=False),
    AttentionCase(q_heads=6, kv_heads=1, window=5),
    AttentionCase(q_len=3, kv_len=40, batch=2, window=7),
    AttentionCase(documents=(1, 10, 33, 1, 25)),
    AttentionCase(documents=(1, 10, 33, 1, 25), window=4, sinks=False),
    AttentionCase(batch=2, padding="left"),
    AttentionCase(batch=3, padding="right", window=9),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_definitions_agree_to_1e_10(case):
    inputs, keywords = case.inputs()
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    first, second = attention_reference(*inputs, **keywords), attention_concat(*inputs, **keywords)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in first]
    pairs = zip(
        [*first, *torch.autograd.grad(first, inputs, grads)],
        [*second, *torch.autograd.grad(second, inputs, grads)],
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradients_against_finite_differences():
    inputs, keywords = AttentionCase(q_len=5, head_dim=16, q_heads=2, kv_heads=1, window=3).inputs()
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, **keywords), inputs)


def test_one_key_by_hand():
    # One query, one key, score 0, sink 0: the key gets half of the weight.
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)
    v = torch.arange(16.0).reshape(1, 1, 1, 16)
    out, lse = attention_reference(q, k, v, torch.zeros(1))
    torch.testing.assert_close(out, v / 2)
    assert lse.item() == pytest.approx(math.log(2))


def test_row_without_key_and_sink_is_zero():
    inputs, _ = AttentionCase(q_len=4, sinks=False).inputs()
    real = torch.tensor([[False, False, True, True]])
    out, lse = attention_reference(*inputs, key_padding_mask=real)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == float("-inf")).all()
    grads = torch.autograd.grad(out.sum() + lse[lse > float("-inf")].sum(), inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, :2] == 0).all()


def test_result_merges_heads_without_a_copy():
    inputs, _ = AttentionCase(batch=2).inputs()
    out, _ = attention_reference(*inputs)
    assert out.transpose(1, 2).reshape(2, 70, -1).data_ptr() == out.data_ptr()
