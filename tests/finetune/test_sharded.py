"""FSDP2 and ZeRO-3 on several processes: parameters really are sharded, and losses are those of one process."""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import sharded_run
import sharded_steps

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or torch.cuda.is_available(),
    reason="deepspeed is not installed, or would take the GPU",
)


def _child(rank: int, run, arguments: tuple, output: Path) -> None:
    os.environ |= {"TRITON_INTERPRET": "0", "DS_ACCELERATOR": "cpu"}
    sys.stdout = sys.stderr = open(f"{output}.{rank}.txt", "w", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)  # OpenMP's other threads did not survive the fork, and would be waited for
    try:
        result = run(*arguments, rank)
        if rank == 0:
            output.write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def forked(processes: int, output: Path, run, *arguments) -> dict:
    """What run(*arguments, rank) gives in the first of several processes."""
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.gpt_oss.modeling_gpt_oss  # noqa: F401

    import gptoss_kernels.finetune.train  # noqa: F401

    fork = multiprocessing.get_context("fork")  # what is imported above need not be imported again
    children = [fork.Process(target=_child, args=(rank, run, arguments, output)) for rank in range(processes)]
    for child in children:
        child.start()
    for rank, child in enumerate(children):
        child.join(300)
        if child.exitcode != 0:
            for other in children:
                other.kill()
            pytest.fail(f"process {rank}: {Path(f'{output}.{rank}.txt').read_text()[-4000:]}")
    return json.loads(output.read_text())


# ------------------------------------------------------------------------------------------------- the engines alone


def _steps(mode, processes, first, last, source, target, rendezvous, rank):
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    return sharded_steps.run(mode, range(first, last + 1), source, target, rank, processes, rendezvous)


def steps(mode: str, processes: int, first: int, last: int, source: Path, target: Path) -> dict:
    output = target.with_name(f"{mode}-{processes}-{first}")
    return forked(processes, output, _steps, mode, processes, first, last, source, target, f"{output}.rendezvous")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "checkpoint"
    return steps("one", 1, 1, 4, folder, folder)


def check(found: dict, one: dict, first: int = 1) -> None:
    assert found["losses"] == pytest.approx(one["losses"][first - 1 :][: len(found["losses"])], abs=1e-5)
    assert found["total"] == one["total"]


def test_one_process_learns(one):
    assert len(set(one["losses"])) == 4 and one["again"] < one["losses"][0] - 0.1


def test_fsdp2(one, tmp_path):
    """Saved by two processes, resumed by one and by four, whose checkpoint an unsharded model resumes."""
    two, four = tmp_path / "two", tmp_path / "four"
    found = steps("fsdp2", 2, 1, 2, two, two)
    check(found, one)
    assert found["local"] < 0.6 * found["total"]
    check(steps("fsdp2", 1, 3, 4, two, tmp_path / "alone"), one, first=3)
    found = steps("fsdp2", 4, 3, 3, two, four)
    check(found, one, first=3)
    assert found["local"] < 0.35 * found["total"]
    check(steps("one", 1, 4, 4, four, tmp_path / "last"), one, first=4)


def _zero3(folder, rendezvous, rank):
    """Two steps and a save, and two more with a new engine, in the same processes: importing DeepSpeed takes long."""
    return [_steps("zero3", 2, first, first + 1, folder, folder, rendezvous, rank) for first in (1, 3)]


@deepspeed
def test_zero3(one, tmp_path):
    found, resumed = forked(2, tmp_path / "zero3", _zero3, tmp_path / "checkpoint", tmp_path / "rendezvous")
    check(found, one)
    assert found["local"] < 0.6 * found["total"]
    check(resumed, one, first=3)


# ---------------------------------------------------------------------------------- runs as accelerate launches them


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory) -> Path:
    """A small random model that from_pretrained loads."""
    from gptoss_kernels.finetune.model import build_random, load_config

    folder = tmp_path_factory.mktemp("model")
    build_random(load_config(shapes, random=True), "cpu", torch.float32, seed=42).save_pretrained(folder)
    return folder


