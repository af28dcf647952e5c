"""Loading (MXFP4 included), random weights in real shapes, and the GPU that is too small."""

import json
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from gptoss_kernels.finetune import train
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.model import (
    build_random,
    build_without_weights,
    count_parameters,
    fill_fsdp2,
    load_adapter,
    load_checkpoint,
    load_config,
)
from gptoss_kernels.finetune.preflight import check_memory, memory_floor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def small_config(shapes: str, **changes) -> GptOssConfig:
    return GptOssConfig(**{**json.loads(Path(shapes).read_text()), **changes})


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory) -> Path:
    """A small checkpoint in bf16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_random(small_config(shapes), dtype=torch.bfloat16, seed=1).save_pretrained(folder)
    return folder


def mxfp4(rows: int, columns: int, experts: int, generator: torch.Generator):
    """Random weights in OpenAI's layout, and what they mean.

    Returns:
        blocks uint8 (experts, rows, columns / 32, 16), scales uint8 (experts, rows, columns / 32), and the weight
        bf16 (experts, columns, rows), as Transformers keeps it.
    """
    codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), generator=generator)
    scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)  # the low nibble comes first
    magnitude = torch.tensor(E2M1, dtype=torch.float64)[codes & 7]
    weight = torch.where(codes >= 8, -magnitude, magnitude) * 2.0 ** (scales[..., None] - 127).double()
    return blocks, scales.to(torch.uint8), weight.reshape(experts, rows, columns).mT.to(torch.bfloat16)


@pytest.fixture
def twins(checkpoint, fresh, tmp_path):
    """The same model twice: experts in MXFP4 as openai/gpt-oss-20b ships them, and everything in bf16."""
    plain, packed = fresh(checkpoint), tmp_path / "mxfp4"
    packed.mkdir()
    weights = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(3)
    stored = dict(weights)
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales, weights[key] = mxfp4(rows, columns, experts, generator)
            assert weights[key].shape == stored.pop(key).shape
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (packed / "config.json").write_text(json.dumps(config))
    for folder, tensors in ((plain, weights), (packed, stored)):
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    return plain, packed


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
def test_mxfp4_equals_its_bf16_twin(twins, dtype, caplog):
    plain, packed = (
        load_checkpoint(str(folder), load_config(str(folder)), dtype=dtype, attn_implementation="gptoss_triton")
        for folder in twins
    )
    assert "dequantize the model" not in caplog.text, "asked for, not fallen back to"
    expected = plain.state_dict()
    assert packed.state_dict().keys() == expected.keys()
    for name, weight in packed.state_dict().items():
        assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name
    assert plain.model.layers[0].mlp.experts.down_proj.abs().max() > 0.01
    ids = torch.randint(0, 1024, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("adapters", [False, True])
def test_mxfp4_model_trains_like_its_bf16_twin(twins, settings, tmp_path, adapters):
    losses = []
    for folder in twins:
        keys = {"use_peft": "true", "lora_target_modules": "all-linear"} if adapters else {}
        output = tmp_path / f"trained-{folder.name}"
        result = train.run(
            settings(
                model_name_or_path=str(folder),
                model_init="pretrained",
                tokenizer_name="data/tokenizer",
                output_dir=str(output),
                max_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                **keys,
            )
        )
        losses.append(result.last_loss)
        if not adapters:
            assert "quantization_config" not in json.loads((output / "config.json").read_text())
            trained = load_checkpoint(str(output), load_config(str(output)))
            before = load_file(twins[0] / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
            assert trained.dtype == torch.float32
            assert not torch.equal(trained.model.layers[1].mlp.experts.down_proj, before.float())
    assert losses[0] == losses[1]


def test_other_quantizations_are_refused(twins):
    config = load_config(str(twins[1]))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(SetupError, match="expected mxfp4 or no quantization, .* is gptq"):
        load_checkpoint(str(twins[1]), config)


def test_unreadable_checkpoints(checkpoint, fresh, tmp_path):
    with pytest.raises(SetupError, match="cannot read the configuration"):
        load_config(str(tmp_path))
    folder = fresh(checkpoint)
    config = load_config(str(folder))
    weights = (folder / "model.safetensors").read_bytes()

    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(SetupError, match="cannot read the checkpoint"):
        load_checkpoint(str(folder), config)

    (folder / "model.safetensors").unlink()
    with pytest.raises(SetupError, match="cannot read the checkpoint"):
        load_checkpoint(str(folder), config)

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.self_attn.sinks"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match=r"1 weights are missing \(model.layers.1.self_attn.sinks"):
        load_checkpoint(str(folder), config)

    (folder / "config.json").write_text("{")
    with pytest.raises(SetupError, match="cannot read the configuration"):
        load_config(str(folder))


def test_adapter_that_is_not_there(checkpoint, tmp_path):
    model = load_checkpoint(str(checkpoint), load_config(str(checkpoint)))
    with pytest.raises(SetupError, match="adapter: cannot load"):
        load_adapter(model, str(tmp_path))


@pytest.mark.parametrize(
    "name, layers, experts, billions", [("gpt-oss-20b", 24, 32, 20.9), ("gpt-oss-120b", 36, 128, 116.8)]
)
def test_real_shapes(name, layers, experts, billions):
    config = load_config(f"openai/{name}", random=True)
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (layers, experts, 4)
    assert config.layer_types == ["sliding_attention", "full_attention"] * (layers // 2)
    assert (config.sliding_window, config.head_dim, config.vocab_size) == (128, 64, 201088)
    assert count_parameters(config) / 1e9 == pytest.approx(billions, abs=0.1)


def test_unknown_shapes():
    with pytest.raises(SetupError, match="knows the shapes of gpt-oss-120b, gpt-oss-20b, gpt-oss-tiny"):
        load_config("gpt-oss-21b", random=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_model_is_what_transformers_would_build(shapes, dtype):
    config = small_config(shapes, rope_parameters=None)  # YaRN, whose frequencies the builder must not lose
    model = build_random(config, dtype=dtype, seed=7)
    other = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for kind in ("named_parameters", "named_buffers"):
        one, two = (dict(getattr(m, kind)()) for m in (model, other))
        assert one.keys() == two.keys()
        assert all(one[n].shape == two[n].shape and one[n].dtype == two[n].dtype for n in one)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name]), name
    again, another = build_random(config, dtype=dtype, seed=7), build_random(config, dtype=dtype, seed=8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, another.lm_head.weight)
    assert model.lm_head.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    sinks = torch.cat([layer.self_attn.sinks.float() for layer in model.model.layers])
    assert 0.2 < sinks.std() < 3
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_memory_floor():
    # 20.9 B parameters in bf16: full finetuning with AdamW is 8 bytes each, adapters need the weights alone.
    assert memory_floor(100, 100, 2, 4) == 100 * 8
    assert memory_floor(100, 0, 2, 4) == 100 * 2
    assert memory_floor(100, 100, 2, 12, processes=8) == 200
    assert memory_floor(101, 0, 1, 0, processes=8) == 13, "rounded up"
    check_memory(80, 80, "advice")
    with pytest.raises(SetupError, match="needs? at least 38.9 GiB .*24.0 GiB are free; take a larger one"):
        check_memory(memory_floor(20_900_000_000, 0, 2, 0), 24 * 2**30, "take a larger one")


def test_what_fsdp_cannot_spread_is_named(shapes):
    model = build_without_weights(load_config(shapes, random=True), "cpu", torch.float32)
    assert model.model.embed_tokens.weight.is_meta and model.model.rotary_emb.inv_freq.device.type == "cpu"
    with pytest.raises(SetupError, match="sinks with 2 rows is too short for 8 processes"):
        fill_fsdp2(model, types.SimpleNamespace(is_fsdp2=True, num_processes=8, device="cpu"), 0)
    with pytest.raises(SetupError, match="fsdp_version 2"):
        fill_fsdp2(model, types.SimpleNamespace(is_fsdp2=False), 0)
