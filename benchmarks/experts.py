"""Time and memory of gpt-oss's experts layer, ours beside Transformers' and beside the bare matrix products.

python benchmarks/experts.py                   every contender at every length, rows to results/experts.csv
python benchmarks/experts.py --help            to choose

"trained": gradients of everything. "frozen": of x and the routing weights alone, as in LoRA. "gemms" is the floor:
the grouped products and nothing else, two forward, two backward and, trained, two for the weights. Correctness is
checked in fp64 before anything is timed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness
from gptoss_kernels import fused_experts
from gptoss_kernels.experts.reference import experts_reference
from gptoss_kernels.experts.routing import grouped_outer, grouped_product, route
from gptoss_kernels.testing import relative_error

COLUMNS = [
    "contender", "tokens", "weights", "forward_ms", "total_ms", "total_p20_ms", "total_p80_ms", "peak_extra_gib",
    "tflops", "max_relative_error", "load_max_over_mean", "experts", "top_k", "hidden", "intermediate", "dtype",
    "gpu", "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SHOWN = ["contender", "tokens", "weights", "forward_ms", "total_ms", "peak_extra_gib", "tflops", "max_relative_error"]
LIMIT = 1.2e-2  # relative error of any result in bf16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--contenders", default="ours,grouped_mm,gemms", help="of ours, grouped_mm (Transformers'), gemms")
    add("--lengths", default="8192,16384", help="tokens")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "experts.csv", help="rows go here")
    add("--device", default="cuda", help="cuda, or cpu to try the script without a GPU")
    add("--rounds", type=int, default=20, help="timed rounds, >= 2")
    add("--experts", type=int, default=32)
    add("--top-k", type=int, default=4)
    add("--hidden", type=int, default=2880)
    add("--intermediate", type=int, default=2880)
    options = parser.parse_args(arguments)
    options.contenders = options.contenders.split(",")
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"--contenders: expected some of {', '.join(CONTENDERS)}, got {', '.join(sorted(unknown))}")
    try:
        options.lengths = [int(part) for part in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: expected integers with commas between, got {options.lengths!r}")
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA GPU for 'cuda', got none; --device cpu tries the script without one")
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    return options


def make_parameters(options: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(*shape: int, size: float) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=options.device, dtype=options.dtype)
        return x.mul_(size).requires_grad_()

    experts, hidden, intermediate = options.experts, options.hidden, options.intermediate
    return [
        draw(experts, hidden, 2 * intermediate, size=hidden**-0.5),
        draw(experts, 2 * intermediate, size=0.1),
        draw(experts, intermediate, hidden, size=intermediate**-0.5),
        draw(experts, hidden, size=0.1),
    ]


def make_inputs(tokens: int, options: argparse.Namespace, seed: int) -> tuple[torch.Tensor, ...]:
    """x, routing weights (leaves with grad), indices of a random router's top-k, and the gradient of y."""
    generator = torch.Generator(options.device).manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=options.device)  # noqa: E731
    values, indices = draw(tokens, options.experts).topk(options.top_k, dim=-1)
    x, grad = (draw(tokens, options.hidden).to(options.dtype) for _ in range(2))
    return x.requires_grad_(), values.softmax(-1).to(options.dtype).requires_grad_(), indices, grad


def load_ours(parameters, options) -> Callable:
    return lambda x, weights, indices, *p: fused_experts(x, *p, indices, weights)


def load_grouped_mm(parameters, options) -> Callable:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        num_local_experts=options.experts, hidden_size=options.hidden, intermediate_size=options.intermediate,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = GptOssExperts(config)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

    def call(x, weights, indices, *p):
        for name, parameter in zip(names, p, strict=True):
            experts._parameters[name] = parameter
        return experts(x, indices, weights)

    return call


class _Products(torch.autograd.Function):
    """The grouped matrix products alone, on rows that are sorted already."""

    @staticmethod
    def forward(ctx, x, w1, w2, rows, ends):
        hidden = grouped_product(rows, w1, ends)
        act = hidden[:, : w2.shape[1]].contiguous()
        y = grouped_product(act, w2, ends)
        ctx.save_for_backward(rows, hidden, act, w1, w2, ends)
        return y

    @staticmethod
    def backward(ctx, dy):
        rows, hidden, act, w1, w2, ends = ctx.saved_tensors
        grouped_product(dy, w2.transpose(1, 2), ends)
        drows = grouped_product(hidden, w1.transpose(1, 2), ends)  # stands for the gradient of hidden: same shape
        dw1 = grouped_outer(rows, hidden, ends) if ctx.needs_input_grad[1] else None
        dw2 = grouped_outer(act, dy, ends) if ctx.needs_input_grad[2] else None
        return drows, dw1, dw2, None, None


