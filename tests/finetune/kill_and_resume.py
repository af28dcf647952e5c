"""Kill runs of sft.py at random moments, resume each, and compare with a run that nothing happened to.

    python tests/finetune/kill_and_resume.py [--kills 20] [--in_saves 8]

All weights of data/tiny-gpt-oss in bf16, on the CPU. A run is killed by SIGKILL, in a step or while it saves, as often
as asked for; the folder that a save leaves unfinished tells which it was. Resumed, it must have the losses of every
step, and the weights, of the undisturbed run, bit by bit.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "config": ROOT / "configs" / "sft_tiny.yaml", "model_name_or_path": ROOT / "data" / "tiny-gpt-oss",
    "dataset_name": ROOT / "data" / "reasoning", "use_peft": "false", "dtype": "bfloat16",
    "optim": "adamw_8bit_sr_in_backward", "optim_args": "min_size=4096", "max_grad_norm": 0, "learning_rate": 1e-4,
    "gradient_accumulation_steps": 1, "max_steps": 12, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "eval_on_start": "false", "eval_strategy": "no", "overwrite": "false", "logging_steps": 1,
    "sample_tokens": 1, "disable_tqdm": "true",
}  # fmt: skip


def _child(keys: dict, folder: Path, started) -> None:
    import torch
    from transformers import TrainerCallback

    from gptoss_kernels.finetune.config import parse
    from gptoss_kernels.finetune.train import run

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder.with_suffix(".txt"), "a", encoding="utf-8", buffering=1)

    class Started(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            started.set()

    try:
        run(parse([f"--{key}={value}" for key, value in keys.items()]), callbacks=(Started(),))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Runs:
    """Runs of the same settings: one to compare with, and others to kill."""

    def __init__(self, keys: dict, folder: Path):
        self.keys, self.folder = keys, folder
        self.fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again
        began = time.perf_counter()
        process = self.start("whole")
        self.steps_began = time.perf_counter()
        self.saves = []  # seconds that each save took
        while process.is_alive():
            if self.saving("whole"):
                seen = time.perf_counter()
                while self.saving("whole"):
                    time.sleep(0.0005)
                self.saves.append(time.perf_counter() - seen)
            time.sleep(0.0005)
        self.seconds = time.perf_counter() - self.steps_began
        self.join("whole", process)
        self.want = self.result("whole")
        print(f"undisturbed: {self.steps_began - began:.1f} s to the first step, {self.seconds:.1f} s from there, "
              f"{len(self.saves)} saves of {1e3 * min(self.saves):.0f} to {1e3 * max(self.saves):.0f} ms")  # fmt: skip

    def saving(self, name: str) -> bool:
        return (self.folder / name / "_unfinished").is_dir()

    def start(self, name: str, **keys):
        """A process whose run has begun its first step, or has ended."""
        started = self.fork.Event()
        keys = self.keys | {"output_dir": self.folder / name} | keys
        process = self.fork.Process(target=_child, args=(keys, self.folder / name, started))
        process.start()
        while process.is_alive() and not started.wait(0.05):
            pass
        return process

    def join(self, name: str, process) -> None:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{name}: {(self.folder / name).with_suffix('.txt').read_text()[-3000:]}")

    def result(self, name: str) -> tuple:
        folder = self.folder / name
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]
        return losses, (folder / "model.safetensors").read_bytes()

    def kill(self, name: str, in_save: bool, draw: random.Random) -> dict:
        """Kills one run, resumes it, and says where it was and whether its result is the undisturbed run's."""
        process = self.start(name)
        if in_save:
            for _ in range(draw.randrange(len(self.saves))):  # pass over some saves
                self.wait_for(name, process, True)
                self.wait_for(name, process, False)
            self.wait_for(name, process, True)
            time.sleep(draw.random() * min(self.saves))
        else:
            time.sleep(draw.random() * 0.9 * self.seconds)
        process.kill()
        process.join()
        was_saving, killed = self.saving(name), process.exitcode == -9
        found = sorted(p.name for p in (self.folder / name).glob("checkpoint-*"))
        keys = {"resume_from_checkpoint": "true"} if found else {}
        self.join(name, self.start(name, **keys))
        losses, weights = self.result(name)
        return {"killed": killed, "in_save": was_saving, "checkpoints": found,
                "same_losses": losses == self.want[0], "same_weights": weights == self.want[1]}  # fmt: skip

    def wait_for(self, name: str, process, saving: bool) -> None:
        while process.is_alive() and self.saving(name) is not saving:
            time.sleep(0.0002)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in_saves", type=int, default=8, help="of them aimed at saves")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)
    import gptoss_kernels.finetune.train  # noqa: F401  (once, for all processes)

    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(KEYS, Path(folder))
        outcomes = []
        for number in itertools.count():
            outcome = runs.kill(f"run{number}", len(outcomes) < options.in_saves, draw)
            if outcome.pop("killed"):  # else it had ended before
                outcomes.append(outcome)
                print(f"{len(outcomes):3d}  {outcome}", flush=True)
            if len(outcomes) == options.kills:
                break
    right = sum(o["same_losses"] and o["same_weights"] for o in outcomes)
    in_save = sum(o["in_save"] for o in outcomes)
    print(f"{right} of {len(outcomes)} with the undisturbed run's losses and weights; {in_save} were killed in a save")
    return 0 if right == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