def keys(checkpoint: Path, dataset: str, folder: Path, processes: int, **more) -> list[str]:
    found = {
        "config": ROOT / "configs" / "sft_full.yaml", "model_name_or_path": checkpoint, "tokenizer_name":
        ROOT / "data" / "tokenizer", "dataset_name": dataset, "output_dir": folder, "num_processes": processes,
        "per_device_train_batch_size": 2 // processes, "max_length": 384, "dtype": "float32", "bf16": "false",
        "max_steps": 3, "logging_steps": 1, "learning_rate": 3e-3, "warmup_steps": 0, "save_strategy": "steps",
        "save_steps": 2, "report_to": "none", "disable_tqdm": "true",
    } | more  # fmt: skip
    return [f"--{key}={value}" for key, value in found.items()]


def _alone(argv, rank):
    from gptoss_kernels.finetune import train
    from gptoss_kernels.finetune.config import parse

    train.run(parse(argv))
    return {}


@pytest.fixture(scope="module")
def alone(checkpoint, dataset, tmp_path_factory) -> tuple[list, dict]:
    """Losses by step and the weights of an unsharded run."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    argv = keys(checkpoint, dataset, folder, 1, use_cpu="true", save_strategy="no")
    forked(1, folder.with_name("alone"), _alone, argv)
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]
    return losses, load_file(folder / "model.safetensors")


def launch(file: str, processes: int, argv: list[str], folder: Path) -> dict:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = sharded_run.variables(ROOT / "configs" / file, processes, "no")
    return forked(processes, folder.with_name(f"{folder.name}-{processes}"), _launched, argv, launched, processes, port)


def _launched(argv, launched, processes, port, rank):
    return sharded_run.run(argv, launched, rank, processes, port)


def check_run(found: dict, folder: Path, alone: tuple[list, dict]) -> None:
    losses, weights = alone
    for a, b in zip(found["losses"], losses, strict=True):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-5) and a[2] == pytest.approx(b[2], rel=1e-4)
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(weights)
    for name, x in saved.items():
        assert x.dtype == weights[name].dtype
        torch.testing.assert_close(x, weights[name], rtol=0, atol=2e-4, msg=name)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def _merge(argv, rank):
    from accelerate.commands.merge import merge_command, merge_command_parser

    merge_command(merge_command_parser().parse_args(argv))  # what `accelerate merge-weights` calls
    return {}


def test_a_run_under_fsdp2(checkpoint, dataset, alone, tmp_path):
    """Its checkpoints are sharded, another number of processes resumes them, `accelerate merge-weights` makes models
    of them; its result is whole."""
    folder = tmp_path / "run"
    found = launch("fsdp2.yaml", 2, keys(checkpoint, dataset, folder, 2), folder)
    check_run(found, folder, alone)
    assert found["kept"] < 0.6 * found["total"] and found["read"] == [1, 0]
    assert not list(folder.glob("checkpoint-*/*.safetensors"))
    assert len(list((folder / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2

    place = folder / "checkpoint-3"
    forked(1, tmp_path / "merge", _merge, [str(place / "pytorch_model_fsdp_0"), str(place)])
    merged, whole = loaded(place), load_file(folder / "model.safetensors")
    assert all(torch.equal(merged[name], whole[name]) for name in whole)

    (folder / "model.safetensors").unlink()
    resumed = keys(checkpoint, dataset, folder, 1, resume_from_checkpoint=folder / "checkpoint-2")
    check_run(launch("fsdp2.yaml", 1, resumed, folder), folder, alone)


@deepspeed
def test_a_run_under_zero3(checkpoint, dataset, alone, tmp_path):
    """Its checkpoints hold a whole model beside DeepSpeed's files."""
    folder = tmp_path / "run"
    found = launch("zero3.yaml", 2, keys(checkpoint, dataset, folder, 2, save_steps=3), folder)
    check_run(found, folder, alone)
    assert found["kept"] < 0.6 * found["total"]
    saved, whole = loaded(folder / "checkpoint-3"), load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], whole[name]) for name in whole)


@pytest.mark.parametrize("file", ["fsdp2.yaml", pytest.param("zero3.yaml", marks=deepspeed)])
def test_a_run_from_random_weights(file, shapes, dataset, alone, tmp_path):
    """It begins with the weights that one process makes of the same seed, those of `checkpoint`."""
    folder = tmp_path / "run"
    argv = keys(shapes, dataset, folder, 2, model_init="random", save_strategy="no")
    found = launch(file, 2, argv, folder)
    check_run(found, folder, alone)
    assert found["kept"] < 0.6 * found["total"]
