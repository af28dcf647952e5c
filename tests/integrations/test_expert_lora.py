"""PEFT's adapters on the experts (target_parameters): through the kernels, over packed weights, saved and merged."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_kernels import fused_experts, patch_gpt_oss, unpatch_gpt_oss
from gptoss_kernels.integrations.mxfp4 import PROJECTIONS, pack_experts
from gptoss_kernels.mxfp4.reference import dequantize, quantize

peft = pytest.importorskip("peft")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = [f"mlp.experts.{name}" for name in PROJECTIONS]
SHAPES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=3,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 10000},
)  # fmt: skip


def models():
    """The same small model twice, with dense and with packed experts."""
    torch.manual_seed(0)
    config = GptOssConfig(**SHAPES, experts_implementation="gptoss_triton", attn_implementation="eager")
    dense = GptOssForCausalLM(config)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for name in TARGETS:
        key = f"model.layers.0.{name}"
        blocks, scales = quantize(20 * state.pop(key))
        dense.get_parameter(key).data = dequantize(blocks, scales, torch.float32)
        state |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    with torch.device("meta"):
        packed = GptOssForCausalLM(config)
    pack_experts(packed).load_state_dict(state, assign=True)
    packed.model.rotary_emb = copy.deepcopy(dense.model.rotary_emb)
    return dense.to(DEVICE), packed.to(DEVICE)


def adapted(model, r=4, **keys):
    """With adapters whose B is not 0."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_parameters=TARGETS, target_modules=["q_proj"], **keys)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def layer(model):
    return model.base_model.model.model.layers[0].mlp.experts


def results(experts):
    """[output, gradients of the input, the routing weights and every adapter] of the wrapped layer."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    x, weights = draw(6, 32).requires_grad_(), draw(6, 2).softmax(-1).requires_grad_()
    indices = torch.tensor([[0, 1], [1, 0], [0, 2], [1, 2], [2, 0], [0, 1]], device=DEVICE)
    y = experts(x, indices, weights)
    trained = [x, weights, *(p for p in experts.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, trained, draw(6, 32))]


@pytest.fixture
def on_the_reference(monkeypatch):
    """As on a CPU without the interpreter."""
    for name in ("patch", "transformers", "mxfp4"):
        monkeypatch.setattr(f"gptoss_kernels.integrations.{name}.default_backend", lambda x: "reference")


def test_kernels_compute_what_peft_does():
    dense, packed = models()
    dense, packed = adapted(dense), adapted(packed)
    want = results(layer(dense))
    assert len(want) == 7 and all(x.norm() > 0 for x in want)
    got, over_packed = (results(layer(patch_gpt_oss(model, attention=False, rope=False))) for model in (dense, packed))
    for a, b, c in zip(got, over_packed, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        assert torch.equal(a, b)
    unpatch_gpt_oss(dense)
    assert all(torch.equal(a, b) for a, b in zip(results(layer(dense)), want, strict=True))


def test_the_kernels_are_what_computes(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "gptoss_kernels.integrations.transformers.fused_experts",
        lambda *args, **kwargs: calls.append(sorted(kwargs)) or fused_experts(*args, **kwargs),
    )
    for model in models():
        results(layer(patch_gpt_oss(adapted(model), attention=False, rope=False)))
    assert calls == 2 * [["alpha", "down_lora", "gate_up_lora", "limit"]]


@pytest.mark.gpu
def test_twenty_steps_are_peft_own():
    losses = []
    for which, patched in ((0, False), (0, True), (1, True)):
        model = adapted(models()[which])
        if patched:
            patch_gpt_oss(model, attention=False, rope=False)
        losses.append(train(model, 20))
    assert losses[0][-1] < losses[0][0] - 0.4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert torch.equal(losses[2], losses[1])


def train(model, steps: int) -> torch.Tensor:
    """Losses of AdamW steps on one batch."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_without_triton_packed_weights_give_what_peft_gives(on_the_reference):
    dense, packed = models()
    dense, packed = adapted(dense), patch_gpt_oss(adapted(packed), attention=False, rope=False)
    for got, want in zip(results(layer(packed)), results(layer(dense)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_adapters_are_saved_and_loaded_as_peft_does(tmp_path, on_the_reference):
    dense, packed = (patch_gpt_oss(adapted(model), attention=False, rope=False) for model in models())
    for name, model in (("dense", dense), ("packed", packed)):
        model.save_pretrained(tmp_path / name)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dense", "packed"))
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    prefix = "base_model.model.model.layers.0.mlp.experts."
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in one.items() if name.startswith(prefix)}
    assert shapes == {
        "base_layer.lora_A.weight": (12, 32),
        "base_layer.lora_B.weight": (64, 12),
        "lora_A.weight": (12, 32),
        "lora_B.weight": (32, 12),
    }
    dense_again, packed_again = (peft.PeftModel.from_pretrained(model, tmp_path / "packed") for model in models())
    patch_gpt_oss(packed_again, attention=False, rope=False)
    ids = torch.arange(12, device=DEVICE)[None]
    with torch.no_grad():
        want = dense(ids).logits
        for model in (dense_again, packed_again):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
        with packed_again.disable_adapter():
            torch.testing.assert_close(packed_again(ids).logits, models()[0](ids).logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dense_again.merge_and_unload()(ids).logits, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="packed MXFP4 weights are frozen"):
        packed_again.merge_and_unload()


def test_two_adapters_over_packed_weights_are_refused(on_the_reference):
    model = patch_gpt_oss(adapted(models()[1]), attention=False, rope=False)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapters: expected one active adapter"):
        model(torch.arange(4, device=DEVICE)[None])
