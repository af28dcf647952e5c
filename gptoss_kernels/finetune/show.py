"""A look at what is trained: tokens coloured by loss weight and channel, statistics, and a histogram of lengths.

Rows are those of the training set (`packing.build`), whose documents are shown one by one, or a single
`harmony.Encoded`.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from .errors import SetupError
from .packing import CHANNELS, Report

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from .config import Arguments
    from .harmony import Encoded

    Row = Mapping | Encoded

# Okabe-Ito colours, told apart with any colour vision. "" is text outside of any channel that carries loss.
COLOURS = {"analysis": (0, 114, 178), "commentary": (204, 121, 167), "final": (230, 159, 0), "": (0, 158, 115)}
NO_CHANNEL = "text"
LOOKS_SPECIAL = re.compile(r"<\|\w+\|>")
WHITESPACE = {" ": " ", "\n": "↵\n", "\t": "⇥"}


@dataclass(frozen=True)
class Cell:
    """What is shown as one piece: a token, or the tokens that make up one character between them."""

    text: str
    ids: tuple[int, ...]
    position: int  # of the first token in its document
    weight: float
    channel: str
    special: bool


def documents(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[Cell]]:
    """A row's documents as text to show, with what the loss counts.

    Nothing predicts a document's first token, so its weight is 0 whatever the data say. Characters that would not be
    seen, or that could steer a terminal, are written as escapes such as \\x1b.

    Args:
        row: input_ids, loss_weights, channels (numbers, `packing.CHANNELS`) and seq_lengths; or a `harmony.Encoded`.
    """
    if isinstance(row, Mapping):
        weights, channels, lengths = row["loss_weights"], [CHANNELS[i] for i in row["channels"]], row["seq_lengths"]
        ids = row["input_ids"]
    else:
        ids, weights, channels, lengths = row.input_ids, row.weights, row.channels, [len(row.input_ids)]
    columns = [list(map(kind, column)) for kind, column in ((int, ids), (float, weights), (str, channels))]
    ends = np.cumsum(lengths).tolist()
    return [
        _cells(*(column[start:end] for column in columns), tokenizer)
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _cells(ids: list[int], weights: list[float], channels: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Cell]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    result, start = [], 0
    while start < len(ids):
        is_special, count = ids[start] in special, 1
        text = tokenizer.decode(ids[start : start + 1], clean_up_tokenization_spaces=False)
        if "\ufffd" in text and not is_special:
            # Part of a character's bytes. UTF-8 has at most four, so at most four tokens share one.
            for more in range(2, min(5, len(ids) - start + 1)):
                if ids[start + more - 1] in special:
                    break
                longer = tokenizer.decode(ids[start : start + more], clean_up_tokenization_spaces=False)
                if "\ufffd" not in longer:
                    text, count = longer, more
                    break
        weight = weights[start] if start else 0.0
        tokens = tuple(ids[start : start + count])
        result.append(Cell(_visible(text), tokens, start, weight, channels[start], is_special))
        start += count
    return result


def terminal(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, file: TextIO | None = None) -> None:
    """Prints rows, with a legend. The colour is the channel, and the stronger it is, the more the token weighs.

    Without colour, trained text stands in brackets that name channel and weight, and text that merely looks like a
    special token has a backslash before it. That is so where `file` is no terminal of 256 colours or more and where
    the environment variable NO_COLOR is set; FORCE_COLOR asks for colour in a pipe.

    Args:
        rows: of the training set, or `harmony.Encoded`s.
        file: standard output if None.
    """
    console = _console(file)
    shown = [documents(row, tokenizer) for row in rows]
    kinds = _kinds(shown)
    colour = console.color_system in ("256", "truecolor") and not console.no_color
    console.print(_legend(kinds, colour))
    for number, row in enumerate(shown, 1):
        tokens = sum(len(cell.ids) for document in row for cell in document)
        console.print(
            f"\n═══ row {number} of {len(shown)}: {_count(tokens, 'token')}, {_count(len(row), 'document')} ═══"
        )
        for place, document in enumerate(row, 1):
            if len(row) > 1:
                tokens = sum(len(cell.ids) for cell in document)
                console.print(f"─── document {place} of {len(row)}: {_count(tokens, 'token')} ───")
            console.print(_coloured(document, kinds) if colour else _bracketed(document))


def _console(file: TextIO | None = None) -> Console:
    # Jupyter is told no terminal: html() is for notebooks.
    return Console(file=file, force_jupyter=False, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _kinds(shown: Sequence[Sequence[Sequence[Cell]]]) -> dict[tuple[str, float], float]:
    """The (channel, weight) pairs that carry loss, in order, each with its strength: weight / greatest weight."""
    found = {(cell.channel, cell.weight) for row in shown for document in row for cell in document if cell.weight}
    greatest = max((weight for _, weight in found), default=1.0)
    order = list(COLOURS)
    return {kind: kind[1] / greatest for kind in sorted(found, key=lambda kind: (order.index(kind[0]), -kind[1]))}


def _name(channel: str, weight: float) -> str:
    return f"{channel or NO_CHANNEL} {weight:g}"


def _style(channel: str, strength: float) -> str:
    # Black on a tint of the colour can be read whatever the terminal's own background.
    tint = (round(255 + (part - 255) * (0.2 + 0.6 * strength)) for part in COLOURS[channel])
    return f"black on rgb({','.join(map(str, tint))})"


def _legend(kinds: dict[tuple[str, float], float], colour: bool) -> Text:
    legend = Text("loss: ")
    for (channel, weight), strength in kinds.items():
        name = _name(channel, weight)
        legend.append(f" {name} " if colour else f"⟦{name}│…⟧", _style(channel, strength) if colour else "")
        legend.append(" ")
    legend.append("(channel and weight)  " if kinds else "on nothing  ")
    legend.append("everything else: context, weight 0\n")
    if colour:
        legend.append("<|bold|>", "bold")
        legend.append(": a special token  ")
    else:
        legend.append("<|…|>: a special token, \\<|…|>: text that looks like one  ")
    return legend.append("↵ line feed  ⇥ tab")


def _coloured(document: Sequence[Cell], kinds: dict[tuple[str, float], float]) -> Text:
    text = Text()
    for kind, special, run in _runs(document):
        style = _style(kind[0], kinds[kind]) if kind else ""
        text.append(run, f"bold {style}" if special else style)
    return text


def _bracketed(document: Sequence[Cell]) -> Text:
    text, inside = "", None
    for kind, special, run in _runs(document):
        if kind != inside:
            text += ("⟧" if inside else "") + (f"⟦{_name(*kind)}│" if kind else "")
            inside = kind
        text += run if special else LOOKS_SPECIAL.sub(r"\\\g<0>", run)
    return Text(text + ("⟧" if inside else ""))


def _runs(document: Sequence[Cell]) -> Iterator[tuple[tuple[str, float] | None, bool, str]]:
    """Neighbours of one kind, put together: (channel and weight, None for context; whether special; text)."""
    run: tuple | None = None
    for cell in document:
        key = (cell.channel, cell.weight) if cell.weight else None, cell.special
        if run and run[:2] == key:
            run = (*key, run[2] + cell.text)
        else:
            if run:
                yield run
            run = (*key, cell.text)
    if run:
        yield run


def _visible(text: str) -> str:
    return "".join(
        WHITESPACE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in text
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


STYLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,monospace;"
    "border-left:3px solid #888;padding-left:.6em;margin:.4em 0"
)
OUTLINE = "outline:1px solid #888;margin:0 1px"


class Html:
    """Rows as HTML that stands on its own: a notebook shows it, `page()` is a whole file."""

    def __init__(self, body: str):
        self.body = body

    def _repr_html_(self) -> str:
        return self.body

    def page(self) -> str:
        """A document with the browser's own light or dark background."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="color-scheme" content="light dark"><title>What is trained</title></head>\n'
            f"<body>\n{self.body}\n</body></html>\n"
        )


