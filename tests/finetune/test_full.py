"""Runs that train all weights on one device: every weight moves, what cannot be is refused, runs resume bitwise."""

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gptoss_kernels.finetune import saving, train
from gptoss_kernels.finetune.config import parse
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.preflight import (
    check_settings,
    gradient_bytes,
    host_bytes,
    memory_floor,
    optimizer_state_bytes,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

sys.path.insert(0, str(Path(__file__).parent))
import kill_and_resume

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
        ({"optim_args": "block=3"}, "optim_args: expected min_size=ELEMENTS, stochastic_rounding=true or false, or on"),
        ({"optim_args": "on_host=2"}, "optim_args: on_host is a share from 0 to 1, .* got 2.0"),
        ({"optim_args": "on_host=1", "optim": "adamw_8bit_sr"}, "above 0 with optim adamw_8bit_sr_in_backward, got 1"),
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
        "on the host": IN_BACKWARD | {"optim_args": "on_host=0.5"},
    }.items():
        training = settings(**keys).training
        states, gradients = (f(training, torch.bfloat16) for f in (optimizer_state_bytes, gradient_bytes))
        sizes[name] = memory_floor(count, count, 2, states, gradient_bytes=gradients) / count
    assert sizes == {"early": 4, "accumulated": 6, "kept": 6, "on the host": 3}
    assert host_bytes(training, count) == count


def test_the_single_gpus_file_takes_effect():
    file = ROOT / "configs" / "sft_full_single.yaml"
    arguments = parse(["--config", str(file), "--report_to=none", "--use_cpu=true"])
    training = arguments.training
    assert training.optim == "adamw_8bit_sr_in_backward" and training.max_grad_norm == 0
    assert (training.gradient_accumulation_steps, training.max_length) == (1, 16384)
    assert arguments.run.num_processes == 1 and not arguments.model.use_peft and training.learning_rate == 2e-5
    check_settings(arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_in_a_step_or_a_save_a_run_resumes(shapes, dataset, tmp_path):
    """kill_and_resume.py does it at twenty random moments of a larger model."""
    keys = kill_and_resume.KEYS | {"model_name_or_path": shapes, "model_init": "random", "dataset_name": dataset}
    keys |= {"max_length": 384, "use_cpu": "true", "max_steps": 6}
    runs = kill_and_resume.Runs(keys, tmp_path)
    draw = random.Random(1)
    for number, in_save in enumerate((True, False)):
        for attempt in range(5):  # it may have ended before its moment came
            outcome = runs.kill(f"run{number}_{attempt}", in_save, draw)
            if outcome["killed"]:
                break
        assert outcome["killed"] and outcome["same_losses"] and outcome["same_weights"], outcome


def test_resumed_after_its_last_step_a_run_takes_none(settings, tmp_path):
    keys = dict(max_steps=2, save_strategy="steps", save_steps=2)
    whole = run(settings, tmp_path / "run", **keys)
    (tmp_path / "run" / "model.safetensors").unlink()
    again = run(settings, tmp_path / "run", resume_from_checkpoint="true", **keys)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]


class Full(TrainerCallback):
    """After a save, files can be no larger than so many bytes."""

    def __init__(self, limit: int):
        self.limit = limit

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@pytest.mark.skipif(resource is None, reason="needs limits of resources")
@pytest.mark.parametrize("limit", [200_000, 3_000])  # what does not fit is the model; the trainer's own files too
def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before(settings, tmp_path, limit):
    keys = dict(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)

    def child():
        try:
            run(settings, tmp_path / "run", callbacks=(Full(limit),), **keys)
        except SetupError as error:
            (tmp_path / "said").write_text(str(error))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"output_dir: cannot save checkpoint-4 to {tmp_path / 'run'} ("), said
    assert "File too large" in said and said.endswith("what was saved before is as it was")
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["checkpoint-2"]
    run(settings, tmp_path / "run", resume_from_checkpoint="true", **keys)
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_save_replaces_in_one_step(tmp_path):
    for name, text in (("new", "2"), ("old", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    saving.rename_folder(tmp_path / "new", tmp_path / "old")
    assert [(p.name, (p / "file").read_text()) for p in tmp_path.iterdir()] == [("old", "2")]
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "file").write_text("3")
    saving.rename_files(tmp_path / "more", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "2" and (tmp_path / "old" / "deep" / "file").read_text() == "3"


def test_checkpoints_are_kept_as_asked_for_and_the_best_is_known(settings, tmp_path):
    keys = dict(max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    keys |= dict(save_total_limit=2, metric_for_best_model="eval_loss", load_best_model_at_end="true")
    run(settings, tmp_path / "run", learning_rate=1e-2, **keys)
    kept = sorted(p.name for p in (tmp_path / "run").glob("*") if p.is_dir())
    assert kept == ["checkpoint-3", "checkpoint-4"]
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / f"checkpoint-{state['best_global_step']}")


def test_the_log_says_how_the_run_goes(settings, tmp_path):
    run(settings, tmp_path / "run", max_steps=5, logging_steps=2, save_strategy="steps", save_steps=2)
    entries = log(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0 and 0.05 < entry["memory_gib"] < 64
        # Four experts, two a token: the fullest has between half and all of the tokens.
        assert 1 <= entry["expert_load"] <= entry["expert_load_worst"] <= 2
    assert entries[0]["seconds_left"] >= entries[1]["seconds_left"] >= 0
    assert "mfu" not in entries[0]  # of a CPU


def test_expert_load_is_counted_in_training_alone():
    from gptoss_kernels.finetune.report import ExpertLoad
    from gptoss_kernels.testing import random_gpt_oss

    model = random_gpt_oss(num_hidden_layers=2)
    load = ExpertLoad(model)
    ids = torch.randint(0, model.config.vocab_size, (1, 30))
    model.eval()(input_ids=ids, use_cache=False)
    assert load.take() == {}
    seen = []
    router = model.model.layers[1].mlp.router
    router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    model.train()(input_ids=ids, use_cache=False)
    count = torch.bincount(seen[0].flatten(), minlength=model.config.num_local_experts)
    assert torch.equal(load.counts[1], count) and count.sum() == 30 * model.config.num_experts_per_tok
    worst = (load.counts.amax(1) / load.counts.double().mean(1)).max().item()
    assert load.take()["expert_load_worst"] == pytest.approx(worst, abs=1e-3)
    assert load.take() == {}


def test_flops_are_those_of_the_weights_that_a_token_meets():
    from gptoss_kernels.finetune.report import flops_per_token, peak_flops
    from gptoss_kernels.testing import random_gpt_oss

    model = random_gpt_oss(num_hidden_layers=2)
    c = model.config
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * width + 2 * kv + c.num_local_experts)
    layer += c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    weights = 2 * layer + c.vocab_size * c.hidden_size
    assert flops_per_token(model) == pytest.approx(6 * weights)
    model.requires_grad_(False)
    assert flops_per_token(model) == pytest.approx(4 * weights)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("an unknown GPU") is None
