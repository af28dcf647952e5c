"""Draws the newest GPU rows of benchmarks/results/attention.csv: total time over length, full and windowed layers.

python -m benchmarks.plot [rows.csv] [figure.png]
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import harness
from benchmarks.readme import ATTENTION, LABELS
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


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ATTENTION
    draw(harness.read_rows(source)).savefig(sys.argv[2] if len(sys.argv) > 2 else source.with_suffix(".png"), dpi=150)
