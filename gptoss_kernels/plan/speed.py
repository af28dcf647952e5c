"""Time of a training step: what each kind of kernel computes or moves, over the share of the peak that it reached.

The shares come from measured rows, on an H100 and an H200; on another GPU they are taken to be the same, which is an
estimate.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..experts.api import CHUNK as EXPERTS_CHUNK
from .memory import GROUP, Memory, Settings, Shapes, gradient_bytes, state_bytes


class GPU(NamedTuple):
    flops: float  # dense bf16 a second
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second to the other GPUs of its node, one way
    gib: float  # of its memory, by its name


# By a part of the device's name, the first that fits. Source: NVIDIA's data sheets; links of PCIe cards are PCIe's.
GPUS = {
    "H100 PCIe": GPU(756e12, 2.0e12, 64e9, 80), "H100 NVL": GPU(835e12, 3.9e12, 64e9, 94),
    "H100": GPU(989e12, 3.35e12, 450e9, 80), "H200": GPU(989e12, 4.8e12, 450e9, 141),
    "B200": GPU(2250e12, 8.0e12, 900e9, 180), "A100": GPU(312e12, 2.039e12, 300e9, 80),
    "L40S": GPU(362e12, 0.864e12, 32e9, 48), "L40": GPU(181e12, 0.864e12, 32e9, 48),
    "L4": GPU(121e12, 0.3e12, 32e9, 24),
}  # fmt: skip
MEASURED = ("H100", "H200")
# `gpu` when only a memory is given: the first that has it.
BY_MEMORY = ("L4", "L40S", "H100", "H200", "B200")

_STEP = "train_step.csv 0a64a63"
_PACKED = "mxfp4.csv b905c43"
_FULL = "train_step.csv 62b7c25, full"
_ATTENTION = "attention.csv 550da47, 16,384 tokens"
NO_ROW = "no row yet: assumed"


class Share(NamedTuple):
    value: float
    of: str
    row: str


EFFICIENCY = {
    "attention, full, forward": Share(0.527, "FLOP/s", _ATTENTION),
    "attention, full, backward": Share(0.470, "FLOP/s", _ATTENTION),
    "attention, window, forward": Share(0.41, "bandwidth", _ATTENTION),
    "attention, window, backward": Share(0.36, "bandwidth", _ATTENTION),
    "attention, in a step": Share(0.89, "itself", f"{_PACKED} over attention.csv 550da47, 16,384 tokens"),
    "grouped products": Share(0.67, "FLOP/s", f"{_STEP}, ours:lean, mxfp4.csv 547ec65, 120b: / (1 + (190/n)^1.57)"),
    "projections and LM head": Share(0.549, "FLOP/s", f"{_STEP}, ours:lean, 16,384 tokens"),
    "projections and LM head, trained": Share(0.72, "FLOP/s", f"{_FULL}, ours:lean, H200"),
    "loss": Share(0.346, "bandwidth", f"{_STEP}, ours:lean, 16,384 tokens"),
    "experts' kernels, forward": Share(0.815, "bandwidth", f"{_STEP}, ours:lean less ours:auto, 16,384 tokens"),
    "experts' kernels, backward": Share(0.624, "bandwidth", f"{_STEP}, ours:lean less ours:auto, 16,384 tokens"),
    "norms and rotary embedding": Share(0.876, "bandwidth", f"{_STEP}, ours:lean, 16,384 tokens"),
    "others": Share(0.63, "bandwidth", f"{_STEP}, ours:lean, 4,096 to 32,768 tokens, and 0.175 ms a layer"),
    "dequantization": Share(0.82, "bandwidth", f"{_PACKED} and train_step.csv 0a64a63, 4,096 tokens: others"),
    "experts' adapters": Share(0.74, "bandwidth", f"{_PACKED}, attention+experts less attention, 16,384 tokens"),
    "optimizer": Share(0.35, "bandwidth", f"{_FULL}, ours:lean, H200: others, less what grows with tokens"),
    "bandwidth, H200": Share(0.70, "itself", f"{_FULL}, ours:lean: kernels are not faster than on an H100"),
    "GPU to GPU": Share(0.7, "link", NO_ROW),
    "GPU to host": Share(0.72, "PCIe", "finetune.csv 6219156, on_host=1, both ways at once"),
}
OTHERS_MS = 0.175  # of a layer, at any length
# Rows of an expert at which grouped products run at half of their share, and how steep that is: measured from 128
# rows (120b, 4,096 tokens) to 4,096.
ROWS_HALF, ROWS_POWER = 190, 1.57
# What the host takes for a layer, and for its recomputation; it bounds short steps. ours:auto and ours:lean at 4,096
# tokens on the machine of train_step.csv 0a64a63: hosts differ by a factor of two (benchmarks/NOTES.md).
HOST_MS, HOST_RECOMPUTE_MS = 8.0, 2.9
# How often a sharded step moves all weights through a GPU's memory, beside what it needs without sharding: gathered
# ones are copied out, gradients copied in, clipped. FSDP2, node.csv a48d5c2, 4,096 tokens, less the parts above;
# DeepSpeed's ZeRO-3 takes 46.
SHARDING_PASSES = 15
# Bytes a second each way, generation 5 with 16 lanes; source: PCI-SIG, less its framing.
PCIE = 55e9


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step.

    Attributes:
        parts: ms of the GPU by kind of kernel; of all forward and backward passes of a step.
        step_ms: their sum, or what else bounds it.
        bound: "GPU", "host", "GPU to GPU" or "GPU to host".
        tokens_per_second: of all GPUs.
        mfu: share of the peak in what a step needs, as benchmarks/train_step.py counts it.
        estimate: another GPU than the measured ones, or a share without a row.
    """

    parts: dict[str, float] = field(default_factory=dict)
    step_ms: float = 0.0
    bound: str = "GPU"
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    estimate: bool = False


