"""Runs of sft.py's trainer as `accelerate launch --config_file` starts them, in forked processes without a GPU.

Accelerate shards on GPUs alone: here it is told that the CPU is one. All else is what a node runs: the variables of the
launcher from the file in configs/, fully_shard or DeepSpeed, checkpoints, resumption, the saved model.
"""

import importlib
import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def variables(config: Path, processes: int, mixed_precision: str) -> dict[str, str]:
    """What `accelerate launch` sets for a file of its settings."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    argv = ["--config_file", str(config), "--num_processes", str(processes), "--mixed_precision", mixed_precision]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*argv, "sft.py"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    before = dict(os.environ)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if before.get(name) != value}


def join(launched: dict[str, str], rank: int, processes: int, port: int) -> None:
    """Makes this process one of those that the launcher has started."""
    os.environ |= launched | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_TORCH_DEVICE": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from gptoss_kernels.finetune import engine

    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    engine.check_hardware = lambda training: None
    if "ACCELERATE_USE_DEEPSPEED" in launched:
        without_cpp()


def run(argv: list[str], launched: dict[str, str], rank: int, processes: int, port: int) -> dict:
    """One process of a run. Gives (step, loss, gradient norm) by step, how many elements it kept of
    how many, and how often each process read the checkpoint."""
    join(launched, rank, processes, port)
    from transformers import TrainerCallback

    from gptoss_kernels.finetune import engine, train
    from gptoss_kernels.finetune.config import parse

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            parameters = list(model.parameters())
            self.kept = sum(engine.local_elements(p) for p in parameters)
            self.total = sum(map(engine.numel, parameters))

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.history = [entry for entry in state.log_history if "loss" in entry]

    read, load = [], train.load_checkpoint
    train.load_checkpoint = lambda *args, **kwargs: read.append(args) or load(*args, **kwargs)
    watch = Watch()
    train.run(parse(argv), callbacks=(watch,))
    losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in watch.history]
    counts = [None] * processes
    torch.distributed.all_gather_object(counts, len(read))
    return {"losses": losses, "kept": watch.kept, "total": watch.total, "read": counts}


def without_cpp() -> None:
    """DeepSpeed without the C++ that it would compile for minutes to be faster than gloo; a build that was killed
    leaves a lock that the next one waits for without end."""
    # Not deepspeed.comm.torch, which is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
