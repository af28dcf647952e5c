"""benchmarks/attention.py: its command line, its refusal to time a wrong kernel, and its whole flow on a CPU."""

import argparse
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, harness
from gptoss_kernels import flash_attention

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
        (["--documents", "4,u"], "--documents: expected integers >= 1, or >= 2 with a u after them, got 'u'"),
        (["--documents", "1u"], "--documents: expected .* got '1u'"),
        (["--documents", "4096"], "--documents: expected at most --check-tokens 2048, got '4096'"),
        (["--documents", "4", "--lengths", "512"], r"--packed-tokens: expected one of --lengths \[512\], got 16384"),
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
    assert options.dtype == torch.float32 and options.documents == ["1"]
    options = attention.parse([*SMALL, "--lengths", "40,80", "--documents", "1,2,3u", "--packed-tokens", "80"])
    assert [(case.tokens, case.window, case.documents) for case in attention.cases(options)] == [
        (tokens, window, documents)
        for tokens, documents in ((40, "1"), (80, "1"), (80, "2"), (80, "3u"))
        for window in (None, 128)
    ]


@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", ["1", "3", "4u"])
def test_errors_are_against_the_definition(name, window, documents):
    options = attention.parse(SMALL)
    contender = attention.CONTENDERS[name]
    inputs = attention.make_inputs(33, options, seed=1)
    attend = contender.load(options.device)
    case = attention.Case(33, window, documents)
    errors = attention.relative_errors(contender, attend, inputs, case)
    assert list(errors) == list(attention.NAMES)
    assert not attention.over_limit(errors, torch.float32), errors

    def late(q, k, v, sinks, window, lengths):  # the first key that is seen is missed
        return attend(q, k, v, sinks, (window or max(lengths)) - 1, lengths)

    def leaking(q, k, v, sinks, window, lengths):
        return attend(q, k, v, sinks, window, (sum(lengths),))

    for wrong in (late,) if documents == "1" else (late, leaking):
        errors = attention.relative_errors(contender, wrong, inputs, case)
        assert len(attention.over_limit(errors, torch.float32)) == 5, errors


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how):
    """FlashAttention-4's call with packed tensors (tokens, heads, head_dim), by the definition."""
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and how["causal"]
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    window = None if how["window_size"] == (None, None) else how["window_size"][0] + 1
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = flash_attention(
        q, k, v, how["learnable_sink"], sliding_window=window, cu_seqlens=cu_seqlens_q, backend="reference"
    )
    return out[0].transpose(0, 1), None


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", ["1", "3", "4u"])
def test_mask_of_flex(window, documents, monkeypatch):
    # FlexAttention has no backward pass on a CPU; without torch.compile it is plain PyTorch.
    monkeypatch.setattr(attention, "_need_cuda", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function=None, **how: function or (lambda f: f))
    inputs = [x.detach() for x in attention.make_inputs(33, attention.parse(SMALL), seed=1)[:4]]
    lengths = attention.Case(33, window, documents).lengths
    got = attention.load_flex(inputs[0].device)(*inputs, window, lengths)
    torch.testing.assert_close(got, attention.load_ours(inputs[0].device)(*inputs, window, lengths))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", ["3", "4u"])
def test_call_of_fa4_with_packed_documents(window, documents, monkeypatch):
    monkeypatch.setattr(attention, "_need_cuda", lambda device: None)
    cute = SimpleNamespace(flash_attn_func=None, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=cute))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    options = attention.parse(SMALL)
    contender = attention.CONTENDERS["fa4"]
    inputs = attention.make_inputs(33, options, seed=1)
    case = attention.Case(33, window, documents)
    errors = attention.relative_errors(contender, contender.load(options.device), inputs, case)
    assert not attention.over_limit(errors, torch.float32), errors


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "flex", "fa4", "fla"])
@pytest.mark.parametrize("window", [None, 128])
def test_packing_on_a_gpu(name, window):
    options = attention.parse(["--heads", "8", "--kv-heads", "2"])
    contender = attention.CONTENDERS[name]
    try:
        attend = contender.load(options.device)
    except ImportError as error:
        pytest.skip(str(error))
    inputs = attention.make_inputs(1000, options, seed=1)
    for documents in ("4", "7u"):
        errors = attention.relative_errors(contender, attend, inputs, attention.Case(1000, window, documents))
        assert list(errors) == list(attention.NAMES) and max(errors.values()) < 2e-2, errors


def test_without_sinks_is_compared_without_sinks():
    options = attention.parse(SMALL)
    inputs = attention.make_inputs(33, options, seed=1)

    def plain(q, k, v, sinks, window, lengths):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    errors = attention.relative_errors(attention.CONTENDERS["cudnn"], plain, inputs, attention.Case(33, None))
    assert list(errors) == ["out", "dq", "dk", "dv"]
    assert not attention.over_limit(errors, torch.float32), errors


def test_nan_is_over_the_limit():
    assert attention.over_limit({"out": float("nan"), "dsinks": 0.0}, torch.bfloat16) == ["out nan > 4e-03"]


