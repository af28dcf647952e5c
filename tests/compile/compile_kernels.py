"""Compile every kernel of the package for every architecture and print one JSON row each. A process of its own, run
by test_offline.py: the kernels must not have been decorated for the interpreter.

usage: compile_kernels.py CAPABILITY...
"""

import dataclasses
import importlib
import json
import pkgutil
import sys

import torch
import triton

import gptoss_kernels
from gptoss_kernels.adamw import step
from gptoss_kernels.attention import tiles
from gptoss_kernels.offline import compile_offline, descriptor

ATTENTION = {"forward_kernel": "forward", "dkdv_kernel": "dkdv", "dq_kernel": "dq"}
HOPPER = {"forward_hopper_kernel", "dkdv_hopper_kernel", "dq_hopper_kernel"}
LAYERS = {"rms_norm_kernel", "rms_norm_backward_kernel", "rope_kernel", "cross_entropy_kernel"}
MXFP4 = {"dequantize_kernel"}
ADAMW = {"adamw_kernel"}
EXPERTS = {
    "activation_kernel", "combine_kernel", "activation_backward_kernel", "expert_sum_kernel", "add_low_rank_kernel",
}  # fmt: skip
NUMBERS = ("q_heads", "kv_heads", "q_len", "kv_len", "window", "documents", "search_steps", "batches", "blocks")
FEATURES = {
    "full": {},
    "window": {"HAS_WINDOW": True, "SPLIT": False},
    "packed": {"PACKED": True},
    "padded": {"PADDED": True},
}


