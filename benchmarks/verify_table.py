"""What `python -m gptoss_kernels.verify` finds in this package's stack and in stock ones, as rows in a CSV file.

python -m benchmarks.verify_table                      all stacks, LoRA and all weights, a small model
python -m benchmarks.verify_table --stacks gptoss_kernels,eager --train full
python -m benchmarks.verify_table --model gpt-oss-20b  the real shapes, two layers
python -m benchmarks.verify_table --show               the table of the newest rows

A stock stack is what TRL and Transformers do by themselves, with packing: the router's auxiliary loss as the
checkpoint's configuration has it. One that cannot run here gets a row that says why.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import harness

STACKS = {  # attention, experts, stock
    "gptoss_kernels": ("gptoss_triton", "gptoss_triton", False),
    "gptoss_fa4": ("gptoss_fa4", "gptoss_triton", False),
    "eager": ("eager", "grouped_mm", True),
    "flex_attention": ("flex_attention", "grouped_mm", True),
    "flash_attention_4": ("flash_attention_4", "grouped_mm", True),
    "sonicmoe": ("eager", "sonicmoe", True),
}
COLUMNS = [
    "stack", "attention", "experts", "train", "model", "check", "status", "figure", "measured", "limit", "advice",
    "seconds", "gpu", "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SKIPPED = "skipped"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--stacks", default="gptoss_kernels,eager,flex_attention,flash_attention_4", help=f"of {', '.join(STACKS)}")
    add("--train", default="lora,full", help="of lora, full")
    add("--model", help="shapes; default: a small gpt-oss")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "verify.csv", help="rows go here")
    add("--show", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    for name, known in (("stacks", STACKS), ("train", ("lora", "full"))):
        values = getattr(options, name).split(",")
        if unknown := set(values) - set(known):
            parser.error(f"--{name}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
        setattr(options, name, values)
    return options


def rows_of(stack: str, trained: str, options: argparse.Namespace) -> list[dict]:
    """The rows of one stack; one row alone if it cannot run here."""
    from gptoss_kernels.finetune.errors import SetupError
    from gptoss_kernels.verify import verify
    from gptoss_kernels.verify.combination import settings

    attention, experts, stock = STACKS[stack]
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(folder, model=options.model, attention=attention, experts=experts, trained=trained)
        try:
            found = [vars(row) for row in verify(arguments, strict=False, stock=stock, say=print).rows]
        except SetupError as error:
            print(f"{stack}: {error}")
            found = [dict(check="", status=SKIPPED, figure=None, measured=str(error), limit="", advice="")]
    about = {"stack": stack, "attention": attention, "experts": experts, "train": trained}
    about |= {"model": options.model or "small", "seconds": round(time.perf_counter() - start, 1)}
    return [{**about, **row, **harness.provenance(device)} for row in found]


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, a check a line and a stack a column: rows of a GPU before those of a CPU, the newest of each check.

    Of LoRA and all weights a cell shows what FAILs, else what was judged.
    """
    if not rows:
        return "Nothing has been recorded yet: `python -m benchmarks.verify_table` appends its rows."
    last = ([row for row in rows if not row["gpu"].startswith("none")] or rows)[-1]
    rows = [row for row in rows if (row["gpu"], row["model"]) == (last["gpu"], last["model"])]
    newest = {(row["stack"], row["train"], row["check"]): row for row in rows}
    newest = {key: row for key, row in newest.items() if row["commit"] == last["commit"]}
    stacks = list(dict.fromkeys(stack for stack, _, _ in newest))
    columns = [stack for stack in stacks if any(name == stack and check for name, _, check in newest)]
    lines = ["| check | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for check in dict.fromkeys(check for _, _, check in newest if check):
        cells = [_cell([row for (name, _, what), row in newest.items() if (name, what) == (stack, check)])
                 for stack in columns]  # fmt: skip
        lines.append(f"| {check} | {' | '.join(cells)} |")
    for row in newest.values():
        if row["status"] == SKIPPED:
            reason = row["measured"].partition(". ")[0].removesuffix(".")
            lines.append(f"\nNot run here: {row['stack']} with {row['train']} ({reason}).")
    where = "a CPU" if last["gpu"].startswith("none") else last["gpu"]
    versions = ", ".join(f"{key} {last[key]}" for key in ("torch", "triton", "transformers"))
    lines.append(f"\nOn {where}, {last['model']} model, {last['date']}, commit {last['commit']}, {versions}.")
    return "\n".join(lines)


def _cell(rows: list[dict[str, str]]) -> str:
    order = ("FAIL", "PASS", "n.a.")
    row = min(rows, key=lambda row: order.index(row["status"]))
    if row["status"] == "n.a.":
        return f"n.a.: {row['advice'] or row['measured']}"
    status = "**FAIL**" if row["status"] == "FAIL" else "PASS"
    return f"{status}: {row['measured']}"


def main() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread the model over all
    options = parse()
    if not options.show:
        for stack in options.stacks:
            for trained in options.train:
                harness.append_rows(options.output, COLUMNS, rows_of(stack, trained, options))
                print(flush=True)
    print(table(harness.read_rows(options.output)))


if __name__ == "__main__":
    sys.exit(main())
