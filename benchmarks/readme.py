"""Writes the README's result tables from the rows in benchmarks/results/, between their markers.

python -m benchmarks.readme
"""

from pathlib import Path

from benchmarks import harness

ROOT = Path(__file__).parent.parent
ATTENTION = ROOT / "benchmarks" / "results" / "attention.csv"
EXPERTS = ROOT / "benchmarks" / "results" / "experts.csv"
FINETUNE = ROOT / "benchmarks" / "results" / "finetune.csv"
TRAIN_STEP = ROOT / "benchmarks" / "results" / "train_step.csv"
LABELS = {
    "ours": "gptoss_kernels",
    "flex": "FlexAttention",
    "cudnn": "cuDNN (no sinks)",
    "fa4": "FlashAttention-4",
    "fla": "flash-linear-attention",
    "eager": "Transformers eager",
}
VARIANTS = {
    "ours:auto": "gptoss_kernels, as fast as memory allows",
    "ours:fast": "gptoss_kernels, fast",
    "ours:lean": "gptoss_kernels, lean",
    "flash_attention_4": "FlashAttention-4, grouped_mm, Liger's loss",
    "flex": "FlexAttention, grouped_mm, Liger's loss",
    "eager": "eager attention, grouped_mm, full logits",
}


def attention_tables(rows: list[dict[str, str]]) -> str:
    """Markdown: one table a GPU, dtype and head shape, from the newest row of each contender, length and window.

    Rows taken on a CPU are left out.
    """
    newest = {}
    setting = ("gpu", "dtype", "heads", "kv_heads", "head_dim")
    for row in rows:  # in the order of measurement: later rows replace earlier ones
        if not row["gpu"].startswith("none"):
            place = int(row["window"]), int(row["tokens"]), row["contender"]
            newest.setdefault(tuple(row[key] for key in setting), {})[place] = row
    if not newest:
        return "No measurement has been recorded yet: `python benchmarks/attention.py` on a GPU appends its rows."

    tables = []
    for (gpu, dtype, heads, kv_heads, head_dim), cells in newest.items():
        contenders = [name for name in LABELS if any(place[2] == name for place in cells)]
        lines = [f"| tokens | layer | {' | '.join(LABELS[name] for name in contenders)} |"]
        lines.append("|---" * (2 + len(contenders)) + "|")
        for window, tokens in sorted({place[:2] for place in cells}):
            texts = [_cell(cells.get((window, tokens, name))) for name in contenders]
            layer = f"window {window}" if window else "full"
            lines.append(f"| {tokens:,} | {layer} | {' | '.join(texts)} |")
        used = list(cells.values())
        versions = [f"{key} {_distinct(used, key)}" for key in ("torch", "triton", "transformers")]
        versions += sorted({row["package"] for row in used if row["contender"] in ("fa4", "fla")})
        head = (
            f"{gpu}, {dtype}, {heads} query and {kv_heads} key/value heads of {head_dim}, batch 1. Milliseconds "
            "forward / backward, and peak extra memory of the two together, in GiB."
        )
        foot = f"Measured {_distinct(used, 'date')} at commit {_distinct(used, 'commit')} with {', '.join(versions)}."
        tables.append("\n\n".join((head, "\n".join(lines), foot)))
    return "\n\n".join(tables)


def finetune_table(rows: list[dict[str, str]]) -> str:
    """Markdown: the newest row of each GPU, model, kind of training, documents and length."""
    setting = ("gpu", "model", "training", "documents", "max_length", "sequences")
    newest = {tuple(row[key] for key in setting): row for row in rows}
    lines = [
        "| GPU | model | training | documents | tokens a step | tokens/s | peak GiB | measured |",
        "|---" * 8 + "|",
    ]
    for (gpu, model, training, documents, length, sequences), row in newest.items():
        tokens = int(length) * int(sequences)
        measured = f"{row['date']}, {row['commit']}, torch {row['torch']}, trl {row['trl']}, peft {row['peft']}"
        figures = f"{int(row['tokens_per_second']):,} | {float(row['peak_gib']):.1f}"
        lines.append(f"| {gpu} | {model} | {training} | {documents} | {tokens:,} | {figures} | {measured} |")
    return "\n".join(lines)


