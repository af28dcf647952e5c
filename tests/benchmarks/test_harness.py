"""Rows, percentiles, provenance and timing of the benchmarks' shared module."""

import subprocess
import time

import pytest
import torch

from benchmarks import harness
from gptoss_kernels.provenance import commit

CPU = torch.device("cpu")


def test_rows_round_trip(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    harness.append_rows(path, ("a", "b"), [{"a": 1.5, "b": None}])
    harness.append_rows(path, ("a", "b"), [{"b": "x, y", "a": 2}])
    assert path.read_text() == 'a,b\n1.5,\n2,"x, y"\n'
    assert harness.read_rows(path) == [{"a": "1.5", "b": ""}, {"a": "2", "b": "x, y"}]
    assert harness.read_rows(tmp_path / "absent.csv") == []


def test_rows_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    harness.append_rows(path, ("a", "b"), [{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match=r"rows.csv: expected the columns \['a', 'c'\], got \['a', 'b'\]"):
        harness.append_rows(path, ("a", "c"), [{"a": 1, "c": 2}])
    with pytest.raises(ValueError, match=r"rows: expected the columns \['a', 'b'\], got \['a'\]"):
        harness.append_rows(path, ("a", "b"), [{"a": 1}])
    assert path.read_text() == "a,b\n1,2\n"


def test_percentiles():
    assert harness.percentiles([5, 1, 2, 4, 3, 6]) == (3.5, 2.0, 5.0)


def test_times_are_interleaved_and_inputs_rotate():
    order = []

    def slow(n):
        order.append(("slow", n))
        time.sleep(0.02)

    calls = {"slow": slow, "fast": lambda n: order.append(("fast", n))}
    times = harness.time_interleaved(calls, CPU, rounds=3, warmup=1)
    assert order == [(name, 2 * index + at) for index in range(4) for at, name in enumerate(calls)]
    assert [len(values) for values in times.values()] == [3, 3]
    assert min(times["slow"]) >= 20 > max(times["fast"])


def test_memory_is_not_made_up_on_a_cpu():
    assert harness.peak_extra_gib(lambda: None, CPU) is None


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    device = torch.device("cuda")
    kept = torch.empty(2**28, dtype=torch.uint8, device=device)
    got = harness.peak_extra_gib(lambda: torch.empty(2**27, dtype=torch.uint8, device=device), device)
    assert kept.numel() and got == pytest.approx(0.125, abs=0.001)


def test_provenance(monkeypatch):
    monkeypatch.setenv("GPTOSS_COMMIT", "abc123")
    found = harness.provenance(CPU)
    assert found["gpu"].startswith("none: CPU")  # so that no CPU row passes for a GPU's
    assert found["commit"] == "abc123" and found["torch"] == torch.__version__


def test_commit_without_git(monkeypatch):
    monkeypatch.delenv("GPTOSS_COMMIT", raising=False)

    def fail(*args, **kwargs):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert commit() == "unknown"


def test_table():
    rows = [{"name": "a", "ms": 1.23456}, {"name": "longer", "ms": None}]
    assert harness.table(("name", "ms"), rows) == "  name     ms\n     a  1.235\nlonger      -"
