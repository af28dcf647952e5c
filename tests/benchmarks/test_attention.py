"""benchmarks/attention.py: its command line, its refusal to time a wrong kernel, and its whole flow on a CPU."""

import argparse
import re

import pytest
import torch

from benchmarks import attention, harness

SMALL = "--device cpu --lengths 40 --check-tokens 33 --heads 4 --kv-heads 2 --head-dim 16 --rounds 2".split()


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    # The script's own logic is tested here, not the kernels: on a CPU the reference answers, not the slow interpreter.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contenders", "ours,flux"], "--contenders: expected some of ours, flex, .* got 'flux'"),
        (["--lengths", "4096,x"], "--lengths: expected integers >= 1 with commas between, got '4096,x'"),
        (["--lengths", "0"], "--lengths: expected integers >= 1"),
        (["--windows", "-1"], "--windows: expected integers >= 0"),
        (["--device", "tpu"], "--device: expected cuda or cpu, got 'tpu'"),
        (["--dtype", "float8"], "--dtype: expected one of bfloat16, float16, float32, got 'float8'"),
        (["--rounds", "1"], "--rounds: expected >= 2, got 1"),
        (["--contender", "ours"], "unrecognized arguments: --contender"),
    ],
)
def test_command_line_names_what_is_wrong(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        attention.parse(["--device", "cpu", *flags])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_command_line():
    options = attention.parse([*SMALL, "--windows", "0,128", "--contenders", "ours,eager"])
    assert options.lengths == [40] and options.windows == [None, 128] and options.contenders == ["ours", "eager"]
    assert options.dtype == torch.float32


@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize("window", [None, 7])
def test_errors_are_against_the_definition(name, window):
    options = attention.parse(SMALL)
    contender = attention.CONTENDERS[name]
    inputs = attention.make_inputs(33, options, seed=1)
    attend = contender.load(options.device)
    errors = attention.relative_errors(contender, attend, inputs, window)
    assert list(errors) == list(attention.NAMES)
    assert not attention.over_limit(errors, torch.float32), errors

    def late(q, k, v, sinks, window):  # the window's first key is missed
        return attend(q, k, v, sinks, (window or 33) - 1)

    wrong = attention.relative_errors(contender, late, inputs, window)
    assert len(attention.over_limit(wrong, torch.float32)) == 5, wrong


def test_without_sinks_is_compared_without_sinks():
    options = attention.parse(SMALL)
    inputs = attention.make_inputs(33, options, seed=1)

    def plain(q, k, v, sinks, window):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    errors = attention.relative_errors(attention.CONTENDERS["cudnn"], plain, inputs, None)
    assert list(errors) == ["out", "dq", "dk", "dv"]
    assert not attention.over_limit(errors, torch.float32), errors


def test_nan_is_over_the_limit():
    assert attention.over_limit({"out": float("nan"), "dsinks": 0.0}, torch.bfloat16) == ["out nan > 4e-03"]


def test_flow(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPTOSS_COMMIT", "abc123")
    output = tmp_path / "rows.csv"
    attention.main([*SMALL, "--windows", "0,8", "--contenders", "ours,flex,eager", "--output", str(output)])
    rows = harness.read_rows(output)
    assert [(row["contender"], row["tokens"], row["window"]) for row in rows] == [
        ("ours", "40", "0"),
        ("eager", "40", "0"),
        ("ours", "40", "8"),
        ("eager", "40", "8"),
    ]
    for row in rows:
        assert row["gpu"].startswith("none: CPU") and row["peak_extra_gib"] == "" and row["commit"] == "abc123"
        assert float(row["forward_ms"]) > 0 and float(row["total_ms"]) > 0
        assert float(row["max_relative_error"]) <= 1e-5
    shown = capsys.readouterr().out
    assert "flex: skipped, Unavailable: needs a CUDA GPU" in shown
    assert shown.splitlines()[-1] == f"4 rows appended to {output}"


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    def load(device):
        right = attention.load_ours(device)
        return lambda q, k, v, sinks, window: right(q, k, v, sinks + 0.01, window)

    monkeypatch.setitem(attention.CONTENDERS, "ours", attention.Contender(load, "gptoss-kernels"))
    output = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="ours is wrong and is not timed: window None: out"):
        attention.main([*SMALL, "--contenders", "ours,eager", "--output", str(output)])
    assert not output.exists()


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def load(device):
        def attend(q, k, v, sinks, window):
            raise RuntimeError("no kernel for this machine")

        return attend

    monkeypatch.setitem(attention.CONTENDERS, "fa4", attention.Contender(load, "flash-attn-4"))
    output = tmp_path / "rows.csv"
    attention.main([*SMALL, "--windows", "0", "--contenders", "fa4,ours", "--output", str(output)])
    assert [row["contender"] for row in harness.read_rows(output)] == ["ours"]
    assert "fa4: skipped, RuntimeError: no kernel for this machine" in capsys.readouterr().out


def test_lengths_beyond_a_contender_are_left_out(monkeypatch):
    options: argparse.Namespace = attention.parse(SMALL)
    monkeypatch.setitem(attention.CONTENDERS, "eager", attention.Contender(attention.load_eager, "", max_tokens=39))
    loaded = attention.load_contenders(argparse.Namespace(contenders=["ours", "eager"], device=options.device))
    assert list(attention.measure(loaded, 40, None, options)) == ["ours"]
