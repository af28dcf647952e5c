"""The README's figures are those of the stored rows, and nothing else."""

import pytest

from benchmarks import attention, experts, harness, readme, train_step


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
    body = readme.train_step_table(harness.read_rows(readme.TRAIN_STEP))
    assert readme.update(text, "train_step", body) == text, "run `python -m benchmarks.readme`"
    body = readme.experts_table(harness.read_rows(readme.EXPERTS))
    assert readme.update(text, "experts", body) == text, "run `python -m benchmarks.readme`"
    body = readme.finetune_table(harness.read_rows(readme.FINETUNE))
    assert readme.update(text, "finetune", body) == text, "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("benchmark", [attention, experts, train_step], ids=lambda module: module.__name__)
def test_stored_rows_have_todays_columns(benchmark):
    path = readme.ROOT / "benchmarks" / "results" / f"{benchmark.__name__.rpartition('.')[2]}.csv"
    rows = harness.read_rows(path)
    assert rows and all(tuple(row) == tuple(benchmark.COLUMNS) for row in rows)
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
    base = dict(gpu="GPU A", model="m", training="LoRA r=8", documents="shipped")
    base |= dict(max_length="8192", sequences="2", peak_gib="42.88")
    base |= dict(date="2026-01-02", commit="abc", torch="2.11", trl="1.16", peft="0.21")
    text = readme.finetune_table([base | {"tokens_per_second": "9"}, base | {"tokens_per_second": "9071"}])
    measured = "2026-01-02, abc, torch 2.11, trl 1.16, peft 0.21"
    last = f"| GPU A | m | LoRA r=8 | shipped | 16,384 | 9,071 | 42.9 | {measured} |"
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


def test_train_step_table():
    base = dict.fromkeys(train_step.COLUMNS, "x") | {
        "layers": "24", "model": "gpt-oss-20b", "gpu": "GPU A", "training": "lora"
    }  # fmt: skip
    rows = [
        base | {"variant": "flex", "tokens": "8192", "tokens_per_second": "8000", "peak_gib": "43.2"},
        base | {"variant": "ours:lean", "tokens": "8192", "tokens_per_second": "1", "peak_gib": "41.04"},
        base | {"variant": "ours:lean", "tokens": "8192", "tokens_per_second": "16000", "peak_gib": "41.04"},
        base | {"variant": "ours:lean", "tokens": "16384", "tokens_per_second": "15000", "peak_gib": "44.0"},
    ]
    assert readme.train_step_table(rows).splitlines()[2:6] == [
        "| tokens/s, peak GiB | 8,192 tokens | 16,384 tokens |",
        "|---|---|---|",
        "| gptoss_kernels, lean | 16,000, 41.0 | 15,000, 44.0 |",
        "| FlexAttention, grouped_mm, Liger's loss | 8,000, 43.2 | – |",
    ]


def test_model_flops_count_windows():
    from types import SimpleNamespace

    config = SimpleNamespace(
        hidden_size=4, num_attention_heads=2, head_dim=2, num_key_value_heads=1, num_experts_per_tok=1,
        intermediate_size=4, num_local_experts=2, num_hidden_layers=1, vocab_size=8, sliding_window=2,
        layer_types=["sliding_attention"],
    )  # fmt: skip
    # q, o: 4 x 4 each; k, v: 4 x 2 each; experts 3 x 4 x 4; router 4 x 2; head 8 x 4; 3 tokens see 1 + 2 + 2 keys.
    assert train_step.model_flops(config, 3) == 4 * (48 + 48 + 8 + 32) * 3 + 14 * 4 * 5
    config.layer_types = ["full_attention"]
    assert train_step.model_flops(config, 3) == 4 * (48 + 48 + 8 + 32) * 3 + 14 * 4 * 6


def test_parts_know_the_kernels():
    import re

    names = {
        "forward_kernel": "attention_ms", "dkdv_kernel": "attention_ms", "cross_entropy_kernel": "loss_ms",
        "activation_backward_kernel": "experts_ms", "rms_norm_kernel": "norm_rope_ms", "rope_kernel": "norm_rope_ms",
        "nvjet_sm90_tst_256x128": "gemm_ms", "cutlass13device_kernel_GroupProblemShape": "grouped_gemm_ms",
    }  # fmt: skip
    for kernel, part in names.items():
        assert next(p for p, pattern in train_step.PARTS.items() if re.search(pattern, kernel)) == part