def html(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, statistics: Statistics | None = None) -> Html:
    """Rows as HTML, coloured as in the terminal; pointing at a token shows id, weight, channel and position.

    The colours are translucent over the page's own background, so that both dark and light themes can be read.

    Args:
        rows: of the training set, or `harmony.Encoded`s.
        statistics: to put above them.
    """
    shown = [documents(row, tokenizer) for row in rows]
    kinds = _kinds(shown)
    legend = " ".join(
        f'<span style="{_background(channel, strength)};padding:0 .4em">{_name(channel, weight)}</span>'
        for (channel, weight), strength in kinds.items()
    )
    parts = [f"<pre>{escape(str(statistics))}</pre>"] if statistics else []
    parts.append(
        f"<p>loss: {legend or 'on nothing'} (channel and weight); everything else is context, weight 0. "
        f'<span style="{OUTLINE}">outlined</span>: a special token. ↵ line feed, ⇥ tab.</p>'
    )
    for number, row in enumerate(shown, 1):
        tokens = sum(len(cell.ids) for document in row for cell in document)
        parts.append(
            f"<p><b>row {number} of {len(shown)}: {_count(tokens, 'token')}, {_count(len(row), 'document')}</b></p>"
        )
        for place, document in enumerate(row, 1):
            if len(row) > 1:
                tokens = sum(len(cell.ids) for cell in document)
                parts.append(f"<small>document {place} of {len(row)}: {_count(tokens, 'token')}</small>")
            parts.append(f'<div style="{STYLE}">{"".join(_span(cell, kinds) for cell in document)}</div>')
    return Html("<div>\n" + "\n".join(parts) + "\n</div>")


