"""The rounding benchmark's verdict; its runs take minutes."""

import pytest

from benchmarks import harness, rounding

SAME = {"gpu": "a", "torch": "", "triton": "", "transformers": "", "date": "", "commit": "", "learning_rate": 1e-5}


def rows(variant, seed, curve, **changes):
    same = SAME | {"tokens_a_step": 432, "held_out_rows": 100} | changes
    return [{"variant": variant, "seed": seed, "step": step, "loss": loss, **same} for step, loss in curve.items()]


def test_a_run_is_inside_the_band_or_so_far_outside(tmp_path):
    options = rounding.parse(["--output", str(tmp_path / "rounding.csv"), "--runs", ""])
    assert options.runs == []
    for each in (
        rows("fp32", 1, {0: 3.0, 10: 9.0}),  # replaced by the next
        rows("fp32", 1, {0: 3.0, 10: 1.0}),
        rows("fp32", 2, {0: 3.0, 10: 1.2}),
        rows("fp32", 3, {0: 3.0, 10: 0.1}, gpu="b"),  # of another GPU
        rows("ours", 1, {0: 3.0, 10: 1.1}),
        rows("nearest", 1, {0: 3.0, 10: 1.6}),
    ):
        harness.append_rows(options.output, rounding.COLUMNS, each)
    losses = rounding.read(options)
    assert losses["fp32", 1] == {0: 3.0, 10: 1.0} and ("fp32", 3) not in losses
    said = rounding.verdict(losses)
    assert "fp32, 2 seeds, at step 10: 1.0000 to 1.2000" in said
    assert "ours, seed 1: 1.1000, inside the band" in said
    assert "nearest, seed 1: 1.6000, outside by 0.4000, 2.0 widths" in said
    rounding.draw(losses, "title").savefig(tmp_path / "rounding.png")


def test_an_unknown_variant_is_an_error(capsys):
    with pytest.raises(SystemExit):
        rounding.parse(["--runs", "theirs:1"])
    assert "expected fp32, nearest, ours, got theirs" in capsys.readouterr().err