def test_flow(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPTOSS_COMMIT", "abc123")
    output = tmp_path / "rows.csv"
    attention.main([*SMALL, "--windows", "0,8", "--contenders", "ours,flex,eager", "--output", str(output)])
    rows = harness.read_rows(output)
    assert [(row["contender"], row["tokens"], row["window"], row["documents"]) for row in rows] == [
        ("ours", "40", "0", "1"),
        ("eager", "40", "0", "1"),
        ("ours", "40", "8", "1"),
        ("eager", "40", "8", "1"),
    ]
    for row in rows:
        assert row["gpu"].startswith("none: CPU") and row["peak_extra_gib"] == "" and row["commit"] == "abc123"
        assert float(row["forward_ms"]) > 0 and float(row["total_ms"]) > 0
        assert float(row["max_relative_error"]) <= 1e-5
    shown = capsys.readouterr().out
    assert "flex: skipped, Unavailable: needs a CUDA GPU" in shown
    assert shown.splitlines()[-1] == f"4 rows appended to {output}"
    assert re.search(r"40 tokens, full \+ window 8, forward \+ backward: ours \d+\.\d+ ms; \d+\.\d+x eager\n", shown)


def test_packed_flow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        attention.CONTENDERS, "cudnn", attention.Contender(attention.load_ours, "torch", windows=False, packing=False)
    )
    output = tmp_path / "rows.csv"
    flags = "--windows 0,8 --contenders ours,cudnn --lengths 20,40 --documents 1,4,3u --packed-tokens 40".split()
    attention.main([*SMALL, *flags, "--output", str(output)])
    rows = harness.read_rows(output)
    assert [(r["contender"], r["tokens"], r["window"], r["documents"]) for r in rows if r["contender"] == "cudnn"] == [
        ("cudnn", "20", "0", "1"),
        ("cudnn", "40", "0", "1"),
    ]
    assert [(r["tokens"], r["window"], r["documents"]) for r in rows if r["contender"] == "ours"] == [
        *(("20", "0", "1"), ("20", "8", "1"), ("40", "0", "1"), ("40", "8", "1")),
        *(("40", "0", "4"), ("40", "8", "4"), ("40", "0", "3u"), ("40", "8", "3u")),
    ]
    shown = capsys.readouterr().out
    assert "cudnn: 33 tokens, window None, documents 4: left out, it has no packing" in shown
    assert "cudnn: 33 tokens, window 8, documents 1: left out, it has no windows" in shown


def test_report_has_the_prediction_beside_the_measured_time():
    base = dict.fromkeys(attention.COLUMNS, "x") | dict(contender="ours", tokens=16384, window=0, documents="1")
    base |= dict(dtype="bfloat16", heads=64, kv_heads=8, head_dim=64, peak_extra_gib=None)
    base |= dict(forward_ms=4.0, backward_ms=12.0, total_ms=16.0)
    packed = base | dict(documents="16", forward_ms=0.5, backward_ms=1.0, total_ms=1.5)
    header, one, sixteen = (line.split() for line in attention.report([base, packed]).splitlines()[1:4])
    assert dict(zip(header, one, strict=True))["predicted_ms"] == "-"
    # 1,025 / 2 keys a token in the place of 16,385 / 2.
    assert dict(zip(header, sixteen, strict=True))["predicted_ms"] == f"{16 * 1025 / 16385:.3f}"
    assert dict(zip(header, one, strict=True))["forward_tflops"] == "550"


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    def load(device):
        right = attention.load_ours(device)
        return lambda q, k, v, sinks, window, lengths: right(q, k, v, sinks + 0.01, window, lengths)

    monkeypatch.setitem(attention.CONTENDERS, "ours", attention.Contender(load, "gptoss-kernels"))
    output = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="ours is wrong and is not timed: 33 tokens, window None, documents 1: out"):
        attention.main([*SMALL, "--contenders", "ours,eager", "--output", str(output)])
    assert not output.exists()


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def load(device):
        def attend(q, k, v, sinks, window, lengths):
            raise RuntimeError("no kernel for this machine")

        return attend

    monkeypatch.setitem(attention.CONTENDERS, "fa4", attention.Contender(load, "flash-attn-4"))
    output = tmp_path / "rows.csv"
    attention.main([*SMALL, "--windows", "0", "--contenders", "fa4,ours", "--output", str(output)])
    assert [row["contender"] for row in harness.read_rows(output)] == ["ours"]
    shown = capsys.readouterr().out
    assert "fa4: 33 tokens, window None, documents 1: skipped, RuntimeError: no kernel for this machine" in shown


def test_lengths_beyond_a_contender_are_left_out(monkeypatch):
    options: argparse.Namespace = attention.parse(SMALL)
    monkeypatch.setitem(attention.CONTENDERS, "eager", attention.Contender(attention.load_eager, "", max_tokens=39))
    loaded = attention.load_contenders(argparse.Namespace(contenders=["ours", "eager"], device=options.device))
    assert list(attention.measure(loaded, attention.Case(40, None), options)) == ["ours"]
