"""Writes the README's result tables from the rows in benchmarks/results/, between their markers.

python -m benchmarks.readme
"""

from pathlib import Path

from benchmarks import attention_figures as figures
from benchmarks import harness, verify_table

ROOT = Path(__file__).parent.parent
ATTENTION = ROOT / "benchmarks" / "results" / "attention.csv"
EXPERTS = ROOT / "benchmarks" / "results" / "experts.csv"
FINETUNE = ROOT / "benchmarks" / "results" / "finetune.csv"
MXFP4 = ROOT / "benchmarks" / "results" / "mxfp4.csv"
NODE = ROOT / "benchmarks" / "results" / "node.csv"
TRAIN_STEP = ROOT / "benchmarks" / "results" / "train_step.csv"
VERIFY = ROOT / "benchmarks" / "results" / "verify.csv"
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
NODE_LABELS = {
    ("ours", "fsdp2"): "gptoss_kernels, FSDP2",
    ("ours", "zero3"): "gptoss_kernels, ZeRO-3",
    ("stock", "fsdp2"): "eager attention, grouped_mm, FSDP2",
    ("stock", "zero3"): "eager attention, grouped_mm, ZeRO-3",
}


def attention_tables(rows: list[dict[str, str]]) -> str:
    """Markdown: a section a GPU, dtype and head shape, the one measured last first, from the newest row of each
    contender and case.

    Ratios and predictions compare rows of one run alone (`figures.comparable`). Rows taken on a CPU are left out.
    """
    rows = [row for row in rows if not row["gpu"].startswith("none")]
    if not rows:
        return "No measurement has been recorded yet: `python benchmarks/attention.py` on a GPU appends its rows."

    parts = []
    sections = figures.settings(rows).items()
    for setting, used in sorted(sections, key=lambda section: max(r["date"] for r in section[1]), reverse=True):
        measured = [row for row in rows if tuple(row[key] for key in figures.SETTING) == setting]
        run = figures.comparable(measured)
        gpu, dtype, heads, kv_heads, head_dim = setting
        parts.append(
            f"{gpu}, {dtype}, {heads} query and {kv_heads} key/value heads of {head_dim}, batch 1. Milliseconds "
            "forward / backward, and peak extra memory of the two together, in GiB; in **bold** forward + backward of "
            "one full and one windowed layer, what gpt-oss alternates."
        )
        parts.append(_times_table([row for row in used if row["documents"] == "1"], figures.layer_times(run)))
        parts += [
            _ratio_table(figures.ratios(figures.layer_times(run))),
            _rates_table(used),
            _documents_table(used, measured),
        ]
        versions = [f"{key} {_distinct(used, key)}" for key in ("torch", "triton", "transformers")]
        versions += sorted({row["package"] for row in used if row["contender"] in ("fa4", "fla")})
        parts.append(
            f"Measured {_distinct(used, 'date')} at commit {_distinct(used, 'commit')} with {', '.join(versions)}."
        )
    parts.append(
        "![attention under a GPU's ceilings of memory and arithmetic](benchmarks/results/attention_roofline.png)"
    )
    return "\n\n".join(part for part in parts if part)


