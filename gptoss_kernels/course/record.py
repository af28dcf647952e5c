"""Measured figures in notebooks: taken on the spot on a GPU, read from the repository's records elsewhere."""

import ast
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..provenance import provenance
from .env import Environment

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "course"
ORIGIN = ("gpu", "torch", "triton", "transformers", "date", "commit")


def measured(name: str, here: Environment, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of `measure()`, taken now on a GPU; without one, those that the same call recorded on a GPU.

    Prints them as a table under a line that says which of the two they are, with GPU, versions, date and commit.
    GPTOSS_RECORD=1 measures whatever the machine is, and keeps the rows in benchmarks/results/course/<name>.csv.

    Args:
        name: chapter and subject, such as "02_softmax"; the file's name.
        here: what `env.setup` returned.
        measure: called without arguments; each row maps the same column names to a string, number or None. Put units
            into the names: "ms", "gib".

    Returns:
        The rows, with gpu, torch, triton, transformers, date and commit added.

    Raises:
        FileNotFoundError: no GPU here, and no record in this checkout.
        ValueError: `measure` returned no rows, or rows with different columns.
    """
    path = RESULTS / f"{name}.csv"
    record = os.environ.get("GPTOSS_RECORD") == "1"
    fresh = record or here.lane == "gpu"
    if fresh:
        origin = provenance(here.device)
        rows = [{**row, **origin} for row in measure()]
        if not rows or any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"measure: expected rows with the same columns, got {[list(row) for row in rows]}")
    else:
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: there is no GPU here to measure on and no record benchmarks/results/course/{path.name}; "
                "is the package installed from a clone of the repository (pip install -e)?"
            )
        rows = read(path)
    if record:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    first = rows[0]
    print(f"{'measured here' if fresh else 'recorded'} on {first['gpu']}, {first['date']}, torch {first['torch']}, "
          f"triton {first['triton']}, commit {first['commit']}")  # fmt: skip
    print(table([column for column in first if column not in ORIGIN], rows))
    return rows


def read(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a file of benchmarks/results, numbers as numbers, empty cells as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def results(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """Rows that the repository's benchmarks recorded, in benchmarks/results/<name>.csv, oldest first.

    Args:
        name: of the benchmark, such as "train_step".
        wanted: column -> value; only rows that have them.

    Raises:
        FileNotFoundError: there is no such file in this checkout.
        ValueError: no row has what is wanted.
    """
    rows = [
        row for row in read(RESULTS.parent / f"{name}.csv") if all(row[key] == value for key, value in wanted.items())
    ]
    if not rows:
        raise ValueError(f"wanted: expected what some row of {name}.csv has, got {wanted}")
    return rows


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned plain text: floats with three significant digits or more, None as a dash."""
    cells = [list(columns), *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _value(key: str, text: str) -> Any:
    if key in ORIGIN:
        return text
    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return text