def pairs(config, context: int) -> list[tuple[bool, int]]:
    """(windowed, pairs of a query and a key that it sees) of each layer, for one document of this length."""
    result = []
    for kind in config.layer_types:
        windowed = kind == "sliding_attention"
        window = min(config.sliding_window, context) if windowed else context
        result.append((windowed, window * (window + 1) // 2 + (context - window) * window))
    return result


def step_time(config, settings: Settings, memory: Memory, gpu: str = "H100") -> Speed:
    """Time of a step that keeps what `memory` says.

    Args:
        config: a GptOssConfig, or an object with its fields.
        settings, memory: as given to and returned by `predict`.
        gpu: a key of GPUS.

    Raises:
        ValueError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    device = GPUS[gpu]
    shapes, size, tokens = Shapes(config), settings.itemsize, settings.tokens
    full = settings.method == "full"
    count, top_k, inner = config.num_hidden_layers, config.num_experts_per_tok, config.intermediate_size
    attention, experts, whole = (count - kept for kept in memory.kept)  # layers that compute these again
    ms: dict[str, float] = {}
    bandwidth = device.bandwidth * (EFFICIENCY["bandwidth, H200"].value if gpu == "H200" else 1.0)

    def add(name: str, amount: float, share: str | None = None, slower: float = 1.0) -> None:
        found = EFFICIENCY[share or name]
        peak = device.flops if found.of == "FLOP/s" else bandwidth
        ms[name] = ms.get(name, 0.0) + 1e3 * amount / (found.value * slower * peak)

    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    needed = 0.0  # FLOPs without recomputation
    for layer, (windowed, seen) in enumerate(pairs(config, settings.context)):
        passes = 2 if layer < attention else 1
        flops = 4.0 * query * seen * settings.batch
        needed += 3.5 * flops
        if windowed:
            moved = tokens * ((2 * query + 2 * kv) * size + 4 * config.num_attention_heads)  # q, k, v, out, lse
            add("attention", passes * moved, "attention, window, forward")
            add("attention", 2 * moved - 4 * tokens * config.num_attention_heads, "attention, window, backward")
        else:
            add("attention", passes * flops, "attention, full, forward")
            add("attention", 2.5 * flops, "attention, full, backward")
    ms["attention"] /= EFFICIENCY["attention, in a step"].value

    products = 3.0 if full else 2.0  # forward, for the input's gradient, for the weight's own
    grouped = 2.0 * tokens * top_k * 3 * config.hidden_size * inner
    rows = min(tokens, tokens if full else EXPERTS_CHUNK) * top_k / config.num_local_experts
    add("grouped products", grouped * (products * count + experts), slower=1 / (1 + (ROWS_HALF / rows) ** ROWS_POWER))
    linear = 2.0 * tokens * sum(n * m for n, m in shapes.linear)
    linear += 2.0 * tokens * shapes.layer["router"][0]
    head = 2.0 * tokens * shapes.head
    # TRL's loss, for a trained head, makes its logits again.
    share = "projections and LM head" + ", trained" * full
    add("projections and LM head", linear * (products * count + whole) + head * (4 if full else 2), share)
    needed += products * (count * (grouped + linear) + head)
    add("loss", 3.0 * tokens * config.vocab_size * size)

    hidden, act = config.hidden_size * size, top_k * inner * size
    expert_rows = top_k * hidden
    forward = 3 * expert_rows + 3 * act + hidden
    backward = 3 * expert_rows + 5 * act + hidden
    outer = full or "experts" in settings.lora_targets
    backward += outer * (act + 2 * expert_rows)
    add("experts' kernels", tokens * (count + experts) * forward, "experts' kernels, forward")
    add("experts' kernels", tokens * count * backward, "experts' kernels, backward")
    turned = 2 * (query + kv) * size
    add(
        "norms and rotary embedding", tokens * ((count + whole) * (4 * hidden + turned) + count * (6 * hidden + turned))
    )
    add("others", tokens * (2 * count + whole) * 6 * hidden)
    ms["others"] += OTHERS_MS * count

    assumed = False
    if settings.base_weights == "mxfp4":
        passes = -(-tokens // EXPERTS_CHUNK) * (2 * count + experts)
        add("dequantization", passes * shapes.projections * (size + 17 / GROUP))
    if not full and "experts" in settings.lora_targets:
        again = (count + experts) * (5 * act + 3 * expert_rows)
        add("experts' adapters", tokens * (again + count * (8 * act + 7 * expert_rows)))
    forward = sum(ms.values()) / (products + experts / count)  # of one pass, about
    backward = sum(ms.values()) - forward
    ms = {name: value * settings.accumulation for name, value in ms.items()}
    if full:
        # weights read and written, gradients read, moments read and written
        each = 2 * size + size + 2 * state_bytes(settings.optim, size, settings.masters)
        add("optimizer", shapes.parameters * each / settings.gpus)
        assumed = not settings.optim.startswith("adamw_8bit_sr")

    if settings.sharded:
        moved = settings.accumulation * SHARDING_PASSES * shapes.parameters * size
        ms["gathering and spreading"] = 1e3 * moved / bandwidth

    bounds = {"GPU": sum(ms.values()), "host": settings.accumulation * (count * HOST_MS + whole * HOST_RECOMPUTE_MS)}
    if settings.sharded:
        # weights gathered forward and backward, gradients spread
        each = 2 * size + (gradient_bytes(settings.optim, 1, size) or size)
        moved = settings.accumulation * shapes.parameters * each * (settings.gpus - 1) / settings.gpus
        bounds["GPU to GPU"] = 1e3 * moved / (EFFICIENCY["GPU to GPU"].value * device.link)
    if settings.offload or settings.on_host:
        # Inputs go out in forward passes and come back in backward passes. Moments, in the last of these, come in
        # and go out at once, each way at full speed; the optimizer's steps are in that pass too.
        inputs, moments = settings.offload * count * tokens * hidden, 2 * sum(shapes.on_host(settings.on_host))
        last = backward + (ms["optimizer"] if settings.on_host else 0.0)
        passes = [(settings.accumulation, inputs, forward), (settings.accumulation - 1, inputs, backward)]
        rate = EFFICIENCY["GPU to host"].value * PCIE / 1e3
        waits = (n * max(0.0, size / rate - own) for n, size, own in (*passes, (1, inputs + moments, last)))
        bounds["GPU to host"] = bounds["GPU"] + sum(waits)
        assumed = True
    bound = max(bounds, key=bounds.get)
    step = bounds[bound]
    return Speed(
        parts=ms,
        step_ms=step,
        bound=bound,
        tokens_per_second=1e3 * settings.gpus * settings.accumulation * tokens / step,
        mfu=settings.accumulation * needed / (step / 1e3) / device.flops,
        estimate=assumed or gpu not in MEASURED or settings.gpus > 1,
    )
