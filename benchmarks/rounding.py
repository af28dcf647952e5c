"""Does full finetuning with bf16 weights and 8-bit moments train as well as fp32? Held-out losses as rows, and a plot.

    python benchmarks/rounding.py            a quarter of an hour on one core of a CPU, minutes on a GPU
    python benchmarks/rounding.py --runs ""  the verdict and the plot of the rows that are there

data/tiny-gpt-oss, all weights, on data/reasoning, at a learning rate at which most updates are below the resolution of
bf16 weights:
  fp32     fp32 weights and torch's AdamW, three seeds or more (of the order of the data): the band to be in
  nearest  bf16 weights and torch's AdamW, which rounds them to nearest
  ours     bf16 weights and optim adamw_8bit_sr_in_backward, with moments in 8 bits from 4,096 elements on, so that
           they hold for as great a share of this small model as of gpt-oss-20b

nearest must leave the band, else being in it says nothing.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import harness

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "reasoning"
COLUMNS = [
    "variant", "seed", "step", "loss", "learning_rate", "tokens_a_step", "held_out_rows", "gpu", "torch", "triton",
    "transformers", "date", "commit",
]  # fmt: skip
NEAREST = {"dtype": "bfloat16", "optim": "adamw_torch"}
OURS = {
    "dtype": "bfloat16", "optim": "adamw_8bit_sr_in_backward", "optim_args": "min_size=4096", "max_grad_norm": "0"
}  # fmt: skip
VARIANTS = {"fp32": {"dtype": "float32", "optim": "adamw_torch"}, "nearest": NEAREST, "ours": OURS}
RUNS = "fp32:1,fp32:2,fp32:3,ours:1,nearest:1"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    results = Path(__file__).parent / "results" / "rounding.csv"
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=3e-5, help="the highest; cosine down to a tenth")
    parser.add_argument("--length", type=int, default=432, help="tokens a step")
    parser.add_argument("--rows", type=int, default=100, help="held-out problems")
    parser.add_argument("--runs", default=RUNS, help="variants and seeds")
    parser.add_argument("--output", type=Path, default=results, help="rows go here, the plot beside them")
    options = parser.parse_args(arguments)
    pairs = (run.split(":") for run in filter(None, options.runs.split(",")))
    options.runs = [(name, int(seed)) for name, seed in pairs]
    if unknown := {name for name, _ in options.runs} - set(VARIANTS):
        parser.error(f"--runs: expected {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return options


def settings(variant: str, seed: int, options: argparse.Namespace, folder: Path):
    from gptoss_kernels.finetune import config

    keys = {
        "config": ROOT / "configs" / "sft_tiny.yaml", "model_name_or_path": ROOT / "data" / "tiny-gpt-oss",
        "use_peft": "false", "dataset_name": folder, "output_dir": folder / f"{variant}-{seed}",
        "max_steps": options.steps, "learning_rate": options.learning_rate, "max_length": options.length,
        "gradient_accumulation_steps": 1, "max_grad_norm": 0, "seed": seed, "logging_steps": options.steps,
        "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "steps",
        "save_steps": max(1, options.steps // 10), "save_only_model": "true", "sample_tokens": 1,
        "disable_tqdm": "true",
    } | VARIANTS[variant]  # fmt: skip
    return config.parse([f"--{key}={value}" for key, value in keys.items()])


def train(variant: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[int, float]:
    """Held-out losses of one run, step -> nats a token; computed in fp32, whatever the weights are."""
    from gptoss_kernels.finetune import train as finetune
    from gptoss_kernels.finetune.data import Split, load_tokenizer, prepare

    arguments = settings(variant, seed, options, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        finetune.run(arguments)
    tokenizer = load_tokenizer(str(ROOT / "data" / "tiny-gpt-oss"), conversation_date=arguments.data.conversation_date)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out, _ = prepare(Split("test", rows, [""] * len(rows)), tokenizer, arguments, packing=True)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.model_name_or_path, dtype=torch.float32, attn_implementation="gptoss_triton",
        experts_implementation="gptoss_triton",
    )  # fmt: skip
    trainer = finetune.Trainer(
        model=model, args=arguments.training, train_dataset=held_out, eval_dataset=held_out, processing_class=tokenizer
    )
    places = {int(path.name.rpartition("-")[2]): path for path in Path(arguments.training.output_dir).glob("check*")}
    losses = {0: trainer.evaluate()["eval_loss"]}
    for step, path in sorted(places.items()):
        model.load_state_dict(load_file(path / "model.safetensors", device=str(model.device)))
        losses[step] = trainer.evaluate()["eval_loss"]
    return losses


def some_rows(folder: Path, count: int) -> None:
    """The train split, and some of the held-out problems."""
    (folder / "train.jsonl").write_bytes((DATA / "train.jsonl").read_bytes())
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(random.Random(0).sample(lines, count)), encoding="utf-8")


def read(options: argparse.Namespace) -> dict[tuple[str, int], dict[int, float]]:
    """The newest losses of each variant and seed, of the GPU and the settings of the last row."""
    rows = harness.read_rows(options.output)
    same = ("gpu", "learning_rate", "tokens_a_step", "held_out_rows")
    losses = {}
    for row in rows:
        if all(row[key] == rows[-1][key] for key in same):
            losses.setdefault((row["variant"], int(row["seed"])), {})[int(row["step"])] = float(row["loss"])
    return dict(sorted(losses.items()))


def verdict(losses: dict[tuple[str, int], dict[int, float]]) -> str:
    """How far each run of bf16 weights is from the band of the fp32 seeds, at the end and over the second half."""
    band = [curve for (name, _), curve in losses.items() if name == "fp32"]
    lines = []
    last = max(band[0])
    low, high = (f(curve[last] for curve in band) for f in (min, max))
    lines.append(f"fp32, {len(band)} seeds, at step {last}: {low:.4f} to {high:.4f}")
    late = [step for step in band[0] if step > last // 2]
    width = statistics.mean(max(c[s] for c in band) - min(c[s] for c in band) for s in late)
    middle = {s: statistics.mean(c[s] for c in band) for s in late}
    for (name, seed), curve in losses.items():
        if name == "fp32":
            continue
        outside = max(curve[last] - high, low - curve[last])
        where = "inside the band" if outside <= 0 else f"outside by {outside:.4f}, {outside / (high - low):.1f} widths"
        distance = statistics.mean(curve[s] - middle[s] for s in late)
        lines.append(
            f"{name}, seed {seed}: {curve[last]:.4f}, {where}; over the second half {distance:+.4f} from the middle of "
            f"a band {width:.4f} wide"
        )
    return "\n".join(lines)


def draw(losses: dict[tuple[str, int], dict[int, float]], title: str):
    """The figure: the band of fp32 and a curve for each other run, and how far they are from the middle of the band."""
    import matplotlib.pyplot as plt

    from gptoss_kernels.course import plots

    plots.style()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.0))
    band = [curve for (name, _), curve in losses.items() if name == "fp32"]
    steps = sorted(band[0])
    labels = {"ours": "bf16, rounded stochastically, 8-bit moments", "nearest": "bf16, rounded to nearest"}
    for ax, names in zip(axes, (("ours", "nearest"), ("ours",)), strict=True):
        middle = {step: 0.0 if ax is axes[0] else statistics.mean(curve[step] for curve in band) for step in steps}
        low, high = ([f(curve[step] for curve in band) - middle[step] for step in steps] for f in (min, max))
        ax.fill_between(steps, low, high, color=plots.OKABE_ITO[0], alpha=0.35, label=f"fp32, {len(band)} seeds")
        for name, colour, style in zip(names, plots.OKABE_ITO[1:], ("-", "--"), strict=False):
            for number, curve in enumerate(curve for (other, _), curve in losses.items() if other == name):
                label = None if number else labels[name]
                ax.plot(steps, [curve[s] - middle[s] for s in steps], style, color=colour, label=label)
        ax.set_xlabel("optimizer step")
    axes[0].set_ylabel("held-out loss (nats per token)")
    axes[1].set_ylabel("difference from the mean of fp32")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # small tensors wait for threads longer than they compute
    origin = harness.provenance(device)
    with tempfile.TemporaryDirectory() as folder:
        some_rows(Path(folder), options.rows)
        for variant, seed in options.runs:
            curve = train(variant, seed, options, Path(folder))
            print(f"{variant}, seed {seed}: " + " ".join(f"{loss:.4f}" for loss in curve.values()), flush=True)
            rows = [
                {
                    "variant": variant, "seed": seed, "step": step, "loss": round(loss, 6),
                    "learning_rate": options.learning_rate, "tokens_a_step": options.length,
                    "held_out_rows": options.rows, **origin,
                }
                for step, loss in curve.items()
            ]  # fmt: skip
            harness.append_rows(options.output, COLUMNS, rows)
    losses = read(options)
    if sum(name == "fp32" for name, _ in losses) > 1:
        print(verdict(losses))
        rate = harness.read_rows(options.output)[-1]["learning_rate"]
        from gptoss_kernels.course import plots

        figure = draw(losses, f"data/tiny-gpt-oss, all weights, learning rate {float(rate):g}")
        plots.save(figure, options.output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
