"""What benchmarks share: interleaved timing, peak memory, provenance, and rows in CSV files."""

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from gptoss_kernels.lane import version
from gptoss_kernels.provenance import provenance

__all__ = [
    "append_rows",
    "peak_extra_gib",
    "percentiles",
    "provenance",
    "read_rows",
    "table",
    "time_interleaved",
    "version",
]

# Cycles that the GPU idles before a timed call, some milliseconds: the CPU gets ahead and launch gaps are not timed.
HEAD_START = 5_000_000


def time_interleaved(
    calls: Mapping[str, Callable[[int], Any]], device: torch.device, *, rounds: int = 30, warmup: int = 3
) -> dict[str, list[float]]:
    """Times the calls in turn, round after round, so that clocks and heat drift for all of them alike.

    Args:
        calls: name -> call(n), n rising with every call of any of them: take inputs from set n % sets, so that no
            call finds in the cache what the one before it read.
        device: on CUDA, time between events on the current stream; otherwise wall time.
        rounds, warmup: timed rounds, and rounds before them.

    Returns:
        name -> milliseconds, one a round.
    """
    number = count()
    if device.type != "cuda":
        times = {name: [] for name in calls}
        for index in range(warmup + rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call(next(number))
                if index >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
        return times

    events = {name: [] for name in calls}
    for index in range(warmup + rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            call(next(number))
            end.record()
            if index >= warmup:
                events[name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of at least two values."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def peak_extra_gib(call: Callable[[], Any], device: torch.device) -> float | None:
    """The GiB that `call()` has allocated at its peak on top of what was allocated before; None off CUDA.

    Call it once before: compilation and workspaces that stay are not the call's own.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file, which is made with its header if it is not there; None becomes an empty field.

    Raises:
        ValueError: the file has other columns, or a row has not just these.
    """
    rows = [{key: "" if value is None else value for key, value in row.items()} for row in rows]
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"rows: expected the columns {sorted(columns)}, got {sorted(row)}")
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(columns):
            raise ValueError(f"{path}: expected the columns {list(columns)}, got {header}; choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, every value a string; an absent file has none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Aligned plain text: floats with three decimals, None as a dash."""

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [list(columns), *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
