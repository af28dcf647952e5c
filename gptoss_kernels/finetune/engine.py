"""Which engine spreads a run's weights over its processes, and whether it really does.

Accelerate chooses by what it finds: without a GPU, or without its launcher, it runs unsharded and says nothing.
"""

import os

import torch
from accelerate.utils import str_to_bool
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .errors import SetupError

FSDP, DEEPSPEED = "FSDP", "DEEPSPEED"  # as Accelerate's DistributedType has them


def _set(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def asked_for(training) -> str | None:
    """FSDP or DEEPSPEED, if `accelerate launch` (by its variables) or the run's own settings ask for one."""
    if training.fsdp or _set("ACCELERATE_USE_FSDP"):
        return FSDP
    if training.deepspeed or _set("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    return None


def check_hardware(training) -> None:
    """Raises ValueError where an engine is asked for and there is no GPU for it; before anything is set up."""
    engine = asked_for(training)
    if engine is not None and (training.use_cpu or _set("ACCELERATE_USE_CPU") or not torch.cuda.is_available()):
        raise ValueError(
            f"distributed_type: {engine} shards on GPUs alone, and this run is on the CPU, where Accelerate would "
            "train without it; start it without `accelerate launch --config_file ...`"
        )


def check_engine(training) -> None:
    """Raises SetupError where another engine is in effect than the one that is asked for; before weights are loaded."""
    engine, found = asked_for(training), training.distributed_state.distributed_type.value
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if training.world_size != running:
        raise SetupError(
            f"num_processes: {running} run, each alone: Accelerate joins them on GPUs, or on the CPU with use_cpu"
        )
    # Accelerate calls FSDP MULTI_GPU until its Accelerator is there.
    if engine is not None and found not in (engine, *(["MULTI_GPU"] if engine == FSDP else [])):
        raise SetupError(
            f"distributed_type: {engine} was asked for, and Accelerate runs {found}; start with `accelerate launch "
            "--config_file configs/fsdp2.yaml sft.py ...` or configs/zero3.yaml"
        )


def is_sharded(training) -> bool:
    """Whether the weights will be spread over the processes."""
    engine = asked_for(training)
    return engine == FSDP or engine == DEEPSPEED and training.deepspeed_plugin.zero_stage == 3


def receives_weights(training) -> bool:
    """Whether FSDP2 sends this process its weights from the first one, so that it has to read none itself."""
    efficient = _set("FSDP_CPU_RAM_EFFICIENT_LOADING") and os.environ.get("FSDP_VERSION") == "2"
    return asked_for(training) == FSDP and efficient and training.process_index > 0


def numel(p: torch.Tensor) -> int:
    """Elements of a parameter on all processes together."""
    return getattr(p, "ds_numel", p.numel())  # ZeRO-3 leaves an empty tensor where it keeps a part elsewhere


def local_elements(p: torch.Tensor) -> int | None:
    """Elements of a parameter that this process keeps, if FSDP2 or ZeRO-3 shards it; else None."""
    if isinstance(p, DTensor):
        return p.to_local().numel() if any(place.is_shard() for place in p.placements) else None
    return p.ds_tensor.numel() if hasattr(p, "ds_tensor") else None


def check_sharding(model: torch.nn.Module, processes: int) -> None:
    """Raises SetupError unless every trained parameter is sharded, and each of several processes keeps a part alone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    whole = [name for name, p in trained if local_elements(p) is None]
    if whole:
        raise SetupError(f"distributed_type: {len(whole)} parameters are not sharded ({', '.join(whole[:3])}, ...)")
    kept = sum(local_elements(p) for _, p in trained)
    total = sum(numel(p) for _, p in trained)
    if processes > 1 and kept > 0.9 * total:
        raise SetupError(
            f"distributed_type: expected parameters spread over {processes} processes, and this one keeps {kept:,} of "
            f"{total:,} elements"
        )


class Sharding(TrainerCallback):
    """Stops a run before its first step if weights that should be sharded are not."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if is_sharded(args):
            check_sharding(model, args.world_size)
