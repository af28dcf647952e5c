"""What notebook 10 writes by hand against PEFT and Transformers; it defines no kernel."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("trl", reason="chapter 10 needs the training extra")
pytest.importorskip("peft", reason="chapter 10 needs the training extra")

sys.path.insert(0, str(Path(__file__).parent))
import extract
import peft

from gptoss_kernels.finetune.config import LORA_TARGETS
from gptoss_kernels.testing import random_gpt_oss


@pytest.fixture(scope="module")
def notebook():
    return extract.load("10_lora_finetuning")


def adapted(model, notebook):
    """PEFT's adapters with random values, and the notebook's with the same values"""
    own = notebook.attach(model.requires_grad_(False), r=4, alpha=8)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS["attention"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    for layer, other in zip(own.model.layers, theirs.base_model.model.model.layers, strict=True):
        for name in LORA_TARGETS["attention"]:
            lora, peer = getattr(layer.self_attn, name), getattr(other.self_attn, name)
            lora.a.data, lora.b.data = peer.lora_A["default"].weight.data, peer.lora_B["default"].weight.data
    return own, theirs


def test_adapters_are_pefts(notebook):
    own, theirs = adapted(random_gpt_oss("small", num_hidden_layers=2), notebook)
    ids = torch.arange(12)[None]
    assert sum(p.numel() for p in notebook.trained(own)) == theirs.num_parameters(only_trainable=True) > 0
    logits = [model(ids, use_cache=False).logits for model in (own, theirs)]
    torch.testing.assert_close(*logits)
    gradients = [
        torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
        for out, model in zip(logits, (own, theirs), strict=True)
    ]
    assert sorted(g.norm().item() for g in gradients[0]) == pytest.approx(
        sorted(g.norm().item() for g in gradients[1]), rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_pefts_but_for_rounding(notebook, dtype):
    own, theirs = adapted(random_gpt_oss("small", num_hidden_layers=1, dtype=dtype), notebook)
    merged = theirs.merge_and_unload()
    for name in LORA_TARGETS["attention"]:
        lora = getattr(own.model.layers[0].self_attn, name)
        got = notebook.merge_lora(lora.layer.weight, lora.a.float(), lora.b.float(), lora.scaling)
        wanted = getattr(merged.model.layers[0].self_attn, name).weight
        eps = torch.finfo(dtype).eps
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(60, 4, 0.1), (10, 0, 0.5), (100, 30, 0.0)])
def test_the_schedule_is_transformers(notebook, steps, warmup, floor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    schedule = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, warmup, steps, scheduler_specific_kwargs={"min_lr_rate": floor}
    )
    got = [notebook.learning_rate(step, steps, warmup, 3.0, floor) for step in range(steps + 1)]
    assert got == pytest.approx([3.0 * schedule.lr_lambdas[0](step) for step in range(steps + 1)])
