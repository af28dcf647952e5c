"""Time that the host spends on one call, in microseconds: what bounds short sequences and decoding.

python benchmarks/host.py                      rows to results/host.csv

128 tokens of gpt-oss's heads; wall time from call to return. "forward" and "backward" are single calls after the GPU
has been waited for, median of 200: what a call costs that finds nothing of itself in the CPU's caches. "loop" is a call
of 50 in a row, the same one, median of 20 loops; "layers" is a call of 24 in a row as a model makes them, each on the
last one's result and then one backward pass through all of them. Fewer kernels than the GPU's queue takes, so that none
waits for it. torch.add, one kernel without autograd, and a Function that launches nothing show what the host itself
takes.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from gptoss_kernels import flash_attention, fused_experts

COLUMNS = ["call", "forward_us", "backward_us", "forward_p80_us", "backward_p80_us", "forward_loop_us",
           "backward_loop_us", "forward_layers_us", "backward_layers_us",
           "gpu", "cpu", "torch", "triton", "transformers", "date", "commit"]  # fmt: skip
SHOWN = COLUMNS[:9]
TOKENS, LOOP, LAYERS = 128, 50, 24
CHAINED = (
    "attention, full", "attention, window 128", "attention, packed", "experts", "RMSNorm", "a Function alone",
)  # fmt: skip


class Nothing(torch.autograd.Function):
    """Attention's inputs and outputs, and no kernel."""

    @staticmethod
    def forward(ctx, q, k, v, sinks):
        ctx.save_for_backward(q, k, v, sinks)
        return q.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


def cases() -> dict:
    """Name -> (function of the leaves, the leaves)."""
    from gptoss_kernels.layers.lora import lora_linear
    from gptoss_kernels.layers.rms_norm import rms_norm
    from gptoss_kernels.layers.rope import apply_rope

    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (draw(1, TOKENS, n, 64).transpose(1, 2).requires_grad_() for n in (64, 8, 8))
    sinks = draw(64).requires_grad_()
    x = draw(TOKENS, 2880).requires_grad_()
    weight, (a, b) = draw(2880), (draw(8, 2880).float().requires_grad_(), draw(4096, 8).float().requires_grad_())
    table = draw(1, TOKENS, 32)
    square, bias = draw(4096, 2880), draw(4096)
    experts = draw(4, 2880, 5760), draw(4, 5760), draw(4, 2880, 2880), draw(4, 2880)
    choice, share = torch.randint(0, 4, (TOKENS, 4), device="cuda"), draw(TOKENS, 4).softmax(-1).detach()
    share.requires_grad_()
    starts = torch.tensor([0, 50, TOKENS], dtype=torch.int32, device="cuda")
    attention = (q, k, v, sinks)
    return {
        "attention, full": (flash_attention, attention),
        "attention, window 128": (functools.partial(flash_attention, sliding_window=128), attention),
        "attention, packed": (functools.partial(flash_attention, cu_seqlens=starts), attention),
        "experts": (lambda x, share: fused_experts(x, *experts, choice, share), (x, share)),
        "RMSNorm": (lambda x: rms_norm(x, weight, 1e-5), (x,)),
        "RoPE": (lambda q, k: apply_rope(q, k, table, table), (q, k)),
        "linear with LoRA": (lambda x, a, b: lora_linear(x, square, bias, a, b, 2.0), (x, a, b)),
        "a Function alone": (Nothing.apply, attention),
        "torch.add": (lambda: torch.add(weight, weight), ()),
    }


def measure(call, leaves, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds of forward and of backward, call by call."""
    forward, backward = [], []
    for index in range(rounds + 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call(*leaves)
        middle = time.perf_counter()
        grads = tuple(torch.ones_like(x) for x in (result if isinstance(result, tuple) else (result,)))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        if leaves:
            torch.autograd.grad(result, leaves, grads)
        end = time.perf_counter()
        if index >= 20:
            forward.append((middle - start) * 1e6)
            backward.append((end - begin) * 1e6)
    return forward, backward


def loop(call, loops: int = 20) -> float:
    """Microseconds of a call of LOOP in a row, the GPU waited for between loops alone."""
    times = []
    for index in range(loops + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LOOP):
            call()
        if index >= 2:
            times.append((time.perf_counter() - start) * 1e6 / LOOP)
    return statistics.median(times)


def measure_loops(call, leaves) -> tuple[float, float | None]:
    """Forward alone, and backward alone of one forward pass; None where there is no backward pass."""
    result = call(*leaves)
    if not leaves:
        return loop(call), None
    grads = tuple(torch.ones_like(x) for x in (result if isinstance(result, tuple) else (result,)))
    return loop(lambda: call(*leaves)), loop(lambda: torch.autograd.grad(result, leaves, grads, retain_graph=True))


def measure_layers(call, leaves, rounds: int = 30) -> tuple[float, float]:
    """Microseconds of a call, forward and backward, in a chain of LAYERS. call(x, *other leaves): of x's shape."""
    first, *others = leaves
    others = [[x.detach().clone().requires_grad_() for x in others] for _ in range(LAYERS)]  # each layer's own
    forward, backward = [], []
    for index in range(rounds + 3):
        x = first
        torch.cuda.synchronize()
        start = time.perf_counter()
        for mine in others:
            x = call(x, *mine)
        middle = time.perf_counter()
        grad = torch.ones_like(x)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.autograd.grad(x, (first, *(leaf for mine in others for leaf in mine)), grad)
        end = time.perf_counter()
        if index >= 3:
            forward.append((middle - start) * 1e6 / LAYERS)
            backward.append((end - begin) * 1e6 / LAYERS)
    return statistics.median(forward), statistics.median(backward)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=200, help="timed calls, >= 2")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "host.csv")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: expected >= 2, got {options.rounds}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/host.py: expected a CUDA GPU, got none")
    origin = harness.provenance(torch.device("cuda")) | {"cpu": cpu_name()}
    print(" · ".join(f"{key} {value}" for key, value in origin.items()))
    rows = []
    for name, (call, leaves) in cases().items():
        measured = map(harness.percentiles, measure(call, leaves, options.rounds))
        (forward, _, forward_p80), (backward, _, backward_p80) = measured
        forward_loop, backward_loop = measure_loops(call, leaves)
        forward_layers, backward_layers = measure_layers(call, leaves) if name in CHAINED else (None, None)
        times = {"forward_us": forward, "backward_us": backward, "forward_p80_us": forward_p80,
                 "backward_p80_us": backward_p80, "forward_loop_us": forward_loop,
                 "backward_loop_us": backward_loop, "forward_layers_us": forward_layers,
                 "backward_layers_us": backward_layers}  # fmt: skip
        if backward_loop is None:
            times |= dict.fromkeys(("backward_us", "backward_p80_us"))
        times = {key: value if value is None else round(value, 1) for key, value in times.items()}
        rows.append({"call": name} | times | origin)
    harness.append_rows(options.output, COLUMNS, rows)
    print(f"\n{harness.table(SHOWN, rows)}\n\n{len(rows)} rows appended to {options.output}")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return ""


if __name__ == "__main__":
    sys.exit(main())
