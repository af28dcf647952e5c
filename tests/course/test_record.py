"""Figures are measured on a GPU or read from records, never made up, and say which of the two they are."""

import pytest
import torch

from gptoss_kernels.course import record
from gptoss_kernels.course.env import Environment

CPU = Environment("interpreter", torch.device("cpu"), torch.float32, "CPU", None)
ROWS = [
    {"tokens": 4096, "what": "ours", "ms": 0.25, "gib": None},
    {"tokens": 8192, "what": "a, b", "ms": 1.5, "gib": 3},
]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.delenv("GPTOSS_RECORD", raising=False)
    monkeypatch.setenv("GPTOSS_COMMIT", "abc1234")


def fail():
    raise AssertionError("measured without a GPU")


def test_a_record_comes_back_as_it_was(monkeypatch, capsys):
    monkeypatch.setenv("GPTOSS_RECORD", "1")
    measured = record.measured("99_subject", CPU, lambda: ROWS)
    assert "measured here on none: CPU" in capsys.readouterr().out
    monkeypatch.delenv("GPTOSS_RECORD")
    assert record.measured("99_subject", CPU, fail) == measured
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("recorded on none: CPU") and shown[0].endswith("commit abc1234")
    assert shown[1].split() == ["tokens", "what", "ms", "gib"]
    assert shown[2].split() == ["4,096", "ours", "0.25", "-"]


def test_without_gpu_and_record():
    with pytest.raises(FileNotFoundError, match="99_subject: there is no GPU here to measure on and no record"):
        record.measured("99_subject", CPU, fail)


@pytest.mark.parametrize("rows", [[], [{"a": 1}, {"b": 2}]])
def test_rows_must_be_alike(monkeypatch, rows):
    monkeypatch.setenv("GPTOSS_RECORD", "1")
    with pytest.raises(ValueError, match="measure: expected rows with the same columns"):
        record.measured("99_subject", CPU, lambda: rows)


@pytest.mark.gpu
def test_a_gpu_measures_and_keeps_nothing(tmp_path, capsys):
    device = torch.device("cuda")
    rows = record.measured("99_subject", Environment("gpu", device, torch.bfloat16, "GPU", None), lambda: ROWS)
    assert rows[0]["gpu"] == torch.cuda.get_device_name() and not list(tmp_path.iterdir())
    assert "measured here on NVIDIA" in capsys.readouterr().out


def test_results_of_the_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "course")
    (tmp_path / "steps.csv").write_text("variant,tokens,ms,commit\nours:lean,8192,1.5,123456\neager,4096,,abc\n")
    first, second = record.results("steps")
    assert first == {"variant": "ours:lean", "tokens": 8192, "ms": 1.5, "commit": "123456"} and second["ms"] is None
    assert record.results("steps", tokens=4096) == [second]
    with pytest.raises(ValueError, match="tokens"):
        record.results("steps", tokens=1)
    with pytest.raises(FileNotFoundError):
        record.results("nothing")
