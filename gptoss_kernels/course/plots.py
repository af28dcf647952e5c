"""Matplotlib as the course uses it: colour-blind-safe, and readable in Jupyter's light and dark themes."""

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from matplotlib.axes import Axes

# Okabe and Ito's palette, black last: it serves for limits and ceilings.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def style() -> None:
    """Sets the course's defaults: an opaque light panel (so that a dark theme cannot swallow the text), the palette
    of Okabe and Ito, and a line style with each colour, so that no curve is told by its colour alone."""
    colours, lines = OKABE_ITO[:4], ("-", "--", "-.", ":")
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=colours) + cycler(linestyle=lines),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.figsize": (7.0, 3.2),
            "font.size": 10,
            "grid.alpha": 0.3,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "savefig.facecolor": "white",
        }
    )


def attention_map(ax: Axes, weights: torch.Tensor, sink_share: torch.Tensor | None = None) -> None:
    """Draws one head's attention weights, the sink's share as a column of its own left of key 0.

    Args:
        ax: where to draw.
        weights: (queries, keys), rows summing to at most 1; zero, a key that was not attended, stays blank.
        sink_share: (queries,) or None.
    """
    queries, keys = weights.shape
    shown = weights.detach().float().cpu()
    left = 0
    if sink_share is not None:
        left = 1 + max(1, keys // 16)  # the sink's column and a gap
        gap = torch.zeros(queries, left - 1)
        shown = torch.cat([sink_share.detach().float().cpu()[:, None], gap, shown], dim=1)
    image = ax.imshow(shown.masked_fill(shown == 0, float("nan")).numpy(), vmin=0, aspect="auto")
    step = max(1, keys // 8)
    ticks = list(range(0, keys, step))
    labels = [str(tick) for tick in ticks]
    ax.set_xticks(([0] if left else []) + [tick + left for tick in ticks], (["sink"] if left else []) + labels)
    ax.set(xlabel="key", ylabel="query")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="share of attention")