def train_step_table(rows: list[dict[str, str]]) -> str:
    """Markdown: tokens/s and peak memory of a whole step, a line a variant, a column a length, a table a setting."""
    newest = {(r["gpu"], r["model"], r["layers"], r["training"], r["variant"], int(r["tokens"])): r for r in rows}
    tables = []
    for gpu, model, layers, training in dict.fromkeys(key[:4] for key in newest):
        cells = {key[4:]: row for key, row in newest.items() if key[:4] == (gpu, model, layers, training)}
        lengths = sorted({tokens for _, tokens in cells})
        lines = ["| tokens/s, peak GiB | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " |"]
        lines.append("|---" * (1 + len(lengths)) + "|")
        others = {variant: variant.replace("/", ", ") for variant, _ in cells if variant not in VARIANTS}
        for variant, label in (VARIANTS | others).items():
            found = [cells.get((variant, tokens)) for tokens in lengths]
            if any(found):
                texts = [f"{int(r['tokens_per_second']):,}, {float(r['peak_gib']):.1f}" if r else "–" for r in found]
                lines.append(f"| {label} | {' | '.join(texts)} |")
        used = list(cells.values())
        trained = {"lora": "LoRA r=8 on attention", "full": "all weights trained"}[training]
        head = f"{gpu}, {model}, {layers} layers, {trained}, bf16, gradient checkpointing, batch 1."
        versions = ", ".join(f"{key} {_distinct(used, key)}" for key in ("torch", "triton", "transformers", "packages"))
        foot = f"Measured {_distinct(used, 'date')} at commit {_distinct(used, 'commit')} with {versions}."
        tables.append("\n\n".join((head, "\n".join(lines), foot)))
    return "\n\n".join(tables) or "No measurement has been recorded yet."


def experts_table(rows: list[dict[str, str]]) -> str:
    """Markdown: the newest row of each length, kind of training and contender."""
    labels = {"ours": "gptoss_kernels", "grouped_mm": "Transformers grouped_mm", "gemms": "the matrix products alone"}
    newest = {(r["gpu"], int(r["tokens"]), r["weights"], r["contender"]): r for r in rows}
    lines = ["| GPU | tokens | weights | " + " | ".join(labels.values()) + " |", "|---" * (3 + len(labels)) + "|"]
    for gpu, tokens, weights in dict.fromkeys(key[:3] for key in newest):
        found = [newest.get((gpu, tokens, weights, name)) for name in labels]
        texts = [f"{float(r['total_ms']):.2f} ms, {float(r['peak_extra_gib']):.2f} GiB" if r else "–" for r in found]
        lines.append(f"| {gpu} | {tokens:,} | {weights} | {' | '.join(texts)} |")
    used = list(newest.values())
    foot = (
        f"Measured {_distinct(used, 'date')} at commit {_distinct(used, 'commit')}, torch {_distinct(used, 'torch')}."
    )
    return "\n".join(lines) + f"\n\n{foot}"


def update(text: str, name: str, body: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced by `body`.

    Raises:
        ValueError: the markers are not there just once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"text: expected one {begin} and one {end}, got {text.count(begin)} and {text.count(end)}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    memory = f", {float(row['peak_extra_gib']):.2f}" if row["peak_extra_gib"] else ""
    return f"{float(row['forward_ms']):.2f} / {float(row['backward_ms']):.2f}{memory}"


def _distinct(rows: list[dict[str, str]], key: str) -> str:
    return ", ".join(sorted({row[key] for row in rows}))


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = update(text, "attention", attention_tables(harness.read_rows(ATTENTION)))
    text = update(text, "train_step", train_step_table(harness.read_rows(TRAIN_STEP)))
    text = update(text, "experts", experts_table(harness.read_rows(EXPERTS)))
    text = update(text, "finetune", finetune_table(harness.read_rows(FINETUNE)))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
