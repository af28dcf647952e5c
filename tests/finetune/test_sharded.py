"""FSDP2 and ZeRO-3 on two processes: parameters really are sharded, and losses are those of one process."""

import importlib.util
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import sharded_steps

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def _child(rank: int, processes: int, mode: str, first: int, last: int, folder: Path, output: Path) -> None:
    os.environ |= {"TRITON_INTERPRET": "0", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    sys.stdout = sys.stderr = open(f"{output}.{rank}.txt", "w", encoding="utf-8", buffering=1)
    try:
        result = sharded_steps.run(mode, range(first, last + 1), folder, rank, processes, f"{output}.rendezvous")
        if rank == 0:
            output.write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def steps(mode: str, processes: int, first: int, last: int, folder: Path) -> dict:
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.gpt_oss.modeling_gpt_oss  # noqa: F401

    output = folder.with_name(f"{mode}-{processes}-{first}")
    fork = multiprocessing.get_context("fork")  # what is imported above need not be imported again
    arguments = (processes, mode, first, last, folder, output)
    children = [fork.Process(target=_child, args=(rank, *arguments)) for rank in range(processes)]
    for child in children:
        child.start()
    for rank, child in enumerate(children):
        child.join(300)
        if child.exitcode != 0:
            for other in children:
                other.kill()
            pytest.fail(f"process {rank}: {Path(f'{output}.{rank}.txt').read_text()[-4000:]}")
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return steps("one", 1, 1, 4, tmp_path_factory.mktemp("one") / "checkpoint")


def check(found: dict, one: dict, first: int = 1) -> None:
    assert found["losses"] == pytest.approx(one["losses"][first - 1 :][: len(found["losses"])], abs=1e-5)
    assert found["total"] == one["total"]


def test_one_process_learns(one):
    assert len(set(one["losses"])) == 4 and one["again"] < one["losses"][0] - 0.1


def test_fsdp2(one, tmp_path):
    """Saved by two processes, resumed by one, whose checkpoint two resume again."""
    found = steps("fsdp2", 2, 1, 2, tmp_path / "checkpoint")
    check(found, one)
    assert found["local"] < 0.6 * found["total"]
    check(steps("one", 1, 3, 3, tmp_path / "checkpoint"), one, first=3)
    check(steps("fsdp2", 2, 4, 4, tmp_path / "checkpoint"), one, first=4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed would take the GPU")
def test_zero3(one, tmp_path):
    found = steps("zero3", 2, 1, 2, tmp_path / "checkpoint")
    check(found, one)
    assert found["local"] < 0.6 * found["total"]
    check(steps("zero3", 2, 3, 4, tmp_path / "checkpoint"), one, first=3)
