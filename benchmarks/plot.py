"""Draws the newest rows of benchmarks/results: attention.png, attention_roofline.png, train_step.png, …

python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import attention_figures as figures
from benchmarks import harness
from benchmarks.readme import ATTENTION, LABELS, TRAIN_STEP, VARIANTS
from gptoss_kernels.course import plots

# TFLOP/s of dense bf16 matrix products and GB/s of memory, from NVIDIA's data sheet (it gives 1,979 TFLOP/s with
# sparsity, twice the dense rate): https://www.nvidia.com/en-us/data-center/h100/, column H100 SXM; and .../h200/.
CEILINGS = {"NVIDIA H100 80GB HBM3": (989, 3350), "NVIDIA H200": (989, 4800)}
COLOURS = dict(zip(LABELS, plots.OKABE_ITO, strict=False))
SHORT = LABELS | {"cudnn": "cuDNN, no sinks", "fla": "flash-linear-attn.", "eager": "Transformers\neager"}


def newest_attention(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The newest one-document rows of the GPU, dtype and head shape of which most cases have been measured; of two with
    as many, the later ones.

    Raises:
        ValueError: no row was taken on a GPU.
    """
    rows = [row for row in rows if not row["gpu"].startswith("none") and row["documents"] == "1"]
    if not rows:
        raise ValueError("rows: expected at least one taken on a GPU, got none")
    return max(figures.settings(rows).values(), key=lambda found: (len(found), max(row["date"] for row in found)))


def draw(rows: list[dict[str, str]]):
    """The figure: forward + backward time against length, a panel a window, a labelled curve a contender.

    Raises:
        ValueError: no row was taken on a GPU.
    """
    rows = newest_attention(rows)
    windows = sorted({int(row["window"]) for row in rows})
    plots.style()
    plt.rcParams["font.size"] = 13  # to be read where a phone shows the picture 5 cm high
    figure, axes = plt.subplots(1, len(windows), figsize=(4.4 * len(windows), 5.8), squeeze=False, sharey=True)
    for ax, window in zip(axes[0], windows, strict=True):
        ends = []
        for (name, label), marker in zip(SHORT.items(), "osD^vX", strict=True):
            points = sorted(
                (int(row["tokens"]), float(row["total_ms"]))
                for row in rows
                if (row["contender"], int(row["window"])) == (name, window)
            )
            if points:
                width = 3.5 if name == "ours" else 1.8
                look = {"color": COLOURS[name], "marker": marker, "linestyle": "-", "linewidth": width}
                ax.plot(*zip(*points, strict=True), **look)
                ends.append((*points[-1], label, COLOURS[name], name == "ours"))
        ax.set(xscale="log", yscale="log", xlabel="tokens")
        ax.set_title(f"window {window}" if window else "full layer")
        ticks = sorted({int(row["tokens"]) for row in rows})
        ax.set_xticks(ticks, [f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}" for tokens in ticks])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _label_ends(ax, ends, gap=1.4)
    axes[0][0].set_ylabel("forward + backward, ms")
    figure.suptitle(f"{rows[-1]['gpu']}, {rows[-1]['date']}")
    return figure


def _label_ends(ax, ends: list[tuple[float, float, str, str, bool]], gap: float) -> None:
    """Names curves at their ends (x, y, label, colour, bold), at least a factor `gap` apart where they end together."""
    last = max(x for x, *_ in ends)
    for x in sorted({x for x, *_ in ends}):
        group = sorted(end for end in ends if end[0] == x)
        places = [y for _, y, *_ in group]
        for index in range(1, len(places)):
            places[index] = max(places[index], places[index - 1] * gap)
        middle = (places[-1] * places[0] / group[-1][1] / group[0][1]) ** 0.5  # as far up as down
        for (_, y, label, colour, bold), place in zip(group, places, strict=True):
            how = dict(color="black", weight="bold" if bold else "normal", va="center", annotation_clip=False)
            ax.annotate(label, (x, y), (x * 1.3, place / middle), arrowprops=dict(arrowstyle="-", color=colour), **how)
    ax.set_xlim(right=last * 1.15)


def draw_roofline(rows: list[dict[str, str]]):
    """The figure: what full and windowed layers reach, beside the two ceilings of the GPU.

    Raises:
        ValueError: no row was taken on a GPU, or that GPU's ceilings are not known here.
    """
    rows = newest_attention(rows)
    gpu = rows[-1]["gpu"]
    if gpu not in CEILINGS:
        raise ValueError(f"rows: expected most of them to be of {', '.join(CEILINGS)}, got {gpu!r}")
    compared = ("ours", "flex", "fa4")
    points = [
        {
            "contender": LABELS[row["contender"]],
            "pass": part,
            "layer": f"window {row['window']}" if int(row["window"]) else "full layer",
            "tokens": int(row["tokens"]),
            "intensity": figures.intensity(row, part),
            "tflops": figures.tflops(row, part),
        }
        for part in ("forward", "backward")
        for row in rows
        if row["contender"] in compared
    ]
    plots.style()
    plt.rcParams["font.size"] = 13
    figure, ax = plt.subplots(figsize=(7.5, 6.0))
    colours = {LABELS[name]: COLOURS[name] for name in compared}
    plots.attention_roofline(ax, *CEILINGS[gpu], points, colours)
    ax.set_title(f"{gpu}, {rows[-1]['date']}")
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
    attention = harness.read_rows(ATTENTION)
    plots.save(draw(attention), ATTENTION.with_suffix(".png"))
    plots.save(draw_roofline(attention), ATTENTION.with_name("attention_roofline.png"))
    rows = [row for row in harness.read_rows(TRAIN_STEP) if row["training"] == "lora"]
    plots.save(draw_train_step(rows), TRAIN_STEP.with_suffix(".png"))
    plots.save(draw_losses(TRAIN_STEP.with_name("sft_tiny")), TRAIN_STEP.with_name("sft_tiny.png"))
    plots.save(draw_parts(rows), TRAIN_STEP.with_name("train_step_parts.png"))


if __name__ == "__main__":
    main()
