"""The finetuning benchmark's settings; its run needs a GPU."""

from benchmarks.finetune import DEFAULTS, command_line
from gptoss_kernels.finetune.config import parse


def test_a_key_that_is_given_replaces_its_default():
    line = command_line(["--max_steps", "3", "--max_length=64"])
    assert "--max_steps=20" not in line and line[-3:] == ["--max_steps", "3", "--max_length=64"]
    assert len(line) == len(DEFAULTS) - 1 + 3


def test_defaults_are_settings_of_sft():
    arguments = parse(command_line(["--output_dir", "unused", "--bf16", "false"]))
    assert arguments.training.max_length == 8192 and arguments.training.max_steps == 20
    assert arguments.training.packing and arguments.model.use_peft
    assert arguments.model.model_init == "random" and arguments.training.report_to == []
