"""Speed and peak memory of `sft.py` itself: LoRA on random weights of gpt-oss-20b's shapes, as a row of a CSV file.

    python benchmarks/finetune.py [--key value ...]     any key of sft.py; the defaults are below
    python benchmarks/finetune.py --documents full      one document of the full length a step, as in train_step.py

One step is 8,192 packed tokens. Tokens are real ones, speed is the median over the steps after the first, and peak
memory is the allocator's. The last step is profiled, to count the launches of this package's kernels.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks import harness
from gptoss_kernels.finetune import config, train

ROOT = Path(__file__).parents[1]
DEFAULTS = {
    "config": str(ROOT / "configs" / "sft_lora.yaml"),
    "model_init": "random",
    "max_steps": "20",
    "per_device_train_batch_size": "1",
    "gradient_accumulation_steps": "1",
    "save_strategy": "no",
    "report_to": "none",
}
COLUMNS = (
    *(
        "model",
        "training",
        "documents",
        "max_length",
        "sequences",
        "steps",
        "tokens_per_second",
        "peak_gib",
        "attention",
    ),
    *(
        "forward_launches",
        "backward_launches",
        "trl",
        "peft",
        "gpu",
        "torch",
        "triton",
        "transformers",
        "date",
        "commit",
    ),
)
KERNELS = {
    "forward_launches": ("forward_kernel", "forward_hopper_kernel"),
    "backward_launches": ("dkdv_kernel", "dq_kernel", "dkdv_hopper_kernel", "dq_hopper_kernel"),
}


class Launches(TrainerCallback):
    """Profiles the last step and counts launches by kernel name."""

    def __init__(self):
        self.counts: dict[str, int] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            torch.cuda.synchronize()
            self._profile.stop()
            self.counts = {event.key: event.count for event in self._profile.key_averages()}


def command_line(argv: list[str]) -> list[str]:
    """argv, and the defaults for keys that it does not name."""
    named = {token.removeprefix("--").partition("=")[0] for token in argv if token.startswith("--")}
    return [*(f"--{key}={value}" for key, value in DEFAULTS.items() if key not in named), *argv]


def write_full_documents(path: Path, length: int, count: int = 40) -> None:
    """Texts of random digits, each a token of the shipped tokenizer, that fill a row of `length` tokens each."""
    draw = random.Random(0)
    rows = ({"text": "".join(draw.choices("0123456789", k=length))} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str]) -> None:
    full = "--documents" in argv
    if full:
        at = argv.index("--documents")
        if argv[at + 1 : at + 2] != ["full"]:
            sys.exit(f"benchmarks/finetune.py: --documents: expected full, got {argv[at + 1 : at + 2]}")
        argv = argv[:at] + argv[at + 2 :]
    if not torch.cuda.is_available():
        sys.exit("benchmarks/finetune.py: expected a CUDA GPU, got none")
    launches = Launches()
    with tempfile.TemporaryDirectory() as folder:
        line = command_line(argv)
        if not any(token.startswith("--output_dir") for token in line):
            line.append(f"--output_dir={folder}")
        if full:
            path = Path(folder) / "documents.jsonl"
            write_full_documents(path, config.parse(line).training.max_length)
            line.append(f"--dataset_name={path}")
        arguments = config.parse(line)
        result = train.run(arguments, callbacks=(launches,), save=False)
    training, model = arguments.training, arguments.model
    row = {
        "model": model.model_name_or_path,
        "training": (f"LoRA r={model.lora_r}" if model.use_peft else "full")
        + ", MXFP4" * (model.base_weights == "mxfp4")
        + ", offloaded" * training.activation_offloading
        + f", {training.optim_args}" * bool(training.optim_args),
        "documents": "full length" if full else "shipped",
        "max_length": training.max_length,
        "sequences": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "steps": training.max_steps,
        "tokens_per_second": round(result.tokens_per_second),
        "peak_gib": round(result.peak_memory / 2**30, 2),
        "attention": model.attn_implementation,
        **{column: sum(launches.counts.get(name, 0) for name in names) for column, names in KERNELS.items()},
        "trl": harness.version("trl"),
        "peft": harness.version("peft"),
        **harness.provenance(training.device),
    }
    path = ROOT / "benchmarks" / "results" / "finetune.csv"
    harness.append_rows(path, COLUMNS, [row])
    print(harness.table(COLUMNS[:10], [row]))
    print(f"1 row appended to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
