"""No unknown key and no wrong value gets through, and what the shipped configurations say takes effect."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler
from trl import get_peft_config

from gptoss_kernels.finetune.config import GROUPS, help_text, parse
from gptoss_kernels.finetune.harmony import Rendering

ROOT = Path(__file__).resolve().parents[2]
BASE = "output_dir: out\nbf16: false\n"


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def fails(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(argv)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, "one line"
    return message


@pytest.mark.parametrize(
    "line, said",
    [
        ("learning_rat: 1.0", "unknown key learning_rat; the nearest valid one is learning_rate"),
        ("learning_rte: 1.0", "the nearest valid one is learning_rate"),
        ("learning-rate: 1.0", "the nearest valid one is learning_rate"),
        ("torch_dtype: bfloat16", "unknown key torch_dtype: it is now dtype"),
        ("warmup_ratio: 0.03", "unknown key warmup_ratio: it is now warmup_steps"),
        ("learning_rate: fast", "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("max_length: true", "max_length: expected int, got True"),
        ("max_length: 1.5", "invalid int value: '1.5'"),
        ("packing: maybe", "--packing: Truthy value expected"),
        ("dtype: float8", "--dtype: invalid choice: 'float8'"),
        ("reasoning_effort: huge", "invalid choice: 'huge'"),
        ("model_init: scratch", "invalid choice: 'scratch'"),
        ("lr_scheduler_type: sine", "invalid choice: 'sine'"),
        ("eval_strategy: sometimes", "invalid choice: 'sometimes'"),
        ("dataset_name: [a, b]", "dataset_name: expected a single value, got ['a', 'b']"),
        ("num_train_epochs: {a: 1}", "num_train_epochs: expected a single value, got a mapping"),
        ("lora_target_modules: []", "lora_target_modules: expected a list of values, got []"),
        ("lora_targets: [attention, heads]", "invalid choice: 'heads'"),
        (
            "lora_targets: [attention]\nlora_target_modules: [q_proj]",
            "lora_targets: expected without lora_target_modules",
        ),
        ("lora_targets: [router]\nlora_dropout: 0.1", "lora_dropout: expected 0 with adapters on experts or router"),
        ("base_weights: nf4", "invalid choice: 'nf4'"),
        ("lr_scheduler_kwargs: 3", "lr_scheduler_kwargs: expected a mapping"),
        ("lr_scheduler_kwargs: '{min'", "lr_scheduler_kwargs: expected a JSON object, got '{min'"),
        ("seed: null", "seed: expected a value, got null"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("seed: [", "run.yaml"),
        ("load_in_8bit: true\nload_in_4bit: true", "8 bit and 4 bit"),
        ("channel_weights: 1.0", "channel_weights: expected a mapping"),
        ("channel_weights: {finale: 1.0}", "channel_weights: expected channels among analysis, commentary or final"),
        ("channel_weights: {final: -1}", "channel_weights['final']: expected a number of at least 0, got -1"),
        ("channel_weights: {final: .nan}", "channel_weights['final']: expected a number of at least 0, got nan"),
        ("channel_weights: {final: 0}", "channel_weights: expected a weight above 0"),
        ("train_turns: first", "invalid choice: 'first'"),
        ("end_token: <|end|>", "invalid choice: '<|end|>'"),
        ("bad_rows: ignore", "invalid choice: 'ignore'"),
        ("conversation_date: today", "conversation_date: expected year-month-day, got 'today'"),
    ],
)
def test_wrong_line_in_the_file(capsys, config_file, line, said):
    assert said in fails(capsys, ["--config", config_file(BASE + line + "\n")])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--learning_rat", "1"], "unknown key --learning_rat; the nearest valid one is --learning_rate"),
        (["--learning_rat=1"], "the nearest valid one is --learning_rate"),
        (["--max_len", "8"], "the nearest valid one is --max_length"),
        (["--conf", "x.yaml"], "the nearest valid one is --config"),
        (["--dtype", "float8"], "--dtype: invalid choice"),
        (["--max_length", "long"], "invalid int value: 'long'"),
        (["--output_dir"], "expected one argument"),
        (["--output_dir", "a", "b"], "unexpected 'b'"),
        (["--config", "no/such.yaml"], "config: cannot read no/such.yaml"),
        (["--lr_scheduler_kwargs", "{"], "lr_scheduler_kwargs: expected a JSON object"),
        (["--seed", "1"], "output_dir: expected a folder"),
    ],
)
def test_wrong_command_line(capsys, argv, said):
    assert said in fails(capsys, argv)


def test_file_is_not_a_mapping(capsys, config_file):
    assert "expected a mapping of keys to values, got list" in fails(capsys, ["--config", config_file("- 1\n")])


def test_both_forms_of_the_command_line_win_over_the_file(config_file):
    path = config_file(BASE + "learning_rate: 2e-4\nmax_length: 16\nlora_target_modules: [q_proj, v_proj]\n")
    for argv in (
        ["--config", path, "--learning_rate", "3e-4", "--max-length=32"],
        [f"--config={path}", "--learning_rate=3e-4", "--max-length", "32"],
    ):
        arguments = parse(argv)
        assert arguments.training.learning_rate == 3e-4
        assert arguments.training.max_length == 32
        assert arguments.model.lora_target_modules == ["q_proj", "v_proj"]
        assert arguments.on_command_line == {"config", "learning_rate", "max_length"}


def test_parts_that_get_adapters(config_file):
    path = config_file(BASE + "lora_targets: [experts, router]\nlora_dropout: 0.0\nuse_peft: true\n")
    adapters = get_peft_config(parse(["--config", path]).model)
    assert adapters.target_modules is None
    assert adapters.target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
    adapters = get_peft_config(parse(["--config", path, "--lora_targets", "attention"]).model)
    assert adapters.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} and adapters.target_parameters is None


def test_null_and_mappings_reach_their_keys(config_file):
    arguments = parse(["--config", config_file(BASE + "max_length: null\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n")])
    assert arguments.training.max_length is None
    assert arguments.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_how_conversations_are_rendered(config_file):
    lines = "channel_weights: {analysis: 0.5, final: 1}\ntrain_turns: last\nend_token: end\nreasoning_effort: low\n"
    path = config_file(BASE + lines + "conversation_date: 2024-01-31\n")
    rendering = parse(["--config", path]).data.rendering()
    assert rendering == Rendering({"analysis": 0.5, "final": 1}, "last", "end", "low", "2024-01-31")
    rendering = parse(["--config", path, "--channel_weights", '{"final": 2}']).data.rendering()
    assert rendering.channel_weights == {"final": 2}
    assert parse(["--config", config_file(BASE)]).data.rendering() == Rendering()


@pytest.mark.parametrize("name", ["sft_lora", "sft_full"])
def test_predecessors_settings_take_effect(name):
    arguments = parse(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--report_to", "none", "--use_cpu", "true"])
    model, training = arguments.model, arguments.training
    assert model.model_name_or_path == "openai/gpt-oss-20b"
    assert (model.dtype, model.attn_implementation, model.model_init) == ("bfloat16", "gptoss_triton", "pretrained")
    assert training.packing and training.packing_strategy == "bfd" and training.max_length == 8192
    assert training.bf16 and training.gradient_checkpointing
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.num_train_epochs == 1 and training.seed == 42 and training.max_grad_norm == 1.0
    assert training.router_aux_loss_coef == 0.0
    assert arguments.data.dataset_name == "HuggingFaceH4/Multilingual-Thinking"

    rate = 2e-4 if name == "sft_lora" else 2e-5
    assert training.learning_rate == rate
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    steps = 200
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        training.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates.index(max(rates)) == 6, "3% of 200 steps of warm-up"
    assert max(rates) == rate and rates[-1] == pytest.approx(rate / 10)

    adapters = get_peft_config(model)
    if name == "sft_lora":
        assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (8, 16, 0.0)
        assert adapters.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 4)
    else:
        assert adapters is None
        assert arguments.run.num_processes == 8
        assert training.per_device_train_batch_size == 1


def test_trackio_is_what_the_predecessors_runs_report_to():
    for name in ("sft_lora", "sft_full"):
        assert parse(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--use_cpu=true"]).training.report_to == [
            "trackio"
        ]


def launcher_environment(monkeypatch, name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes that it would start."""
    from accelerate.commands import launch

    launched = []
    monkeypatch.setattr(launch, "deepspeed_launcher", launched.append)
    monkeypatch.setattr(launch, "multi_gpu_launcher", launched.append)
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(ROOT / "configs" / name), "sft.py"])
    )
    (arguments,) = launched
    assert arguments.num_processes == 8
    if arguments.use_deepspeed:
        return launch.prepare_deepspeed_cmd_env(arguments)[1]
    return launch.prepare_multi_gpu_env(arguments)


