"""Runs that train all weights on one device: every weight moves, clipping is refused where it cannot be, runs resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gptoss_kernels.finetune import train
from gptoss_kernels.finetune.config import parse
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.preflight import check_settings, gradient_bytes, memory_floor, optimizer_state_bytes

ROOT = Path(__file__).resolve().parents[2]
IN_BACKWARD = {"optim": "adamw_8bit_sr_in_backward", "max_grad_norm": 0, "optim_args": "min_size=4096"}


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy CPU two threads share the work differently from run to run, and the last bit of a sum with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log(folder) -> list[dict]:
    entries = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def losses(folder) -> list[tuple]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log(folder)]


def run(settings, folder, callbacks=(), **keys):
    train.run(settings(output_dir=str(folder), **(IN_BACKWARD | keys)), callbacks=callbacks)
    return load_file(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else None


def test_every_weight_is_trained(settings, tmp_path):
    before = run(settings, tmp_path / "before", max_steps=1, learning_rate=1e-12)
    after = run(settings, tmp_path / "after", max_steps=3, learning_rate=1e-2)
    assert set(before) == set(after)
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not still
    for part in ("sinks", "router.weight", "router.bias", "layernorm", "model.norm", "embed_tokens", "lm_head",
                 "gate_up_proj_bias", "down_proj"):  # fmt: skip
        assert any(part in name for name in after), part


@pytest.mark.parametrize("accumulation, checkpointing", [(1, "true"), (2, "false")])
def test_in_the_backward_pass_as_with_gradients_kept(settings, tmp_path, accumulation, checkpointing):
    """Also where a layer's forward pass is computed again between the steps of the layers above it."""
    keys = dict(gradient_accumulation_steps=accumulation, gradient_checkpointing=checkpointing)
    keys |= dict(gradient_checkpointing_kwargs='{"use_reentrant": false}', weight_decay=0.1, max_steps=3)
    early = run(settings, tmp_path / "early", **keys)
    kept = run(settings, tmp_path / "kept", optim="adamw_8bit_sr", **keys)
    assert all(torch.equal(early[name], kept[name]) for name in kept)
    for a, b in zip(losses(tmp_path / "early"), losses(tmp_path / "kept"), strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-4) and a[2] > 0


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_resumes_bitwise(settings, tmp_path, dtype):
    keys = dict(dtype=dtype, max_steps=7, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine")
    whole = run(settings, tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "cut", callbacks=(Interrupt(),), **keys)
    resumed = run(settings, tmp_path / "cut", resume_from_checkpoint="true", **keys)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm: adamw_8bit_sr_in_backward cannot clip by the norm of all gradients"),
        ({"fp16": "true"}, "optim: adamw_8bit_sr_in_backward trains bf16 or fp32 weights"),
        ({"dtype": "float16"}, "optim: adamw_8bit_sr_in_backward trains bf16 or fp32 weights"),
        ({"optim_args": "block=3"}, "optim_args: expected min_size=ELEMENTS and stochastic_rounding=true or false"),
        ({"optim_args": "min_size=few"}, "optim_args: .* got 'min_size=few'"),
    ],
)
def test_settings_that_cannot_work(settings, keys, said):
    arguments = settings(**(IN_BACKWARD | {key: value for key, value in keys.items() if key != "fp16"}))
    arguments.training.fp16 = "fp16" in keys  # Accelerate refuses it on a CPU before we can
    with pytest.raises(SetupError, match=said):
        check_settings(arguments)


def test_several_processes_are_refused(settings, monkeypatch):
    arguments = settings(**IN_BACKWARD)
    monkeypatch.setattr(type(arguments.training), "world_size", 2)
    with pytest.raises(SetupError, match="is for one process: .* averaged over 2; use adamw_8bit_sr"):
        check_settings(arguments)
    arguments.training.optim = "adamw_8bit_sr"
    check_settings(arguments)


def test_an_unknown_optimizer_is_an_error(settings, capsys):
    with pytest.raises(SystemExit):
        settings(optim="adamw_8bit_src")
    assert "adamw_8bit_src" in capsys.readouterr().err


def test_what_it_needs_is_counted(settings):
    count = 20_914_757_184
    sizes = {}
    for name, keys in {
        "early": IN_BACKWARD,
        "accumulated": IN_BACKWARD | {"gradient_accumulation_steps": 2},
        "kept": IN_BACKWARD | {"optim": "adamw_8bit_sr"},
    }.items():
        training = settings(**keys).training
        states, gradients = (f(training, torch.bfloat16) for f in (optimizer_state_bytes, gradient_bytes))
        sizes[name] = memory_floor(count, count, 2, states, gradient_bytes=gradients) / count
    assert sizes == {"early": 4, "accumulated": 6, "kept": 6}


def test_the_single_gpus_file_takes_effect():
    file = ROOT / "configs" / "sft_full_single.yaml"
    arguments = parse(["--config", str(file), "--report_to=none", "--use_cpu=true"])
    training = arguments.training
    assert training.optim == "adamw_8bit_sr_in_backward" and training.max_grad_norm == 0
    assert (training.gradient_accumulation_steps, training.max_length) == (1, 16384)
    assert arguments.run.num_processes == 1 and not arguments.model.use_peft and training.learning_rate == 2e-5
    check_settings(arguments)
