"""`experts_implementation="gptoss_triton"` against Transformers' own experts, alone and inside a model."""

import functools
from types import SimpleNamespace

import pytest
import torch

from gptoss_kernels import fused_experts
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss, relative_error

from .conftest import assert_gradients_close, loss_and_gradients


@pytest.fixture
def expert_kernels(kernels, monkeypatch):
    monkeypatch.setattr(integration, "fused_experts", functools.partial(fused_experts, backend="triton"))


def test_one_layer(expert_kernels, model):
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(21, 64, generator=generator)
    indices = torch.rand(21, 4, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(21, 2, generator=generator).softmax(-1)
    with torch.no_grad():
        want = experts(x, indices, weights)
        got = integration.experts_forward(experts, x, indices, weights)
    assert relative_error(got, want) <= 1e-6


def test_in_a_model_losses_and_every_gradient_agree(expert_kernels, tokens):
    model = random_gpt_oss(num_hidden_layers=2, seed=4)
    input_ids, labels = tokens(2, 20), tokens(2, 20)
    want, gradients = loss_and_gradients(model, input_ids, labels)
    model.set_experts_implementation("gptoss_triton")
    got, ours = loss_and_gradients(model, input_ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_gradients_close(ours, gradients)


def test_other_experts_are_refused():
    other = SimpleNamespace(is_transposed=False, is_concatenated=True, has_bias=False)
    with pytest.raises(ValueError, match='experts_implementation="gptoss_triton": expected gpt-oss\'s experts'):
        integration.experts_forward(other, None, None, None)