def _times_table(used: list[dict[str, str]], times: dict) -> str:
    """Every contender's times by length and layer; both layers together from `times`, the rows of one run."""
    cells = {(int(row["window"]), int(row["tokens"]), row["contender"]): row for row in used}
    contenders = _present(row["contender"] for row in used)
    lines = [f"| tokens | layer | {' | '.join(LABELS[name] for name in contenders)} |"]
    lines.append("|---" * (2 + len(contenders)) + "|")
    for window, tokens in sorted({place[:2] for place in cells}):
        texts = [_cell(cells.get((window, tokens, name))) for name in contenders]
        layer = f"window {window}" if window else "full"
        lines.append(f"| {tokens:,} | {layer} | {' | '.join(texts)} |")
    for (tokens, layer), found in times.items():
        if "+" in layer:
            texts = [f"**{found[name]:.2f}**" if name in found else "–" for name in contenders]
            lines.append(f"| {tokens:,} | {layer} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _ratio_table(ratios: dict[str, dict[str, tuple[float, float]]]) -> str:
    contenders = _present(name for found in ratios.values() for name in found)
    if not contenders:
        return ""
    lines = [
        "Their forward + backward time over that of gptoss_kernels in the same run, least to most over the lengths:\n",
        f"| layer | {' | '.join(LABELS[name] for name in contenders)} |",
        "|---" * (1 + len(contenders)) + "|",
    ]
    for layer, found in ratios.items():
        spans = ["{:.2f}× to {:.2f}×".format(*found[name]) if name in found else "–" for name in contenders]
        lines.append(f"| {layer} | {' | '.join(spans)} |")
    return "\n".join(lines)


def _rates_table(used: list[dict[str, str]]) -> str:
    """What the times of ours amount to."""
    ours = [row for row in used if row["contender"] == "ours" and row["documents"] == "1"]
    if not ours:
        return ""
    lines = [
        "What gptoss_kernels reaches, forward / backward: TFLOP/s over the visible pairs (a backward pass has 2.5 "
        "times the FLOPs of a forward pass), and GB/s if each input is read once and each output written once:\n",
        "| tokens | layer | TFLOP/s | GB/s |",
        "|---|---|---|---|",
    ]
    for row in sorted(ours, key=lambda row: (int(row["window"]), int(row["tokens"]))):
        layer = f"window {row['window']}" if int(row["window"]) else "full"
        rates = [
            " / ".join(f"{rate(row, part):,.0f}" for part in ("forward", "backward"))
            for rate in (figures.tflops, figures.gbs)
        ]
        lines.append(f"| {int(row['tokens']):,} | {layer} | {' | '.join(rates)} |")
    return "\n".join(lines)


def _documents_table(used: list[dict[str, str]], measured: list[dict[str, str]]) -> str:
    """Packed documents: the time measured, and what the visible pairs predict from the one-document row of its run."""
    packed = [row for row in used if row["documents"] != "1"]
    if not packed:
        return ""
    contenders = _present(row["contender"] for row in packed)
    lines = [
        "Packed documents, forward + backward: measured ms (in parentheses what the time of one document predicts by "
        "the visible pairs: in full layers the sum of the squares of the lengths):\n",
        f"| tokens | documents | layer | {' | '.join(LABELS[name] for name in contenders)} |",
        "|---" * (3 + len(contenders)) + "|",
    ]
    cells = {(int(r["tokens"]), int(r["window"]), r["documents"], r["contender"]): r for r in packed}
    places = {place[:3] for place in cells}
    for tokens, window, documents in sorted(places, key=lambda x: (x[0], x[1], x[2][-1] == "u", int(x[2].strip("u")))):
        lengths = figures.document_lengths(tokens, documents)
        split = f"{len(lengths)} of {min(lengths):,} to {max(lengths):,}" if documents[-1] == "u" else f"{len(lengths)}"
        texts = []
        for row in (cells.get((tokens, window, documents, name)) for name in contenders):
            predicted = figures.predicted_ms(row, measured) if row else None
            texts.append(f"{float(row['total_ms']):.2f}" if row else "–")
            texts[-1] += "" if predicted is None else f" ({predicted:.2f})"
        layer = f"window {window}" if window else "full"
        lines.append(f"| {tokens:,} | {split} | {layer} | {' | '.join(texts)} |")
    return "\n".join(lines)


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


def _label(variant: str) -> str:
    stack, _, share = variant.partition(":on_host=")
    host = f", {float(share):.0%} of the moments in the host's memory" if share else ""
    return VARIANTS.get(stack, stack.replace("/", ", ")) + host


def train_step_table(rows: list[dict[str, str]]) -> str:
    """Markdown: tokens/s and peak memory of a whole step, a line a variant, a column a length, a table a setting."""
    newest = {(r["gpu"], r["model"], r["layers"], r["training"], r["variant"], int(r["tokens"])): r for r in rows}
    tables = []
    for gpu, model, layers, training in dict.fromkeys(key[:4] for key in newest):
        cells = {key[4:]: row for key, row in newest.items() if key[:4] == (gpu, model, layers, training)}
        lengths = sorted({tokens for _, tokens in cells})
        lines = ["| tokens/s, peak GiB | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " |"]
        lines.append("|---" * (1 + len(lengths)) + "|")
        others = {variant: _label(variant) for variant, _ in cells if variant not in VARIANTS}
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


def mxfp4_table(rows: list[dict[str, str]]) -> str:
    """Markdown: the newest row of each model, base weights, parts with adapters, recomputation and length."""
    keys = ("gpu", "model", "tokens", "targets", "weights", "recomputation", "offload", "memory_gib")
    newest = {tuple(r[key] for key in keys): r for r in rows}
    lines = [
        "| model | tokens | adapters on | base weights | recomputation | tokens/s | peak GiB | reserved GiB |",
        "|---" * 8 + "|",
    ]
    place = lambda r: (r["model"] != "gpt-oss-20b", int(r["tokens"]), r["targets"], r["weights"])  # noqa: E731
    for r in sorted(newest.values(), key=place):
        keeps = r["recomputation"] + ", offloaded" * (r["offload"] == "True")
        memory = f"{float(r['peak_gib']):.1f} | {float(r['reserved_gib']):.1f}"
        parts = r["targets"].replace("+", ", ")
        head = f"{r['model']} | {int(r['tokens']):,} | {parts} | {r['weights']} | {keeps}"
        lines.append(f"| {head} | {int(r['tokens_per_second']):,} | {memory} |")
    used = list(newest.values())
    versions = ", ".join(f"{key} {_distinct(used, key)}" for key in ("torch", "triton", "transformers"))
    measured = f"{_distinct(used, 'date')} at commit {_distinct(used, 'commit')} with {versions}"
    return "\n".join(lines) + f"\n\n{_distinct(used, 'gpu')}, rank 8, batch 1. Measured {measured}."


def node_table(rows: list[dict[str, str]]) -> str:
    """Markdown: tokens/s and peak memory of each GPU, a line an engine and stack, a table a setting; "" of no row."""
    setting = ("gpu", "gpus", "model", "states")
    newest = {(*(r[k] for k in setting), r["stack"], r["engine"], int(r["tokens"])): r for r in rows}
    tables = []
    for place in dict.fromkeys(key[:4] for key in newest):
        cells = {key[4:]: row for key, row in newest.items() if key[:4] == place}
        lengths = sorted({key[2] for key in cells})
        lines = ["| tokens/s and peak GiB of each GPU | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |"]
        lines.append("|---" * (1 + len(lengths)) + "|")
        for key, label in NODE_LABELS.items():
            found = [cells.get((*key, tokens)) for tokens in lengths]
            if any(found):
                lines.append(f"| {label} | {' | '.join(map(_node_cell, found))} |")
        used = list(cells.values())
        gpu, gpus, model, states = place
        keys = ("torch", "triton", "transformers", "accelerate", "deepspeed")
        versions = ", ".join(f"{key} {_distinct(used, key)}" for key in keys)
        measured = f"Measured {_distinct(used, 'date')} at commit {_distinct(used, 'commit')} with {versions}."
        head = f"{gpus} × {gpu}, all weights of {model}, {states} weights and moments, batch 1 a GPU."
        tables.append("\n\n".join((head, "\n".join(lines), measured)))
    if tables:
        tables.append("![tokens a second and GPU against context](benchmarks/results/node.png)")
    return "\n\n".join(tables)


def _node_cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    if not row["tokens_per_second_per_gpu"]:
        return row["outcome"]
    return f"{float(row['tokens_per_second_per_gpu']):,.0f}, {float(row['peak_gib']):.1f}"


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


def _present(names) -> list[str]:
    """Those contenders in LABELS's order."""
    names = set(names)
    return [name for name in LABELS if name in names]


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
    text = update(text, "mxfp4", mxfp4_table(harness.read_rows(MXFP4)))
    text = update(text, "node", node_table(harness.read_rows(NODE)))
    text = update(text, "verify", verify_table.table(harness.read_rows(VERIFY)))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
