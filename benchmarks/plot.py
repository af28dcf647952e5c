"""Draws the newest GPU rows of benchmarks/results: attention.png, train_step.png, train_step_parts.png, sft_tiny.png.

python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import harness
from benchmarks.readme import ATTENTION, LABELS, TRAIN_STEP, VARIANTS
from gptoss_kernels.course import plots


def draw(rows: list[dict[str, str]]):
    """The figure: a panel a window, a curve a contender, for the GPU of the last row.

    Raises:
        ValueError: no row was taken on a GPU.
    """
    rows = [row for row in rows if not row["gpu"].startswith("none")]
    if not rows:
        raise ValueError("rows: expected at least one taken on a GPU, got none")
    gpu = rows[-1]["gpu"]
    newest = {(int(r["window"]), r["contender"], int(r["tokens"])): r for r in rows if r["gpu"] == gpu}
    windows = sorted({window for window, _, _ in newest})
    plots.style()
    figure, axes = plt.subplots(1, len(windows), figsize=(4.5 * len(windows), 4.0), squeeze=False)
    for ax, window in zip(axes[0], windows, strict=True):
        for (name, label), colour, marker in zip(LABELS.items(), plots.OKABE_ITO, "osD^vX", strict=False):
            points = sorted((t, float(r["total_ms"])) for (w, n, t), r in newest.items() if (w, n) == (window, name))
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="-", label=label)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward + backward, ms")
        ax.set_title(f"window {window}" if window else "full layer")
        ticks = sorted({tokens for w, _, tokens in newest if w == window})
        ax.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        ax.minorticks_off()
    curves = {line.get_label(): line for ax in figure.axes for line in ax.lines}
    figure.legend(curves.values(), curves.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{gpu}, {rows[-1]['date']}")
    return figure


def draw_train_step(rows: list[dict[str, str]]):
    """The figure: tokens a second and peak memory of a whole LoRA step against context, a curve a variant."""
    newest = {(r["variant"], int(r["tokens"])): r for r in rows if r["gpu"] == rows[-1]["gpu"]}
    plots.style()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    panels = (("tokens_per_second", "tokens a second"), ("peak_gib", "peak memory, GiB"))
    for ax, (column, label) in zip(axes, panels, strict=True):
        for (variant, name), colour, marker in zip(VARIANTS.items(), plots.OKABE_ITO, "osD^vX", strict=False):
            points = sorted((t, float(r[column])) for (v, t), r in newest.items() if v == variant)
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="-", label=name)
        ticks = sorted({tokens for _, tokens in newest})
        ax.set(xscale="log", xlabel="context, tokens", ylabel=label, ylim=(0, None))
        ax.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"LoRA on {rows[-1]['model']}, one {rows[-1]['gpu']}, {rows[-1]['date']}")
    return figure


def draw_parts(rows: list[dict[str, str]], tokens: int = 16384):
    """The figure: where the time of a step goes, a stacked bar a variant."""
    newest = {r["variant"]: r for r in rows if int(r["tokens"]) == tokens and r["gpu"] == rows[-1]["gpu"]}
    parts = {
        "attention_ms": "attention", "grouped_gemm_ms": "experts' products", "gemm_ms": "projections and LM head",
        "experts_ms": "experts, the rest", "norm_rope_ms": "norms and RoPE", "loss_ms": "loss",
        "other_ms": "other elementwise", "idle_ms": "GPU idle",
    }  # fmt: skip
    plots.style()
    shown = [variant for variant in reversed(VARIANTS) if variant in newest]
    figure, ax = plt.subplots(figsize=(9.5, 0.6 * len(shown) + 2.2))
    left = [0.0] * len(shown)
    colours = (*plots.OKABE_ITO[:7], "#FFFFFF")
    for (column, label), colour, hatch in zip(
        parts.items(), colours, ("", "//", "", "..", "", "xx", "", ""), strict=True
    ):
        widths = [float(newest[variant][column]) for variant in shown]
        ax.barh(range(len(shown)), widths, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5,
                label=label)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.set_yticks(range(len(shown)), [VARIANTS[variant] for variant in shown])
    ax.set(xlabel="ms a step")
    ax.grid(axis="y", visible=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"One LoRA step, {tokens:,} tokens, {rows[-1]['model']}, {rows[-1]['gpu']}, {rows[-1]['date']}")
    return figure


def draw_losses(folder: Path):
    """The figure: the losses of one finetuning run, a curve an attention, and how far they are apart."""
    losses = {}
    for path in sorted(folder.glob("*.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        losses[path.stem] = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    (first, a), (second, b) = losses.items()
    plots.style()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for (name, curve), style, width in zip(losses.items(), ("-", "--"), (4, 1.5), strict=True):
        axes[0].plot(curve.keys(), curve.values(), style, linewidth=width, label=name)
    axes[0].set(xlabel="optimizer step", ylabel="training loss (nats per token)", ylim=(0, None))
    axes[0].legend()
    axes[1].plot(a.keys(), [abs(a[step] - b[step]) / a[step] for step in a], "o-", markersize=3)
    axes[1].set(xlabel="optimizer step", ylabel=f"|{first} - {second}| / {first}", yscale="log")
    figure.suptitle("LoRA on data/tiny-gpt-oss, the same seed and data, fp32, one H100")
    return figure


def main() -> None:
    draw(harness.read_rows(ATTENTION)).savefig(ATTENTION.with_suffix(".png"), dpi=150)
    rows = [row for row in harness.read_rows(TRAIN_STEP) if row["training"] == "lora"]
    draw_train_step(rows).savefig(TRAIN_STEP.with_suffix(".png"), dpi=150)
    draw_losses(TRAIN_STEP.with_name("sft_tiny")).savefig(TRAIN_STEP.with_name("sft_tiny.png"), dpi=150)
    draw_parts(rows).savefig(TRAIN_STEP.with_name("train_step_parts.png"), dpi=150)


if __name__ == "__main__":
    main()
