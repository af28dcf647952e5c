"""The README's figures are those of the stored rows, and nothing else."""

import pytest

from benchmarks import attention, harness, readme


def row(**changes):
    base = dict.fromkeys(attention.COLUMNS, "") | {
        "contender": "ours",
        "tokens": "4096",
        "window": "0",
        "forward_ms": "0.5",
        "backward_ms": "1.25",
        "total_ms": "1.75",
        "peak_extra_gib": "0.0625",
        "dtype": "bfloat16",
        "heads": "64",
        "kv_heads": "8",
        "head_dim": "64",
        "gpu": "GPU A",
        "torch": "2.11",
        "triton": "3.6",
        "transformers": "5.17",
        "date": "2026-01-02",
        "commit": "abc",
    }
    return base | changes


def test_readme_agrees_with_the_rows():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    body = readme.attention_tables(harness.read_rows(readme.ATTENTION))
    assert readme.update(text, "attention", body) == text, "run `python -m benchmarks.readme`"
    body = readme.finetune_table(harness.read_rows(readme.FINETUNE))
    assert readme.update(text, "finetune", body) == text, "run `python -m benchmarks.readme`"


def test_stored_rows_have_todays_columns():
    rows = harness.read_rows(readme.ATTENTION)
    assert all(tuple(row) == attention.COLUMNS for row in rows)
    assert not any(row["gpu"].startswith("none") for row in rows), "a CPU's row is no result"


def test_tables():
    rows = [
        row(forward_ms="9"),
        row(),
        row(contender="fa4", package="flash-attn-4 4.0", window="128", forward_ms="0.125", peak_extra_gib=""),
        row(tokens="8192", forward_ms="2"),
        row(gpu="none: CPU", forward_ms="777"),
        row(gpu="GPU B", commit="def"),
    ]
    text = readme.attention_tables(rows)
    assert text.splitlines()[2:7] == [
        "| tokens | layer | gptoss_kernels | FlashAttention-4 |",
        "|---|---|---|---|",
        "| 4,096 | full | 0.50 / 1.25, 0.06 | – |",
        "| 8,192 | full | 2.00 / 1.25, 0.06 | – |",
        "| 4,096 | window 128 | – | 0.12 / 1.25 |",
    ]
    assert "Measured 2026-01-02 at commit abc with torch 2.11, triton 3.6, transformers 5.17, flash-attn-4 4.0." in text
    assert "GPU B, bfloat16" in text and "commit def" in text and "777" not in text


def test_finetune_table_shows_the_newest_row():
    base = dict(gpu="GPU A", model="m", training="LoRA r=8", max_length="8192", sequences="2", peak_gib="42.88")
    base |= dict(date="2026-01-02", commit="abc", torch="2.11", trl="1.16", peft="0.21")
    text = readme.finetune_table([base | {"tokens_per_second": "9"}, base | {"tokens_per_second": "9071"}])
    last = "| GPU A | m | LoRA r=8 | 16,384 | 9,071 | 42.9 | 2026-01-02, abc, torch 2.11, trl 1.16, peft 0.21 |"
    assert text.splitlines()[2:] == [last]


def test_no_rows_no_figures():
    text = readme.attention_tables([row(gpu="none: CPU")])
    assert "No measurement" in text and "|" not in text


def test_update_needs_its_markers():
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    assert readme.update(text, "t", "new") == "a\n<!-- t:begin -->\nnew\n<!-- t:end -->\nb\n"
    with pytest.raises(ValueError, match="expected one <!-- u:begin --> and one <!-- u:end -->, got 0 and 0"):
        readme.update(text, "u", "new")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib.pyplot").switch_backend("Agg")
    from benchmarks import plot

    rows = [row(), row(tokens="8192", total_ms="4"), row(window="128"), row(gpu="none: CPU", total_ms="777")]
    figure = plot.draw(rows)
    full, windowed = figure.axes
    assert full.lines[0].get_xydata().tolist() == [[4096, 1.75], [8192, 4]] and len(windowed.lines) == 1
    assert full.get_xlabel() == "tokens" and "ms" in full.get_ylabel()
    with pytest.raises(ValueError, match="rows: expected at least one taken on a GPU"):
        plot.draw(rows[-1:])
