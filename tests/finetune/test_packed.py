"""Training over MXFP4 as it is stored: loading, random weights, and runs beside their bf16 twins."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import small_config

from gptoss_kernels.finetune import train
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.model import (
    build_random,
    count_packed_bytes,
    load_adapter,
    load_checkpoint,
    load_config,
    load_packed,
)
from gptoss_kernels.finetune.sample import stream
from gptoss_kernels.integrations.mxfp4 import PROJECTIONS, packed_parameters
from gptoss_kernels.mxfp4.reference import dequantize

PACKED = "data/tiny-gpt-oss/mxfp4"


@pytest.fixture(scope="module")
def pair():
    """The shipped model from its MXFP4 files: dense, and packed."""
    config = load_config(PACKED)
    keys = {"dtype": torch.float32, "attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    return load_checkpoint(PACKED, config, **keys), load_packed(PACKED, config, **keys)


def test_packed_weights_are_the_files_own(pair):
    dense, packed = pair
    files = load_file(f"{PACKED}/model.safetensors")
    state = packed.state_dict()
    assert state.keys() == files.keys()
    for name, tensor in files.items():
        assert torch.equal(state[name], tensor if tensor.dtype == torch.uint8 else tensor.float()), name
    for one, two in zip(dense.model.layers, packed.model.layers, strict=True):
        for name in PROJECTIONS:
            weight = getattr(two.mlp.experts, name)
            assert torch.equal(dequantize(weight.blocks, weight.scales, torch.float32), getattr(one.mlp.experts, name))
    assert packed_parameters(packed) + packed.num_parameters() == dense.num_parameters()
    assert packed_parameters(dense) == 0
    stored = sum(x.nbytes for x in (*packed.parameters(), *packed.buffers()))
    assert count_packed_bytes(packed.config, torch.float32) == stored
    assert packed.generation_config.eos_token_id == dense.generation_config.eos_token_id


@pytest.mark.parametrize("implementation", ["gptoss_triton", "grouped_mm", "eager"])
def test_same_logits_and_gradients_as_dense(pair, implementation):
    ids = torch.randint(0, 1024, (1, 32), generator=torch.Generator().manual_seed(0))
    results = []
    for model in pair:
        model.set_experts_implementation(implementation)
        parameters = [model.model.layers[0].self_attn.q_proj.weight, model.model.layers[1].mlp.router.weight]
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_()
        output = model(ids, labels=ids)
        results.append([output.logits, *torch.autograd.grad(output.loss, parameters)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_no_dense_weight_outlives_its_layer(pair):
    kept = []
    for model in pair:
        shapes = set()
        model.set_experts_implementation("grouped_mm")
        model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=shapes: to.add(x.shape) or x, lambda x: x):
            model(torch.arange(8)[None])
        experts = model.config.num_local_experts
        kept.append(any(len(shape) == 3 and shape[0] == experts for shape in shapes))
    assert kept == [True, False]


def test_saved_again_it_is_the_same_checkpoint(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    again = load_packed(str(tmp_path), config)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, pair[1].state_dict()[name]), name
    dense = load_checkpoint(str(tmp_path), config).state_dict()
    assert all(torch.equal(tensor, pair[0].state_dict()[name]) for name, tensor in dense.items())


def test_random_packed_weights(shapes):
    config = small_config(shapes, hidden_size=256, rope_parameters=None)
    one, two, other = (build_random(config, seed=seed, packed=True) for seed in (7, 7, 8))
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in one.state_dict().items())
    plain = build_random(config, seed=7)
    assert all(
        torch.equal(x, dict(plain.named_buffers())[name])
        for name, x in one.model.rotary_emb.named_buffers("model.rotary_emb")
    )
    for name in PROJECTIONS:
        packed = getattr(one.model.layers[1].mlp.experts, name)
        assert not torch.equal(packed.blocks, getattr(other.model.layers[1].mlp.experts, name).blocks)
        weight = dequantize(packed.blocks, packed.scales, torch.float32)
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.02)
        assert packed.scales.unique().numel() == 2
    with torch.no_grad():
        assert torch.isfinite(one(torch.arange(8)[None]).logits).all()


def run(settings, output, **keys) -> list[float]:
    """Two steps of LoRA with recomputation; their losses."""
    train.run(
        settings(
            use_peft="true",
            lora_dropout=0.0,
            output_dir=str(output),
            max_steps=2,
            max_length=160,
            tokenizer_name="data/tokenizer",
            gradient_checkpointing="true",
            gradient_checkpointing_kwargs='{"use_reentrant": false}',
            **({"lora_targets": ["attention"]} | keys),
        )
    )
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_run_over_packed_weights(settings, tmp_path, capsys):
    """The same losses and the same adapter as over the dense twin; the adapter loads onto either."""
    losses, adapters = [], []
    for base in ("bf16", "mxfp4"):
        keys = {"model_name_or_path": PACKED, "model_init": "pretrained", "base_weights": base}
        losses.append(run(settings, tmp_path / base, **keys))
        adapters.append(load_file(tmp_path / base / "adapter_model.safetensors"))
    said = re.findall("([0-9,]+) parameters, ([0-9,]+) trained", capsys.readouterr().out)
    assert len(said) == 2 and said[0] == said[1], "packed weights count as weights"
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    config = load_config(PACKED)
    loaded = [
        load_adapter(load(PACKED, config, dtype=torch.float32, attn_implementation="gptoss_triton"), tmp_path / "mxfp4")
        for load in (load_checkpoint, load_packed)
    ]
    with torch.no_grad():
        one, two = (model(torch.arange(16)[None]).logits for model in loaded)
        assert torch.equal(one, two)
        assert not torch.equal(one, loaded[1].unload()(torch.arange(16)[None]).logits)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_adapters_on_all_parts_over_random_packed_weights(settings, tmp_path, capsys, fused):
    keys = {"base_weights": "mxfp4", "model_init": "random", "fused_layers": fused}
    losses = run(settings, tmp_path, lora_targets=["attention", "experts", "router"], **keys)
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    # Rank 16 on 2 layers: q, k, v, o; 4 experts' projections; router.
    attention = 16 * 2 * (64 + 64 + 2 * (64 + 32) + 64 + 64)
    experts, router = 16 * 2 * 4 * (64 + 128 + 64 + 64), 16 * 2 * (64 + 4)
    assert f"trained: attention {attention:,}, experts {experts:,}, router {router:,}\n" in capsys.readouterr().out
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(x.numel() for x in saved.values()) == attention + experts + router
    assert all(x.abs().max() > 0 for name, x in saved.items() if "lora_B" in name), "every adapter has learnt"
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(described["target_parameters"]) == [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight",
    ]  # fmt: skip


def test_generation_over_packed_weights():
    keys = dict(adapter=None, prompt="Anna has 3 apples and buys 4 more. How many?", system=None, max_new_tokens=12,
                temperature=0.0, reasoning_effort="medium", conversation_date="2025-06-28", dtype="float32",
                attn_implementation="gptoss_triton")  # fmt: skip
    replies = [stream(PACKED, base_weights=base, **keys) for base in ("bf16", "mxfp4")]
    assert replies[0] == replies[1] and len(replies[0]) > 20


def test_runs_that_cannot_keep_packed_weights(settings):
    with pytest.raises(SetupError, match="base_weights: mxfp4 weights are frozen; train adapters"):
        train.run(settings(base_weights="mxfp4"))
    with pytest.raises(SystemExit):
        settings(base_weights="nf4")


def test_checkpoints_that_cannot_stay_packed(fresh, tmp_path):
    plain = "data/tiny-gpt-oss"
    with pytest.raises(SetupError, match="base_weights: expected an MXFP4 checkpoint .* is not quantized"):
        load_packed(plain, load_config(plain))
    folder = fresh(PACKED)
    tensors = load_file(folder / "model.safetensors")
    scales = tensors.pop("model.layers.1.mlp.experts.down_proj_scales")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match=r"1 weights are missing \(model.layers.1.mlp.experts.down_proj_scales"):
        load_packed(str(folder), load_config(str(folder)))
    tensors["model.layers.1.mlp.experts.down_proj_scales"] = scales[:, :1]
    save_file({k: x.contiguous() for k, x in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match="cannot read the checkpoint .*size mismatch"):
        load_packed(str(folder), load_config(str(folder)))
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match="expected hidden and intermediate sizes in multiples of 32, got 48"):
        load_packed(str(folder), load_config(str(folder)))
