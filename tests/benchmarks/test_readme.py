"""The README's figures are those of the stored rows, and nothing else."""

import pytest

from benchmarks import attention, experts, harness, mxfp4, readme, train_step, verify_table


def row(**changes):
    base = dict.fromkeys(attention.COLUMNS, "") | {
        "contender": "ours",
        "tokens": "4096",
        "window": "0",
        "documents": "1",
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
    body = readme.mxfp4_table(harness.read_rows(readme.MXFP4))
    assert readme.update(text, "mxfp4", body) == text, "run `python -m benchmarks.readme`"
    body = readme.node_table(harness.read_rows(readme.NODE))
    assert readme.update(text, "node", body) == text, "run `python -m benchmarks.readme`"
    body = verify_table.table(harness.read_rows(readme.VERIFY))
    assert readme.update(text, "verify", body) == text, "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("benchmark", [attention, experts, mxfp4, train_step], ids=lambda module: module.__name__)
def test_stored_rows_have_todays_columns(benchmark):
    path = readme.ROOT / "benchmarks" / "results" / f"{benchmark.__name__.rpartition('.')[2]}.csv"
    rows = harness.read_rows(path)
    assert rows and all(tuple(row) == tuple(benchmark.COLUMNS) for row in rows)
    assert not any(row["gpu"].startswith("none") for row in rows), "a CPU's row is no result"


def test_verify_table():
    base = dict.fromkeys(verify_table.COLUMNS, "") | {"model": "small", "commit": "abc", "gpu": "GPU A"}
    cell = lambda stack, trained, check, status, measured, **changes: base | {  # noqa: E731
        "stack": stack, "train": trained, "check": check, "status": status, "measured": measured,
    } | changes  # fmt: skip
    rows = [
        cell("ours", "lora", "window", "FAIL", "129", commit="older"),
        cell("ours", "lora", "window", "PASS", "128"),
        cell("ours", "lora", "sinks", "n.a.", "not trained"),
        cell("ours", "full", "window", "PASS", "128"),
        cell("ours", "full", "sinks", "PASS", "1e-6"),
        cell("eager", "full", "window", "FAIL", "129"),
        cell("eager", "full", "sinks", "n.a.", "2e-1", advice="once window is right"),
        cell("flex", "full", "", "skipped", "no GPU"),
        cell("ours", "lora", "window", "PASS", "127", gpu="none: CPU"),
    ]
    text = verify_table.table(rows)
    assert "| check | ours | eager |" in text
    assert "| window | PASS: 128 | **FAIL**: 129 |" in text
    assert "| sinks | PASS: 1e-6 | n.a.: once window is right |" in text
    assert "Not run here: flex with full (no GPU)." in text and "On GPU A" in text
    assert "127" in verify_table.table(rows[-1:]) and "On a CPU" in verify_table.table(rows[-1:])


def test_tables():
    rows = [
        row(forward_ms="9"),
        row(),
        row(contender="fa4", package="flash-attn-4 4.0", window="128", forward_ms="0.125", peak_extra_gib=""),
        row(tokens="8192", forward_ms="2"),
        row(gpu="none: CPU", forward_ms="777"),
        row(documents="4", forward_ms="888"),
        row(gpu="GPU B", commit="def"),
    ]
    text = readme.attention_tables(rows)
    assert text.splitlines()[2:8] == [
        "| tokens | layer | gptoss_kernels | FlashAttention-4 |",
        "|---|---|---|---|",
        "| 4,096 | full | 0.50 / 1.25, 0.06 | – |",
        "| 8,192 | full | 2.00 / 1.25, 0.06 | – |",
        "| 4,096 | window 128 | – | 0.12 / 1.25 |",
        "",
    ]
    assert "Measured 2026-01-02 at commit abc with torch 2.11, triton 3.6, transformers 5.17, flash-attn-4 4.0." in text
    assert "GPU B, bfloat16" in text and "commit def" in text and "777" not in text and "888" not in text


def test_both_layers_together_are_of_one_run():
    rows = [
        row(total_ms="4", tokens="8192"),
        row(total_ms="5", tokens="8192", contender="flex"),
        row(total_ms="1", tokens="8192", window="128"),
        row(total_ms="2.5", tokens="8192", window="128", contender="flex"),
        row(total_ms="9", tokens="8192", window="128", contender="fa4", commit="old"),
        row(total_ms="9", tokens="8192", window="128", contender="cudnn", commit="newer, without ours"),
    ]
    lines = readme.attention_tables(rows).splitlines()
    assert "| 8,192 | full + window 128 | **5.00** | **7.50** | – | – |" in lines
    at = lines.index("| layer | FlexAttention |")
    assert lines[at + 2 : at + 5] == [
        "| full | 1.25× to 1.25× |",
        "| window 128 | 2.50× to 2.50× |",
        "| full + window 128 | 1.50× to 1.50× |",
    ]


def test_rates_are_those_of_ours():
    lines = readme.attention_tables([row(), row(contender="flex", forward_ms="1"), row(window="128")]).splitlines()
    at = lines.index("| tokens | layer | TFLOP/s | GB/s |")
    assert lines[at + 2 : at + 5] == [
        "| 4,096 | full | 275 / 275 | 153 / 122 |",
        "| 4,096 | window 128 | 17 / 17 | 153 / 122 |",
        "",
    ]


def test_packed_documents_beside_their_prediction():
    rows = [row(total_ms="16"), row(contender="flex", total_ms="16", commit="old")]
    rows += [row(contender=name, documents="16", total_ms="2") for name in ("ours", "flex")]
    rows.append(row(documents="3u", window="128", total_ms="3"))
    lines = readme.attention_tables(rows).splitlines()
    at = lines.index("| tokens | documents | layer | gptoss_kernels | FlexAttention |")
    lengths = attention.figures.document_lengths(4096, "3u")
    assert lines[at + 2 : at + 5] == [
        "| 4,096 | 16 | full | 2.00 (1.00) | 2.00 |",  # no one-document row in flex's run: no prediction
        f"| 4,096 | 3 of {min(lengths):,} to {max(lengths):,} | window 128 | 3.00 | – |",
        "",
    ]


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
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    from benchmarks import plot

    rows = [row(), row(tokens="8192", total_ms="4"), row(contender="flex"), row(window="128")]
    rows += [row(documents="4", total_ms="555"), row(gpu="none: CPU", total_ms="777")]
    figure = plot.draw(rows)
    full, windowed = figure.axes
    assert full.lines[0].get_xydata().tolist() == [[4096, 1.75], [8192, 4]]
    assert len(full.lines) == 2 and len(windowed.lines) == 1
    assert full.get_xlabel() == "tokens" and "ms" in full.get_ylabel()
    assert [text.get_text() for text in full.texts] == ["FlexAttention", "gptoss_kernels"]
    pyplot.close(figure)
    with pytest.raises(ValueError, match="rows: expected at least one taken on a GPU"):
        plot.draw(rows[-1:])


def test_labels_of_curves_that_end_together_are_apart():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    from benchmarks import plot

    times = {"ours": "100", "flex": "102", "cudnn": "99", "fa4": "30"}
    rows = [row(contender=name, total_ms=time) for name, time in times.items()]
    rows += [row(window="128", total_ms="0.2")]  # as far down as the windowed layers of the stored rows
    figure = plot.draw(rows)
    figure.draw_without_rendering()
    # Text's extent: that of an Annotation has the leader line in it.
    boxes = [pyplot.Text.get_window_extent(text) for text in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 4 and all(low.y1 < high.y0 for low, high in zip(boxes, boxes[1:], strict=False))
    pyplot.close(figure)


def test_roofline():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    from benchmarks import plot

    rows = [row(gpu=next(iter(plot.CEILINGS)), **more) for more in ({}, {"tokens": "8192"}, {"window": "128"})]
    figure = plot.draw_roofline([*rows, row(gpu="GPU A"), row(gpu="GPU A", window="128")])  # fewer, if later ones
    roof, *trails = figure.axes[0].lines
    assert max(roof.get_ydata()) == 989 and roof.get_xdata()[1] == pytest.approx(295, abs=1)
    forward = trails[0].get_xydata()
    # 4 FLOPs an element of head_dim and visible pair; see test_attention_figures for the bytes.
    assert forward[0].tolist() == pytest.approx([4 * 4096 * 4097 / 2 * 64 * 64 / 76_546_048, 274.95], rel=1e-4)
    assert len(trails) == 4 and len(forward) == 2  # full and window, forward and backward; full at two lengths
    pyplot.close(figure)
    with pytest.raises(ValueError, match="rows: expected most of them to be of NVIDIA H100 80GB HBM3, .*, got 'GPU A'"):
        plot.draw_roofline([row()])


def test_train_step_table():
    base = dict.fromkeys(train_step.COLUMNS, "x") | {
        "layers": "24", "model": "gpt-oss-20b", "gpu": "GPU A", "training": "lora"
    }  # fmt: skip
    rows = [
        base | {"variant": "flex", "tokens": "8192", "tokens_per_second": "8000", "peak_gib": "43.2"},
        base | {"variant": "ours:lean", "tokens": "8192", "tokens_per_second": "1", "peak_gib": "41.04"},
        base | {"variant": "ours:lean", "tokens": "8192", "tokens_per_second": "16000", "peak_gib": "41.04"},
        base | {"variant": "ours:lean", "tokens": "16384", "tokens_per_second": "15000", "peak_gib": "44.0"},
        base | {"variant": "ours:lean:on_host=0.5", "tokens": "8192", "tokens_per_second": "9", "peak_gib": "30"},
    ]
    assert readme.train_step_table(rows).splitlines()[2:7] == [
        "| tokens/s, peak GiB | 8,192 tokens | 16,384 tokens |",
        "|---|---|---|",
        "| gptoss_kernels, lean | 16,000, 41.0 | 15,000, 44.0 |",
        "| FlexAttention, grouped_mm, Liger's loss | 8,000, 43.2 | – |",
        "| gptoss_kernels, lean, 50% of the moments in the host's memory | 9, 30.0 | – |",
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


def test_variants_with_moments_on_the_host(capsys):
    line = ["--training", "full", "--variants", "ours:lean,ours:auto:on_host=0.25"]
    assert train_step.parse(line).variants == ["ours:lean", "ours:auto:on_host=0.25"]
    for line in (["--variants", "ours:auto:on_host=1"], ["--training", "full", "--variants", "ours:auto:on_host=2"]):
        with pytest.raises(SystemExit):
            train_step.parse(line)
        assert "--variants: " in capsys.readouterr().err


def test_parts_know_the_kernels():
    import re

    names = {
        "forward_kernel": "attention_ms", "dkdv_kernel": "attention_ms", "cross_entropy_kernel": "loss_ms",
        "activation_backward_kernel": "experts_ms", "rms_norm_kernel": "norm_rope_ms", "rope_kernel": "norm_rope_ms",
        "nvjet_sm90_tst_256x128": "gemm_ms", "cutlass13device_kernel_GroupProblemShape": "grouped_gemm_ms",
    }  # fmt: skip
    for kernel, part in names.items():
        assert next(p for p, pattern in train_step.PARTS.items() if re.search(pattern, kernel)) == part
