"""benchmarks/node.py's workers in two processes without a GPU, sharded as on a node; its tables and its figure."""

import json
import socket
import sys

import psutil
import pytest
import torch
from test_sharded import ROOT, deepspeed, forked, sharded_run

from benchmarks import harness, node, readme

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def _join(engine, mixed_precision, port, rank):
    launched = sharded_run.variables(ROOT / "configs" / f"{engine}.yaml", 2, mixed_precision)
    sharded_run.join(launched, rank, 2, port)


def _measure(job, engine, mixed_precision, port, rank):
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # a CPU computes in bf16 as well
    _join(engine, mixed_precision, port, rank)
    node.measure(job)
    return {}


def _losses(job, engine, port, rank):
    if engine is not None:
        _join(engine, "no", port, rank)
    node.losses(job)
    return {}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def job(folder, engine: str, output, **more) -> dict:
    keys = {
        "model_name_or_path": "gpt-oss-tiny", "model_init": "random", "num_processes": 2, "max_length": 48,
        "max_steps": 4, "bf16": str(engine == "zero3").lower(),
    }  # fmt: skip
    row = {"engine": engine, "stack": "ours", "states": "bf16", "model": "gpt-oss-tiny", "gpus": 2, "steps": 1}
    argv = node.command_line(str(folder), **keys | more)
    return {"argv": argv, "lengths": [32, 48], "steps": 2, "states": "bf16", "row": row, "output": str(output)}


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=deepspeed)])
def test_measured_rows(engine, tmp_path):
    """bf16 weights, gradients and moments, random weights, two lengths in one run."""
    output = tmp_path / "node.csv"
    given = job(tmp_path / "run", engine, output) | {"file": str(tmp_path / "job")}
    forked(2, tmp_path / "result", _measure, given, engine, "no" if engine == "fsdp2" else "bf16", free_port())
    rows = harness.read_rows(output)
    assert [(row["tokens"], row["outcome"]) for row in rows] == [("32", node.MEASURED), ("48", node.MEASURED)]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(7.4, abs=0.3)  # log(1,536) of nothing learnt
        speed = 1e3 * int(row["tokens"]) / float(row["step_ms"])
        assert float(row["tokens_per_second_per_gpu"]) == pytest.approx(speed, rel=1e-3, abs=0.06)


def test_out_of_memory_is_a_row(tmp_path, monkeypatch):
    output = tmp_path / "node.csv"

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(node, "train", full)
    ends = []
    monkeypatch.setattr(node.os, "_exit", ends.append)
    given = job(tmp_path, "fsdp2", output) | {"file": str(tmp_path / "job")}
    node.measure(given)
    node.measure(given)  # as another process would
    (row,) = harness.read_rows(output)
    assert (row["tokens"], row["outcome"], row["step_ms"]) == ("32", node.NO_MEMORY, "") and ends == [1, 1]


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def wrong(*args):
        raise ValueError("a mistake")

    monkeypatch.setattr(node, "train", wrong)
    with pytest.raises(ValueError, match="a mistake"):
        node.measure(job(tmp_path, "fsdp2", tmp_path / "node.csv") | {"file": str(tmp_path / "job")})
    assert not (tmp_path / "node.csv").exists()


def test_losses_of_two_processes_are_those_of_one(tmp_path):
    found = []
    for processes, engine in ((1, None), (2, "fsdp2")):
        keys = node.SMALL | {"model_name_or_path": ROOT / node.SMALL["model_name_or_path"], "max_steps": 2}
        keys |= {"num_processes": processes, "gradient_accumulation_steps": 2 // processes}
        keys |= {"use_cpu": "true"} if engine is None else {}
        output = tmp_path / f"losses-{processes}"
        given = {"argv": node.command_line(str(tmp_path / "run"), **keys), "lengths": [40, 70, 30, 55]}
        given |= {"states": "fp32", "output": str(output)}
        forked(processes, tmp_path / f"result-{processes}", _losses, given, engine, free_port())
        found.append(json.loads(output.read_text()))
    assert len(found[0]) == 2 and found[0][0][0] != found[0][1][0]
    found = node.differences(*found)
    assert found["max_relative_difference"] < 1e-5 and found["max_relative_difference_grad_norm"] < 1e-4


def test_a_launch_that_does_not_end_is_ended(tmp_path, monkeypatch):
    """The launcher's own child too."""
    monkeypatch.setattr(node, "GRACE", 0.5)
    pid = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    assert node.launch([sys.executable, "-c", parent], 3) is None
    pid = int(pid.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody may reap it
    assert node.launch([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def rows() -> list[dict[str, str]]:
    base = dict.fromkeys(node.COLUMNS, "") | {
        "engine": "fsdp2", "stack": "ours", "states": "bf16", "model": "gpt-oss-20b", "gpus": "2", "tokens": "4096",
        "outcome": node.MEASURED, "tokens_per_second_per_gpu": "8000.5", "peak_gib": "90.25", "gpu": "GPU A",
        "torch": "2.11", "triton": "3.6", "transformers": "5.17", "accelerate": "1.15", "deepspeed": "0.19",
        "date": "2026-01-02", "commit": "abc",
    }  # fmt: skip
    failed = {"stack": "stock", "tokens": "8192", "outcome": node.NO_MEMORY, "tokens_per_second_per_gpu": ""}
    return [base, base | failed | {"peak_gib": ""}]


def test_table_and_figure():
    table = readme.node_table(rows())
    assert "2 × GPU A" in table and "| gptoss_kernels, FSDP2 | 8,000, 90.2 | – |" in table
    assert "| eager attention, grouped_mm, FSDP2 | – | out of memory |" in table
    assert readme.node_table([]) == ""
    (axes,) = node.draw(rows()).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[8000.5]]
    with pytest.raises(ValueError, match="got none"):
        node.draw([])


def test_stored_rows_have_todays_columns():
    for path, columns in ((readme.NODE, node.COLUMNS), (node.LOSSES, node.LOSS_COLUMNS)):
        stored = harness.read_rows(path)
        assert all(tuple(row) == columns and not row["gpu"].startswith("none") for row in stored)


@pytest.mark.parametrize("line, named", [("--engines ddp", "--engines"), ("--steps 1", "--steps"), ("", "--gpus")])
def test_wrong_options_are_named(line, named, capsys):
    with pytest.raises(SystemExit):
        node.parse(f"--gpus 1 {line}".split())
    assert named in capsys.readouterr().err
