"""`patch_gpt_oss`: each part alone and all together change nothing but rounding, and unpatching leaves no trace."""

import functools

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss_kernels import fused_experts, patch_gpt_oss, unpatch_gpt_oss
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.integrations.patch import PARTS
from gptoss_kernels.testing import random_gpt_oss

from .conftest import assert_close, assert_gradients_close, logits, loss_and_gradients


@pytest.fixture
def all_kernels(kernels, monkeypatch):
    monkeypatch.setattr(integration, "fused_experts", functools.partial(fused_experts, backend="triton"))


@pytest.fixture(scope="module")
def two_layers():
    return random_gpt_oss(num_hidden_layers=2, seed=5)


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_parity(part, all_kernels, two_layers, tokens):
    input_ids, labels = tokens(1, 40), tokens(1, 40)
    rope = modeling_gpt_oss.apply_rotary_pos_emb
    want, gradients = loss_and_gradients(two_layers, input_ids, labels)
    try:
        assert patch_gpt_oss(two_layers, **{name: part in (name, "all") for name in PARTS}) is two_layers
        got, ours = loss_and_gradients(two_layers, input_ids, labels)
    finally:
        unpatch_gpt_oss(two_layers)
    assert_close(got, want, 2e-5)
    assert_gradients_close(ours, gradients)
    assert modeling_gpt_oss.apply_rotary_pos_emb is rope
    again, _ = loss_and_gradients(two_layers, input_ids, labels)
    assert torch.equal(again, want), "something of the patch is left"


def test_twice_and_other_switches(two_layers):
    norm = two_layers.model.norm
    patch_gpt_oss(two_layers)
    assert two_layers.config._attn_implementation == two_layers.config._experts_implementation == "gptoss_triton"
    assert "forward" in vars(norm)
    patch_gpt_oss(two_layers, rms_norm=False, experts=False)
    assert "forward" not in vars(norm) and two_layers.config._experts_implementation == "eager"
    unpatch_gpt_oss(two_layers)
    unpatch_gpt_oss(two_layers)
    assert two_layers.config._attn_implementation == "eager"


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model: expected a gpt-oss model of Transformers, got Linear"):
        patch_gpt_oss(torch.nn.Linear(2, 2))


@pytest.fixture
def with_adapters(tokens):
    peft = pytest.importorskip("peft")
    model = random_gpt_oss(num_hidden_layers=1, seed=6)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters(all_kernels, with_adapters, tokens):
    input_ids, labels = tokens(1, 20), tokens(1, 20)

    def run():
        out, gradients = loss_and_gradients(with_adapters, input_ids, labels)
        return out, {name: g for name, g in gradients.items() if g is not None}

    want, gradients = run()
    assert len(gradients) == 8 and all("lora" in name for name in gradients)
    patch_gpt_oss(with_adapters)
    got, ours = run()
    assert_close(got, want, 2e-5)
    assert_gradients_close(ours, gradients)
    with with_adapters.disable_adapter():
        bare = logits(with_adapters, input_ids)
    unpatch_gpt_oss(with_adapters)
    assert torch.equal(run()[0], want)
    with with_adapters.disable_adapter():
        assert_close(bare, logits(with_adapters, input_ids), 2e-5)


def test_adapters_that_are_not_plain_keep_pefts_own(with_adapters, tokens, monkeypatch):
    called = []
    monkeypatch.setattr("gptoss_kernels.layers.lora.lora_linear", lambda *a: called.append(a) or 1 / 0)
    patch_gpt_oss(with_adapters)
    layer = with_adapters.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, 64)
    with pytest.raises(ZeroDivisionError):
        layer(x)
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    layer(x)
    layer.lora_dropout["default"] = torch.nn.Identity()
    layer.merge()
    layer(x)
    assert len(called) == 1
    unpatch_gpt_oss(with_adapters)
