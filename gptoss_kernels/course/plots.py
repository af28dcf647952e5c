"""Matplotlib as the course uses it: colour-blind-safe, and readable in Jupyter's light and dark themes."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

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


def with_palette(png: bytes) -> bytes:
    """An opaque PNG with at most 256 colours, a third of its size for most plots; one that has a palette as it is."""
    image = Image.open(io.BytesIO(png))
    if image.mode == "P":
        return png
    file = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure as a PNG with a palette."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    path.write_bytes(with_palette(file.getvalue()))


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


def tile_schedule(
    ax: Axes,
    queries: int,
    keys: int,
    block_m: int,
    block_n: int,
    *,
    window: int | None = None,
    cu_seqlens: list[int] | None = None,
) -> dict[str, int]:
    """Draws which tiles of the score matrix a forward kernel skips, masks, or takes whole, and counts them.

    Args:
        ax: where to draw.
        queries, keys: lengths in tokens; the last query stands at the last key.
        block_m, block_n: queries and keys of a tile.
        window: keys that a query sees, its own included. None: all before it.
        cu_seqlens: (documents + 1,) ends of packed documents, 0 first. None: one document.

    Returns:
        {"skipped": …, "masked": …, "full": …}, in tiles.
    """
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)[None, :]
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(keys), torch.tensor(cu_seqlens[1:]), right=True)
        seen &= document[position] == document[key]
    names = ("skipped", "masked", "full")
    rows = [tile.split(block_n, dim=1) for tile in seen.split(block_m, dim=0)]
    kind = torch.tensor([[int(tile.any()) + int(tile.all()) for tile in row] for row in rows])
    colours = ListedColormap(["#FFFFFF", OKABE_ITO[1], OKABE_ITO[0]])
    ax.pcolormesh(kind.numpy(), cmap=colours, vmin=0, vmax=2, edgecolors="#999999", linewidth=0.5)
    for row, column in (kind == 1).nonzero().tolist():  # a pattern, so that no kind is told by its colour alone
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="///", edgecolor="#00000080", linewidth=0))
    ax.invert_yaxis()
    ax.set(xlabel=f"key tile ({block_n} keys)", ylabel=f"query tile ({block_m} queries)", aspect="equal")
    ax.grid(False)
    counts = {name: int((kind == value).sum()) for value, name in enumerate(names)}
    hatches = (None, "///", None)
    handles = [
        Patch(facecolor=colours(value), edgecolor="#666666", hatch=hatches[value], label=f"{name}: {counts[name]}")
        for value, name in enumerate(names)
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
    return counts


def roofline(ax: Axes, peak_tflops: float, bandwidth_gbs: float, points: dict[str, tuple[float, float]]) -> None:
    """Draws the roof of a machine and, under it, what programs reach.

    Args:
        ax: where to draw.
        peak_tflops: the machine's arithmetic limit, TFLOP/s.
        bandwidth_gbs: its memory bandwidth, GB/s.
        points: name -> (FLOPs per byte of memory traffic, TFLOP/s reached).
    """
    _roof(ax, peak_tflops, bandwidth_gbs, [intensity for intensity, _ in points.values()])
    markers = "osD^vPX*"
    for index, (name, (intensity, reached)) in enumerate(points.items()):
        marker, colour = markers[index % len(markers)], OKABE_ITO[index % 7]
        ax.plot(intensity, reached, marker, color=colour, markersize=8, markeredgecolor="black", label=name)
    ax.set(xlabel="FLOPs per byte", ylabel="TFLOP/s")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def attention_roofline(
    ax: Axes,
    peak_tflops: float,
    bandwidth_gbs: float,
    rows: Iterable[Mapping[str, str | int | float]],
    colours: Mapping[str, str],
) -> None:
    """Draws attention under the roof of a machine: a colour a contender, a marker a pass, a trail over the lengths.

    Args:
        ax: where to draw.
        peak_tflops: the machine's arithmetic limit, TFLOP/s.
        bandwidth_gbs: its memory bandwidth, GB/s.
        rows: each with contender, pass ("forward" or "backward"), layer (its label), tokens, intensity (FLOPs for
            each byte that has to cross the memory bus) and tflops (TFLOP/s reached).
        colours: contender, as the legend calls it -> its colour.
    """
    rows = sorted(rows, key=lambda row: row["tokens"])
    _roof(ax, peak_tflops, bandwidth_gbs, [row["intensity"] for row in rows])
    looks = {"forward": ("o", "-"), "backward": ("^", "--")}
    trails: dict[tuple, list] = {}
    for row in rows:
        trails.setdefault((row["contender"], row["pass"], row["layer"]), []).append((row["intensity"], row["tflops"]))
    for (name, part, _), points in trails.items():
        marker, line = looks[part]
        ax.plot(*zip(*points, strict=True), line, marker=marker, color=colours[name], markeredgecolor="black")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        left, right = (pick(row["intensity"] for row in own) for pick in (min, max))
        place = (left * right) ** 0.5, min(row["tflops"] for row in own)
        text = f"{layer}\n{own[0]['tokens']:,} to {own[-1]['tokens']:,} tokens"
        ax.annotate(text, place, (0, -10), textcoords="offset points", ha="center", va="top")
    ax.annotate(
        f"{peak_tflops:,.0f} TFLOP/s", (1, peak_tflops), (-4, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip
    slope = (ax.get_xlim()[0] * (peak_tflops * 1e3 / bandwidth_gbs) ** 3) ** 0.25  # three quarters up to the ridge
    ax.annotate(
        f"{bandwidth_gbs:,.0f} GB/s", (slope, slope * bandwidth_gbs / 1e3), (-8, 0), textcoords="offset points",
        ha="right", va="bottom",
    )  # fmt: skip
    ax.set(xlabel="FLOPs per byte that has to move", ylabel="TFLOP/s reached")
    ax.set_ylim(min(row["tflops"] for row in rows) / 2.5, peak_tflops * 1.5)
    ax.yaxis.set_major_formatter("{x:g}")
    passes = [Line2D([], [], marker=look[0], linestyle=look[1], color="black", label=p) for p, look in looks.items()]
    ax.legend(handles=passes, loc="lower right")
    names = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in colours.items()]
    ax.figure.legend(handles=names, loc="outside lower center", ncols=3)


def _roof(ax: Axes, peak_tflops: float, bandwidth_gbs: float, intensities: list[float]) -> None:
    # The ceiling of memory up to the ridge, that of arithmetic beyond it, wide enough for all intensities.
    ridge = peak_tflops * 1e3 / bandwidth_gbs
    left, right = min(ridge, *intensities) / 4, max(ridge, *intensities) * 4
    ax.plot([left, ridge, right], [left * bandwidth_gbs / 1e3, peak_tflops, peak_tflops], color="black", linestyle="-")
    ax.set(xscale="log", yscale="log", xlim=(left, right))


def computation_graph(
    ax: Axes, places: dict[str, tuple[float, float]], edges: Iterable[str], gradients: dict[str, tuple[str, str]]
) -> None:
    """Draws values flowing along solid arrows and their gradients flowing back along dashed ones.

    Args:
        ax: where to draw.
        places: name of a node -> (x, y), about one unit apart.
        edges: "from to", names of nodes.
        gradients: name of a node -> (side, formula of its gradient), side "left", "above" or "below".
    """
    for start, end in (edge.split() for edge in edges):
        for tail, head, look, up in ((start, end, "-", 0.05), (end, start, "--", -0.05)):
            (x0, y0), (x1, y1) = places[tail], places[head]
            arrow = dict(arrowstyle="->", linestyle=look, shrinkA=13, shrinkB=13)
            arrow["color"] = "black" if look == "-" else OKABE_ITO[3]
            ax.annotate("", (x1, y1 + up), (x0, y0 + up), arrowprops=arrow)
    for name, (x, y) in places.items():
        ax.text(x, y, name, ha="center", va="center", bbox=dict(boxstyle="circle", facecolor="white"))
    sides = {"left": (-0.3, 0, "right", "center"), "above": (0, 0.28, "center", "bottom")}
    sides["below"] = (0, -0.28, "center", "top")
    for name, (side, formula) in gradients.items():
        x, y, ha, va = sides[side]
        ax.text(places[name][0] + x, places[name][1] + y, formula, ha=ha, va=va, color=OKABE_ITO[3], fontsize=11)
    xs, ys = zip(*places.values(), strict=True)
    room = 2.4 if any(side == "left" for side, _ in gradients.values()) else 0.4
    ax.set(xlim=(min(xs) - room, max(xs) + 0.4), ylim=(min(ys) - 0.3, max(ys) + 0.6))
    ax.set_title("solid: values, dashed: gradients")
    ax.axis("off")


def tile_owner(ax: Axes, tiles: int, *, column: int | None = None, row: int | None = None) -> list[tuple[int, int]]:
    """Draws the tiles of a causal score matrix that one program of a backward kernel walks through, in its order.

    Args:
        ax: where to draw.
        tiles: of queries and of keys.
        column, row: the key tile or the query tile that the program owns; one of the two.

    Returns:
        The (query tile, key tile) of each step.
    """
    walk = [(r, column) for r in range(column, tiles)] if row is None else [(row, c) for c in range(row + 1)]
    for r in range(tiles):
        for c in range(tiles):
            own = (r, c) in walk
            colour = OKABE_ITO[5] if own else "#E6E6E6" if c <= r else "white"
            hatch = "///" if own else None
            ax.add_patch(Rectangle((c, r), 1, 1, facecolor=colour, edgecolor="#777777", hatch=hatch))
    for step, (r, c) in enumerate(walk):
        box = dict(facecolor="white", edgecolor="none", pad=1.5)
        ax.text(c + 0.5, r + 0.5, f"step {step}", ha="center", va="center", fontsize=8, bbox=box)
    ax.set(xlim=(0, tiles), ylim=(tiles, 0), aspect="equal", xlabel="key tile: K, V, dK, dV")
    ax.set_ylabel("query tile: Q, dO, dQ")
    ax.set_xticks([tile + 0.5 for tile in range(tiles)], range(tiles))
    ax.set_yticks([tile + 0.5 for tile in range(tiles)], range(tiles))
    ax.grid(False)
    return walk


HATCHES = ("", "//", "\\\\", "..", "xx", "--", "", "oo")  # so that no part is told by its colour alone


def stacked_bars(ax: Axes, bars: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Draws a horizontal bar for each thing, cut into the same parts, told apart by colour and hatch.

    Args:
        ax: where to draw.
        bars: label of a bar, the topmost first -> part -> its length.
        unit: what the lengths are, the axis's label.
    """
    colours = (*OKABE_ITO[:7], "#BBBBBB")
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for index, (part, length) in enumerate(parts.items()):
            ax.barh(
                place, length, left=left, color=colours[index % 8], hatch=HATCHES[index % 8], edgecolor="#444444",
                linewidth=0.5, label=None if place else part,
            )  # fmt: skip
            left += length
    ax.set_yticks(range(len(bars)), bars)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=unit)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def heat_map(ax: Axes, table: torch.Tensor, text: str, limit: float) -> None:
    """Draws a table as colours with the numbers in them.

    Args:
        ax: where to draw.
        table: (rows, columns).
        text: how a number is written, a format specification such as ".0%".
        limit: the number that gets the last colour; the first is zero's.
    """
    ax.imshow(table.numpy(), vmin=0, vmax=limit, aspect="auto")
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in table.shape)).tolist():
        value = table[row, column].item()
        colour = "black" if value > 0.6 * limit else "white"
        ax.text(column, row, format(value, text), ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(table.shape[1]))
    ax.set_yticks(range(table.shape[0]))
    ax.grid(False)


def stacked_areas(ax: Axes, x: list[float], parts: Mapping[str, list[float]]) -> None:
    """Draws parts of a sum above one another against x, told apart by colour and hatch.

    Args:
        ax: where to draw.
        x: the common abscissae.
        parts: name, the lowest first -> heights, as many as x.
    """
    colours = OKABE_ITO[: len(parts)]
    areas = ax.stackplot(x, *parts.values(), labels=parts, colors=colours, alpha=0.85, edgecolor="#444444")
    for area, hatch in zip(areas, HATCHES, strict=False):
        area.set_hatch(hatch)


def grouped_bars(ax: Axes, names: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    """Draws standing bars side by side: for each name one of each group.

    Args:
        ax: where to draw.
        names: along the x axis.
        groups: label -> a height for each name.
    """
    width = 0.8 / len(groups)
    for i, (label, heights) in enumerate(groups.items()):
        at = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(names))]
        look = dict(color=OKABE_ITO[i % 7], hatch=HATCHES[i % 8], edgecolor="white")
        ax.bar(at, heights, width=0.95 * width, label=label, **look)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.grid(visible=False, axis="x")