CONTENDERS = {"ours": load_ours, "grouped_mm": load_grouped_mm, "gemms": None}


def check(call: Callable, parameters: list[torch.Tensor], options: argparse.Namespace) -> float:
    """Largest relative error of y and all gradients at 256 tokens, against fp64."""
    x, weights, indices, grad = make_inputs(256, options, seed=9)
    leaves = [x, weights, *parameters]
    y = call(x, weights, indices, *parameters)
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = experts_reference(exact[0], *exact[2:], indices, exact[1])
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    return max(relative_error(a.detach(), b) for a, b in zip(got, wanted, strict=True))


def measure(calls: dict[str, Callable], parameters, tokens: int, trained: bool, options) -> dict[str, dict]:
    """name -> times and peak memory; all contenders in turn, on inputs that rotate."""
    sets = [make_inputs(tokens, options, seed) for seed in range(2)]
    for parameter in parameters:
        parameter.requires_grad_(trained)
    timed, peaks = {}, {}
    for name, call in calls.items():

        def forward(n, call=call):
            return call(*sets[n % 2][:3], *parameters)

        def total(n, call=call):
            x, weights, indices, grad = sets[n % 2]
            leaves = [x, weights, *(parameters if trained else [])]
            torch.autograd.grad(call(x, weights, indices, *parameters), leaves, grad)

        if name == "gemms":
            forward, total = _bare(sets, parameters, trained)
        total(0)
        peaks[name] = harness.peak_extra_gib(lambda total=total: total(1), options.device)
        timed[name, "forward"], timed[name, "total"] = forward, total
    times = harness.time_interleaved(timed, options.device, rounds=options.rounds)
    results = {}
    for name in calls:
        forward, _, _ = harness.percentiles(times[name, "forward"])
        total, p20, p80 = harness.percentiles(times[name, "total"])
        flops = 2 * tokens * options.top_k * 3 * options.hidden * options.intermediate * (3 if trained else 2)
        results[name] = {
            "forward_ms": forward, "total_ms": total, "total_p20_ms": p20, "total_p80_ms": p80,
            "peak_extra_gib": peaks[name], "tflops": flops / total / 1e9,
        }  # fmt: skip
    return results


def _bare(sets, parameters, trained: bool) -> tuple[Callable, Callable]:
    w1, _, w2, _ = parameters
    prepared = []
    for x, _, indices, grad in sets:
        routing = route(indices, w1.shape[0])
        rows = x.detach().index_select(0, routing.token).requires_grad_()
        prepared.append((rows, grad.index_select(0, routing.token), routing.ends))

    def forward(n):
        rows, _, ends = prepared[n % 2]
        return _Products.apply(rows, w1, w2, rows.detach(), ends)

    def total(n):
        rows, grad, _ = prepared[n % 2]
        torch.autograd.grad(forward(n), [rows, w1, w2] if trained else [rows], grad)

    return forward, total


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    origin = harness.provenance(options.device)
    print(" · ".join(f"{key} {value}" for key, value in origin.items()))
    parameters = make_parameters(options)
    calls = {name: CONTENDERS[name](parameters, options) if CONTENDERS[name] else None for name in options.contenders}
    errors = {name: check(call, parameters, options) if call else None for name, call in calls.items()}
    print("largest relative error: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items() if v is not None))
    if not errors.get("ours", 0.0) <= LIMIT:
        raise SystemExit(f"ours is wrong and is not timed: relative error {errors['ours']:.1e} > {LIMIT:.0e}")
    rows = []
    for tokens in options.lengths:
        load = torch.bincount(make_inputs(tokens, options, 0)[2].flatten(), minlength=options.experts).float()
        for trained in (False, True):
            for name, result in measure(calls, parameters, tokens, trained, options).items():
                row = {
                    "contender": name, "tokens": tokens, "weights": "trained" if trained else "frozen", **result,
                    "max_relative_error": errors[name], "load_max_over_mean": (load.max() / load.mean()).item(),
                    "experts": options.experts, "top_k": options.top_k, "hidden": options.hidden,
                    "intermediate": options.intermediate, "dtype": str(options.dtype).removeprefix("torch."), **origin,
                }  # fmt: skip
                rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    harness.append_rows(options.output, COLUMNS, rows)
    print(f"\n{harness.table(SHOWN, rows)}\n\n{len(rows)} rows appended to {options.output}")


if __name__ == "__main__":
    sys.exit(main())