def _background(channel: str, strength: float) -> str:
    red, green, blue = COLOURS[channel]
    return f"background:rgba({red},{green},{blue},{0.12 + 0.4 * strength:.3g})"


def _span(cell: Cell, kinds: dict[tuple[str, float], float]) -> str:
    styles = [_background(cell.channel, kinds[cell.channel, cell.weight])] if cell.weight else []
    if cell.special:
        styles.append(OUTLINE)
    style = f' style="{";".join(styles)}"' if styles else ""
    ids = " ".join(map(str, cell.ids))
    title = f"id {ids}, weight {cell.weight:g}, channel {cell.channel or 'none'}, position {cell.position}"
    return f'<span{style} title="{title}">{escape(cell.text)}</span>'


@dataclass(frozen=True)
class Statistics:
    """Counts of a training set; `str()` is a table."""

    report: Report  # conversations, examples, tokens, rows, lengths, and what was cut or left out
    trained: dict[str, int]  # tokens that carry loss, by channel; "" is text outside of any
    weight: dict[str, float]  # their weights, summed up

    @property
    def lengths(self) -> tuple[int, float, float, int]:
        """Tokens of an example before anything is cut: min, median, 95th percentile (interpolated), max."""
        lengths = self.report.lengths
        return min(lengths), float(np.median(lengths)), float(np.percentile(lengths, 95)), max(lengths)

    def __str__(self) -> str:
        report = self.report
        low, median, high, top = self.lengths
        left_out = report.untrained + report.cut_away
        cut = f"longer than {report.max_length:,} tokens; {report.tokens_cut:,} tokens cut" if report.max_length else ""
        lines = [
            ("conversations", report.conversations, f"{len(report.skipped):,} more skipped as bad rows"),
            ("examples", report.examples, f"{left_out:,} more left out, of which nothing would be trained"),
            ("truncated", report.truncated + report.cut_away, cut),
            ("rows", report.rows, f"packed, {report.fill:.1%} filled" if report.packed else "an example each"),
            ("tokens", report.tokens, f"an example: min {low:,}, median {median:,g}, 95% {high:,.0f}, max {top:,}"),
        ]
        trained, weight = sum(self.trained.values()), sum(self.weight.values())
        lines.append(("trained", trained, f"{_share(trained, report.tokens)} of the tokens"))
        for channel, count in self.trained.items():
            shares = _share(count, report.tokens), _share(self.weight[channel], weight)
            lines.append((f"  {channel or NO_CHANNEL}", count, f"{shares[0]} of the tokens, {shares[1]} of all weight"))
        return "\n".join(f"{name:<14}{number:>12,}  {note}".rstrip() for name, number, note in lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole if whole else 0:.1%}"


def statistics(dataset: Dataset, report: Report) -> Statistics:
    """Adds up a training set by channel.

    Args:
        dataset: from `packing.build`.
        report: on the same rows.
    """
    count, weight = np.zeros(len(CHANNELS), dtype=np.int64), np.zeros(len(CHANNELS))
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        values, channels = (table[name].combine_chunks().flatten().to_numpy() for name in ("loss_weights", "channels"))
        count += np.bincount(channels[values > 0], minlength=len(CHANNELS))
        weight += np.bincount(channels, weights=values, minlength=len(CHANNELS))
    present = [(channel, CHANNELS.index(channel)) for channel in COLOURS if count[CHANNELS.index(channel)]]
    return Statistics(
        report,
        trained={channel: int(count[number]) for channel, number in present},
        weight={channel: float(weight[number]) for channel, number in present},
    )


