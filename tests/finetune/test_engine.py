"""The engine that was asked for is the one in effect, or the run stops; what a node needs is counted."""

import types
from pathlib import Path

import pytest
import torch

from gptoss_kernels.finetune import engine, preflight
from gptoss_kernels.finetune.config import parse
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.testing import random_gpt_oss

ROOT = Path(__file__).resolve().parents[2]
ENGINES = [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")]


def training(found="MULTI_GPU", stage=3, offload="none", world_size=1, deepspeed_config=None, **keys):
    """What of TrainingArguments is asked for here."""
    settings = dict(zero_stage=stage, offload_optimizer_device=offload, deepspeed_config=deepspeed_config or {})
    plugin = types.SimpleNamespace(**settings) if stage is not None else None
    state = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=found))
    settings = dict(fsdp=None, deepspeed=None, use_cpu=False, bf16=True, fp16=False, optim="adamw_torch_fused",
                    gradient_accumulation_steps=1) | keys  # fmt: skip
    return types.SimpleNamespace(
        deepspeed_plugin=plugin, distributed_state=state, world_size=world_size, **settings
    )  # fmt: skip


@pytest.mark.parametrize("variable, name", ENGINES)
def test_an_engine_on_the_cpu_is_an_error(monkeypatch, settings, capsys, variable, name):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SystemExit):
        settings()
    said = capsys.readouterr().err
    assert said.startswith(f"sft.py: error: distributed_type: {name} shards on GPUs alone") and said.count("\n") == 1


@pytest.mark.parametrize("variable, name", ENGINES)
def test_another_engine_is_an_error(monkeypatch, variable, name):
    engine.check_engine(training("NO"))
    monkeypatch.setenv(variable, "true")
    engine.check_engine(training({"FSDP": "MULTI_GPU"}.get(name, name)))
    for found in ("NO", "MULTI_CPU"):
        with pytest.raises(SetupError, match=f"distributed_type: {name} was asked for, and Accelerate runs {found}"):
            engine.check_engine(training(found))


def test_processes_that_do_not_know_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.check_engine(training("MULTI_CPU", world_size=2))
    with pytest.raises(SetupError, match="num_processes: 2 run, each alone"):
        engine.check_engine(training("NO", world_size=1))


def test_weights_that_are_not_sharded_are_an_error(monkeypatch):
    model = random_gpt_oss(num_hidden_layers=1)
    with pytest.raises(SetupError, match=r"distributed_type: \d+ parameters are not sharded \(model.embed_tokens"):
        engine.check_sharding(model, 2)
    for p in model.parameters():  # as ZeRO-3 would leave them on each process if it kept all
        p.ds_tensor, p.ds_numel = p.detach(), p.numel()
    engine.check_sharding(model, 1)
    with pytest.raises(SetupError, match="expected parameters spread over 2 processes, and this one keeps"):
        engine.check_sharding(model, 2)
    callback = engine.Sharding()
    callback.on_train_begin(training(), None, None, model=model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SetupError, match="expected parameters spread"):
        callback.on_train_begin(training(world_size=2), None, None, model=model)


def test_a_sample_of_a_sharded_model_is_refused(settings, monkeypatch):
    arguments = settings(sample_prompt="Why?")
    preflight.check_settings(arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SetupError, match="sample_prompt: one process cannot generate"):
        preflight.check_settings(arguments)


def floor(run, count: int) -> float:
    """GB that each of eight GPUs needs at the least."""
    kept = preflight.kept_dtype(run, torch.bfloat16)
    states, gradients = (f(run, kept) for f in (preflight.optimizer_state_bytes, preflight.gradient_bytes))
    return preflight.memory_floor(count, count, kept.itemsize, states, 8, gradients) / 1e9


def test_what_a_node_needs_is_counted(monkeypatch):
    """The figures in configs/sft_full_120b.yaml and zero3_offload.yaml."""
    small, large = 20_914_757_184, 116_829_156_672
    zero3, offloaded, fsdp = training(), training(offload="cpu"), training(stage=None)
    assert floor(zero3, small) == pytest.approx(41.8, abs=0.05)
    assert floor(zero3, large) == pytest.approx(234, abs=0.5)
    bf16 = training(deepspeed_config={"bf16": {"enabled": True, "bf16_optimizer_states": True}})
    assert floor(bf16, small) == pytest.approx(20.9, abs=0.05)  # bf16 weights, gradients and moments
    assert floor(offloaded, large) == pytest.approx(29.2, abs=0.05)
    assert preflight.host_bytes(zero3, large) == 0
    assert preflight.host_bytes(offloaded, small) == pytest.approx(0.38e12, abs=0.005e12)
    assert preflight.host_bytes(offloaded, large) == pytest.approx(2.10e12, abs=0.005e12)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert floor(fsdp, small) == pytest.approx(41.8, abs=0.05)  # fp32 weights, gradients and moments
    with pytest.raises(SetupError, match="this host needs at least 1,959 GiB .*, and has 1,800 GiB"):
        preflight.check_host_memory(preflight.host_bytes(offloaded, large), 1800 * 2**30)
    preflight.check_host_memory(preflight.host_bytes(offloaded, large), 2000 * 2**30)


def test_counts_are_those_of_the_models():
    from gptoss_kernels.finetune.model import count_parameters, load_config

    counts = [count_parameters(load_config(f"openai/gpt-oss-{size}", random=True)) for size in ("20b", "120b")]
    assert counts == [20_914_757_184, 116_829_156_672]


def test_the_large_models_file_is_that_of_the_small_one():
    files = [ROOT / "configs" / name for name in ("sft_full.yaml", "sft_full_120b.yaml")]
    small, large = (parse(["--config", str(file), "--report_to=none", "--use_cpu=true"]) for file in files)
    preflight.check_settings(large)
    assert large.run.num_processes == 8 and large.training.max_length == small.training.max_length
    assert large.training.learning_rate == small.training.learning_rate == 2e-5