def test_zero3_file_takes_effect(monkeypatch):
    pytest.importorskip("deepspeed")
    environment = launcher_environment(monkeypatch, "zero3.yaml")
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"] == "GptOssDecoderLayer"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert "ACCELERATE_GRADIENT_CLIPPING" not in environment  # the run's own max_grad_norm
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_file_takes_effect(monkeypatch):
    environment = launcher_environment(monkeypatch, "fsdp2.yaml")
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "GptOssDecoderLayer"
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert environment["FSDP_ACTIVATION_CHECKPOINTING"] == "false"  # gradient_checkpointing does that


def test_help_is_quick_and_names_real_keys():
    code = "import runpy, sys; sys.argv = ['sft.py', '--help']; runpy.run_path('sft.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    keys = set(re.findall(r"--(\w+)", result.stdout)) - {"config_file", "key", "help_all"}
    known = {field for group in GROUPS.values() for field in group.__dataclass_fields__} | {"config"}
    assert len(keys) > 10 and keys <= known
    assert len(result.stdout.splitlines()) < 50


def test_the_core_does_not_import_finetuning():
    code = (
        "import sys, gptoss_kernels; "
        "assert not {'gptoss_kernels.finetune', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_help_all_lists_every_key():
    text = help_text()
    for key in ("learning_rate", "model_init", "test_split_size", "lora_r", "overwrite"):
        assert f"\n  {key}: " in text