def length_histogram(lengths: Sequence[int], *, max_length: int | None = None) -> Figure:
    """How long the examples are, in tokens, and where they are cut.

    Both axes are logarithmic where that helps: lengths that differ by a factor of 20 or more, and bars likewise.

    Args:
        lengths: tokens of each whole example.
        max_length: where the vertical line goes.

    Raises:
        ValueError: there are no lengths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .report import HELD_OUT, TRAIN

    if not len(lengths):
        raise ValueError("lengths: expected at least one, got none")
    lengths = np.asarray(lengths)
    low, high = lengths.min(), lengths.max()
    logarithmic = high >= 20 * max(low, 1)
    # A bar is a whole number of tokens wide, so that none holds more lengths than its neighbours for that alone.
    if logarithmic:
        edges = np.unique(np.geomspace(max(low, 1), high + 1, 61).round())
    else:
        edges = np.arange(low, high + 2, max(1, -(-(high - low + 1) // 60)))
        edges = edges if edges[-1] > high else np.append(edges, edges[-1] + edges[1] - edges[0])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    counts, _, _ = axes.hist(lengths, bins=edges - 0.5, color=TRAIN)
    axes.set(xlabel="length of an example (tokens)", ylabel="examples (count)")
    if logarithmic:
        axes.set_xscale("log")
    if counts.max() >= 20 * counts[counts > 0].min():
        axes.set_yscale("log")
    if max_length is not None:
        longer = int((lengths > max_length).sum())
        label = f"max_length {max_length:,}: {_count(longer, 'example')} longer ({_share(longer, len(lengths))})"
        axes.axvline(max_length, color=HELD_OUT, linestyle="--", label=label)
        figure.legend(loc="outside upper right")
    axes.grid(alpha=0.3)
    return figure


COMMAND = "python -m gptoss_kernels.finetune.data show"


def main(argv: Sequence[str]) -> None:
    """Prints what a configuration trains on: the counts, and some rows. The model is not loaded.

    Args:
        argv: the command line after `show`.

    Raises:
        SystemExit: with a line on stderr, for settings and data that training would refuse too.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__.splitlines()[0], allow_abbrev=False)
    parser.epilog = "All settings of sft.py can be given too: --config FILE --max_length 4096 ..."
    parser.add_argument("--rows", type=_rows, default=3, metavar="N", help="rows to show, drawn by the seed; default 3")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the rows as a page, with tooltips")
    parser.add_argument("--histogram", type=Path, metavar="FILE", help="also write how long the examples are (.png, …)")
    options, rest = parser.parse_known_args(argv)
    # Transformers renamed gradient_checkpointing in 5.23 and warns about TRL's default.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    from .config import parse

    # Looking needs no GPU, and bf16 would ask for one.
    arguments = parse(["--use_cpu=true", *rest])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal lacks a character
    console = _console()
    try:
        _show(arguments, options, console)
    except (SetupError, OSError) as error:
        sys.exit(f"{COMMAND}: error: {error}")


def _show(arguments: Arguments, options: argparse.Namespace, console: Console) -> None:
    tokenizer, dataset, report = load(arguments, say=console.print)
    counts = statistics(dataset, report)
    console.print(str(counts))
    number = min(options.rows, len(dataset))
    seed = arguments.training.seed
    drawn = np.sort(np.random.default_rng(seed).choice(len(dataset), size=number, replace=False))
    rows = [dataset[int(i)] for i in drawn]
    if rows:
        numbers = ", ".join(f"{i + 1:,}" for i in drawn)
        console.print(f"\nrows {numbers} of {len(dataset):,}, drawn by seed {seed}")
        terminal(rows, tokenizer)
    if options.html:
        options.html.write_text(html(rows, tokenizer, statistics=counts).page(), encoding="utf-8")
        console.print(f"\nwritten: {options.html}")
    if options.histogram:
        figure = length_histogram(report.lengths, max_length=report.max_length)
        try:
            figure.savefig(options.histogram, dpi=150)
        except ValueError as error:
            raise SetupError(f"histogram: {error}") from error
        console.print(f"\nwritten: {options.histogram}")


def load(
    arguments: Arguments, *, say: Callable[[str], None] = print
) -> tuple[PreTrainedTokenizerBase, Dataset, Report]:
    """The tokenizer and the training set of a run, as training loads them, and what became of the data.

    Args:
        arguments: from `config.parse`.
        say: takes what there is to say about the choice of data.

    Raises:
        SetupError: the tokenizer or the data cannot be loaded, or a row is malformed.
    """
    from .data import load_splits, load_tokenizer, prepare
    from .train import use_shipped

    model, data, training = arguments.model, arguments.data, arguments.training
    if model.model_init == "random":
        use_shipped(arguments, say)
    tokenizer = load_tokenizer(
        model.tokenizer_name or model.model_name_or_path,
        conversation_date=data.conversation_date,
        revision="main" if model.tokenizer_name else model.model_revision,
    )
    held_out = training.eval_strategy != "no" or training.eval_on_start
    progress = not training.disable_tqdm
    split, _ = load_splits(data, held_out=held_out, seed=training.seed, progress=progress)
    dataset, report = prepare(split, tokenizer, arguments, packing=training.packing, progress=progress)
    return tokenizer, dataset, report


def _rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of rows, 0 or more, got {text!r}")
    return int(text)
