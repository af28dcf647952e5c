"""Training steps of a small gpt-oss with our attention and experts, in one process or sharded over several."""

from pathlib import Path

import torch
import torch.distributed as dist
from sharded_run import without_cpp
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gptoss_kernels import patch_gpt_oss
from gptoss_kernels.finetune.engine import check_sharding
from gptoss_kernels.testing import random_gpt_oss

ROWS, LENGTH, RATE = 4, 40, 1e-3


def batch(step: int) -> torch.Tensor:
    """(rows, length) token ids of a step."""
    return torch.randint(0, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def share(ids: torch.Tensor) -> torch.Tensor:
    each = ROWS // dist.get_world_size()
    return ids[dist.get_rank() * each :][:each]


def mean(loss: torch.Tensor) -> float:
    total = loss.detach().double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def plain_or_fsdp2(mode: str, model, steps: range, source: Path, target: Path) -> dict:
    spread = {}
    if mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor) and p.placements == (Shard(0),), name
        check_sharding(model, dist.get_world_size())
        spread = {"local": sum(p.to_local().numel() for p in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    if steps[0] > 1:
        states = get_state_dict(model, optimizer)
        load({"model": states[0], "optimizer": states[1]}, checkpoint_id=source)
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    losses = []
    for step in steps:
        loss = loss_of(model, share(batch(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    with torch.no_grad():
        again = mean(loss_of(model, share(batch(1))))
    states = get_state_dict(model, optimizer)
    save({"model": states[0], "optimizer": states[1]}, checkpoint_id=target)
    return {"losses": losses, "again": again, "total": sum(p.numel() for p in model.parameters())} | spread


def zero3(model, steps: range, source: Path, target: Path) -> dict:
    without_cpp()
    import deepspeed

    total = sum(p.numel() for p in model.parameters())
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default is 1.0
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for name, p in engine.module.named_parameters():
        assert p.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel // dist.get_world_size()), name
    check_sharding(engine.module, dist.get_world_size())
    local = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    if steps[0] > 1:
        engine.load_checkpoint(str(source))
    losses = []
    for step in steps:
        loss = loss_of(engine, share(batch(step)))
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    engine.save_checkpoint(str(target))
    return {"losses": losses, "total": total, "local": local}


def run(mode: str, steps: range, source: Path, target: Path, rank: int, processes: int, rendezvous: str) -> dict:
    """Takes steps, from the checkpoint in source if the first is not 1, and saves another in target.

    Args:
        mode: "one" or "fsdp2", whose checkpoints any number of processes resume, or "zero3".
        steps: their numbers, from 1.
        rendezvous: a file by which the processes find each other.

    Returns:
        losses over all rows, the number of parameters and how many of them this process holds.
    """
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    kernels = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    model = patch_gpt_oss(random_gpt_oss(num_hidden_layers=2, seed=7, **kernels)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result = (
        zero3(model, steps, source, target) if mode == "zero3" else plain_or_fsdp2(mode, model, steps, source, target)
    )
    dist.barrier()
    return result