def package_kernels() -> dict:
    """Every @triton.jit function of the package whose name ends in _kernel."""
    found = {}
    for module in pkgutil.walk_packages(gptoss_kernels.__path__, "gptoss_kernels."):
        if module.name.split(".")[1] not in ("adamw", "attention", "experts", "layers", "mxfp4"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


def attention_arguments(
    kernel, tile: tiles.Tile, head_dim: int, dtype: torch.dtype, features: dict, notify: bool
) -> dict:
    constants = dict(
        GROUP=8, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, HEADS=tile.heads,
        HAS_SINKS=True, HAS_DLSE=False, EVEN_ROWS=True,
        HAS_WINDOW=False, PACKED=False, PADDED=False, SPLIT=True, NOTIFY=notify,
    ) | features  # fmt: skip
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = constants[name]
        elif name in ("lse", "dlse", "scratch"):
            arguments[name] = torch.float32
        elif name == "cu_seqlens":
            arguments[name] = torch.int32 if constants["PACKED"] else None
        elif name == "padding":
            arguments[name] = torch.bool if constants["PADDED"] else None
        elif name in ("scale", "qk_scale"):
            arguments[name] = "fp32"
        elif name.startswith("stride"):
            arguments[name] = "i32:16"
        elif name == "rows":
            arguments[name] = "i32:16"
        elif name in NUMBERS:
            arguments[name] = "i32"
        else:
            arguments[name] = dtype
    return arguments


def hopper_arguments(kernel, dtype: torch.dtype, features: dict) -> dict:
    from gptoss_kernels.attention import hopper_launch as launch

    features = dict(HAS_WINDOW=False, PACKED=False, PADDED=False) | {n: x for n, x in features.items() if n != "SPLIT"}
    keys = 64 if features["HAS_WINDOW"] or features["PADDED"] else 128
    constants = dict(GROUP=8, HAS_SINKS=True, HAS_DLSE=False, BLOCK_M=launch.DKDV_QUERIES) | features
    if kernel.__name__ == "forward_hopper_kernel":
        constants |= dict(BLOCK_N=keys, STAGES=launch.STAGES[keys])
    else:
        keys = launch.DQ_KEYS
        constants |= dict(BLOCK_N=keys, STAGES=launch.DQ_STAGES if "dq" in kernel.arg_names else launch.DKDV_STAGES)
    known = constants | dict.fromkeys(NUMBERS, "i32") | dict(rows="i32:16", scale="fp32", qk_scale="fp32")
    known |= dict.fromkeys(("lse", "dlse", "scratch"), torch.float32)
    known |= dict(cu_seqlens=torch.int32 if features["PACKED"] else torch.float32)
    known |= dict(padding=torch.bool if features["PADDED"] else torch.float32)
    known |= {name: "i32:16" for name in kernel.arg_names if name.startswith("stride")}
    known |= {name: descriptor(dtype, 1, 1, 64, 64) for name in ("q_desc", "do_desc", "o_desc")}
    known |= {name: descriptor(dtype, 1, 1, keys, 64) for name in ("k_desc", "v_desc")}
    known |= {"rows_desc": descriptor(torch.float32, 1, 64)}
    return {name: known.get(name, dtype) for name in kernel.arg_names}


def experts_arguments(kernel, dtype: torch.dtype) -> dict:
    """gpt-oss's shapes, weights trained: hidden and intermediate 2,880, top-k 4; tiles as the launchers choose them."""
    blocks = {
        "activation_kernel": dict(BLOCK_R=4, BLOCK_I=512),
        "combine_kernel": dict(BLOCK_T=2, BLOCK_H=1024),
        "activation_backward_kernel": dict(BLOCK_R=2, BLOCK_I=1024),
        "expert_sum_kernel": dict(BLOCK_R=64, BLOCK_W=64),
        "add_low_rank_kernel": dict(BLOCK_R=32, BLOCK_W=128, BLOCK_K=16, RANK=8),
    }
    known = dict(INTERMEDIATE=2880, HIDDEN=2880, WIDTH=5760, TOP_K=4, HAS_BIAS=True, HAS_WEIGHT=True, WRITE_ACT=True)
    known |= dict(GATHER=True, dweight=torch.float32, alpha="fp32", limit="fp32", rows="i32", tokens="i32")
    known |= dict(experts="i32:16", slot=torch.int64, expert_of_slot=torch.int64)
    known |= dict.fromkeys(("expert", "token", "ends", "row_of_slot"), torch.int32) | blocks[kernel.__name__]
    return {name: known.get(name, dtype) for name in kernel.arg_names}


def layer_arguments(kernel, dtype: torch.dtype) -> dict:
    """gpt-oss's shapes: hidden 2,880, 64 and 8 heads of 64, 201,088 words."""
    known = dict(HIDDEN=2880, BLOCK_H=4096, ROWS=128, NEED_WEIGHT=True, NEED_GRAD=True, VOCAB=201088, BLOCK=4096)
    known |= dict(SIGN=-1, HALF=32, BLOCK_Q=64, BLOCK_K=8, labels=torch.int64, top1=torch.bool, eps="fp32")
    known |= dict.fromkeys(("rstd", "dweight_partial", "losses", "entropies"), torch.float32)
    known |= dict.fromkeys(("rows", "length", "q_heads", "k_heads"), "i32")
    known |= {name: "i32:16" for name in kernel.arg_names if name.startswith("stride")}
    return {name: known.get(name, dtype) for name in kernel.arg_names}


def mxfp4_arguments(kernel, dtype: torch.dtype) -> dict:
    """gpt-oss's gate_up_proj: 5,760 rows of 90 groups."""
    from gptoss_kernels.mxfp4 import dequantize

    known = dict(ROWS=5760, GROUPS=90, BLOCK_N=dequantize.BLOCK_N, BLOCK_G=dequantize.BLOCK_G)
    known |= dict(blocks=torch.uint8, scales=torch.uint8)
    return {name: known.get(name, dtype) for name in kernel.arg_names}


def adamw_arguments(kernel, dtype: torch.dtype) -> dict:
    """bf16 weights and gradients (fp16 stands in where there is no bf16: its size is the same)."""
    known = dict(squares=torch.float32, STOCHASTIC=True, ROWS=step.ROWS, BLOCK=step.BLOCK, FRACTION=step.FRACTION)
    known |= dict(zip(("HASH0", "HASH1", "HASH2"), step.HASH, strict=True), FIRST=step.FIRST, SECOND=step.SECOND)
    known |= dict.fromkeys(("count", "key0", "key1"), "i32") | dict.fromkeys(("parameter", "grad"), dtype)
    known |= {name: torch.uint8 for name in kernel.arg_names if name.startswith("exp_avg")}
    return {name: known.get(name, "fp32") for name in kernel.arg_names}


def variants(name: str, capability: int):
    """(head_dim, dtype, feature) to compile on an architecture: gpt-oss's shape, and what is tightest where it is."""
    half = torch.float16 if capability == 75 else torch.bfloat16
    yield (64, half, "full")
    if name in OTHERS:
        return
    yield (64, half, "window")
    if name in HOPPER:
        yield (64, half, "packed")
        yield (64, half, "padded")
        return
    if capability in (75, 80, 90, 100):
        yield (64, half, "packed")
    if capability in (75, 80, 86, 90):  # one architecture for each size of shared memory
        yield (128, half, "full")
    if capability == 90:
        yield (64, half, "padded")
    if capability in (75, 86):  # fp32 tiles are the same on every architecture but Turing
        yield (128, torch.float32, "full")


# kernel -> what makes its arguments
OTHERS = dict.fromkeys(EXPERTS, experts_arguments) | dict.fromkeys(LAYERS, layer_arguments)
OTHERS |= dict.fromkeys(MXFP4, mxfp4_arguments) | dict.fromkeys(ADAMW, adamw_arguments)


def compile_row(name: str, kernel, capability: int, head_dim: int, dtype: torch.dtype, feature: str) -> dict:
    if name in OTHERS:
        arguments = OTHERS[name](kernel, dtype)
        warps = 8 if name in ("cross_entropy_kernel", "adamw_kernel") else 4
        used = compile_offline(kernel, arguments, capability, num_warps=warps, num_stages=3)
        row = {"kernel": name, "capability": capability, "head_dim": head_dim, "feature": feature}
        return row | dataclasses.asdict(used)
    if name in HOPPER:
        used = compile_offline(kernel, hopper_arguments(kernel, dtype, FEATURES[feature]), capability, 4, 1)
        row = {"kernel": name, "capability": capability, "head_dim": 64, "dtype": str(dtype).removeprefix("torch.")}
        return row | {"feature": feature, **dataclasses.asdict(used)}
    arch = tiles.architecture(divmod(capability, 10))
    tile = tiles.table_tile(arch, ATTENTION[name], head_dim, dtype, feature == "window")
    arguments = attention_arguments(kernel, tile, head_dim, dtype, FEATURES[feature], notify=capability == 90)
    used = compile_offline(kernel, arguments, capability, tile.num_warps, tile.num_stages, tile.maxnreg)
    row = {"kernel": name, "capability": capability, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
    return row | {"feature": feature, "tile": tile, **dataclasses.asdict(used)}


def main() -> None:
    kernels = package_kernels()
    unknown = set(kernels) - set(ATTENTION) - HOPPER - set(OTHERS)
    if unknown:
        raise SystemExit(f"no arguments are known for {sorted(unknown)}: add them here")
    for capability in map(int, sys.argv[1:]):
        for name, kernel in kernels.items():
            if name in HOPPER and capability != 90:
                continue
            for variant in variants(name, capability):
                print(json.dumps(compile_row(name, kernel, capability, *variant)), flush=True)


if __name__ == "__main__":
    main()
