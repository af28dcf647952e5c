"""Time and memory of the layers around attention and experts: RMSNorm, rotary embedding and the loss, ours and others'.

python benchmarks/layers.py                    every contender that is installed, rows to results/layers.csv
python benchmarks/layers.py --help             to choose

gpt-oss-20b's shapes. Weights are frozen, as in LoRA; the loss counts every token. Every contender's result and
gradients are checked in fp64 at 256 tokens, or 512 words, before it is timed; the largest relative error is in its row.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness
from gptoss_kernels.testing import relative_error

COLUMNS = [
    "layer", "contender", "tokens", "forward_ms", "total_ms", "total_p20_ms", "total_p80_ms", "peak_extra_gib",
    "max_relative_error", "package", "gpu", "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SHOWN = COLUMNS[:9]
HIDDEN, VOCAB, EPS = 2880, 201_088, 1e-5
LIMIT = 1.2e-2  # relative error of any result in bf16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--layers", default="rms_norm,rope,loss", help="of rms_norm, rope, loss")
    add("--lengths", default="8192,16384", help="tokens")
    add("--rounds", type=int, default=20, help="timed rounds, >= 2")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "layers.csv", help="rows go here")
    options = parser.parse_args(arguments)
    options.layers = options.layers.split(",")
    if unknown := set(options.layers) - set(LAYERS):
        parser.error(f"--layers: expected some of {', '.join(LAYERS)}, got {', '.join(sorted(unknown))}")
    try:
        options.lengths = [int(part) for part in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: expected integers with commas between, got {options.lengths!r}")
    if options.rounds < 2:
        parser.error(f"--rounds: expected >= 2, got {options.rounds}")
    return options


# ----------------------------------------------------------------------------------------------------------- RMSNorm


def norm_inputs(tokens: int, words: int, seed: int) -> tuple[tuple, tuple, tuple]:
    """Leaves with gradient, other arguments, gradients of the results."""
    draw = _draw(seed)
    return (draw(1, tokens, HIDDEN).requires_grad_(),), (1 + 0.1 * draw(HIDDEN),), (draw(1, tokens, HIDDEN),)


def torch_norm(x, weight):
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype),)


def ours_norm(x, weight):
    from gptoss_kernels.layers.rms_norm import rms_norm

    return (rms_norm(x, weight, EPS),)


def liger_norm(x, weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is the mode that multiplies the weight in fp32; in place, it would overwrite the residual's gradient.
    return (LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "gemma", False),)


# -------------------------------------------------------------------------------------------------------------- RoPE


def rope_inputs(tokens: int, words: int, seed: int) -> tuple[tuple, tuple, tuple]:
    draw = _draw(seed)
    heads = [draw(1, tokens, n, 64).transpose(1, 2).requires_grad_() for n in (64, 8)]
    # 1.3466 = 0.1 ln 32 + 1 is YaRN's scale.
    angle = torch.arange(tokens, device="cuda")[:, None] * 150_000.0 ** -torch.linspace(0, 1, 32, device="cuda")
    tables = tuple(f(angle)[None].mul(1.3466).to(torch.bfloat16) for f in (torch.cos, torch.sin))
    return tuple(heads), tables, tuple(draw(1, tokens, n, 64).transpose(1, 2) for n in (64, 8))


def torch_rope(q, k, cos, sin):
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin)


def ours_rope(q, k, cos, sin):
    from gptoss_kernels.layers.rope import apply_rope

    return apply_rope(q, k, cos, sin)


def liger_rope(q, k, cos, sin):
    from liger_kernel.transformers.rope import liger_rotary_pos_emb_gpt_oss

    # It rotates in place where its argument is contiguous that way: the copies are part of what it costs.
    return liger_rotary_pos_emb_gpt_oss(q.clone(), k.clone(), cos, sin)


# -------------------------------------------------------------------------------------------------------------- loss


def loss_inputs(tokens: int, words: int, seed: int) -> tuple[tuple, tuple, tuple]:
    draw = _draw(seed)
    labels = torch.randint(0, words, (tokens,), device="cuda")
    weight = draw(words, HIDDEN) * HIDDEN**-0.5
    return (draw(tokens, HIDDEN).requires_grad_(),), (weight, labels), (torch.ones((), device="cuda"),)


def torch_loss(hidden, weight, labels):
    return (torch.nn.functional.cross_entropy((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)),
                                              labels),)  # fmt: skip


def ours_loss(hidden, weight, labels):
    from gptoss_kernels.layers.loss import linear_cross_entropy

    return (linear_cross_entropy(hidden, weight, labels)[0].mean(),)


def liger_loss(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return (liger_fused_linear_cross_entropy(hidden, weight, labels),)


def trl_loss(hidden, weight, labels):
    """TRL's tiled loss through its public entry: a model whose backbone is its input."""
    from types import SimpleNamespace

    from transformers import GptOssConfig
    from trl.trainer.utils import add_fused_lm_head

    class Head:
        config = GptOssConfig(output_router_logits=False)

        def forward(self):
            raise NotImplementedError  # TRL wraps it; it serves calls without fused_lm_head, of which there is none

        def base_model(self, hidden, use_cache):
            return SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self):
            return SimpleNamespace(weight=weight, bias=None)

    head = Head()
    add_fused_lm_head(head)
    return (head.forward(hidden[None], shift_labels=labels[None], fused_lm_head=True).loss,)


# layer -> how inputs are made, the definition, contenders
LAYERS = {
    "rms_norm": (norm_inputs, torch_norm, {"ours": ours_norm, "liger": liger_norm, "transformers": torch_norm}),
    "rope": (rope_inputs, torch_rope, {"ours": ours_rope, "liger": liger_rope, "transformers": torch_rope}),
    "loss": (loss_inputs, torch_loss,
             {"ours": ours_loss, "trl": trl_loss, "liger": liger_loss, "full logits": torch_loss}),
}  # fmt: skip
PACKAGES = {"liger": "liger-kernel", "trl": "trl", "transformers": "transformers", "full logits": "torch"}


def _draw(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def both_passes(call: Callable, leaves: tuple, others: tuple, grads: tuple) -> tuple[torch.Tensor, ...]:
    results = call(*leaves, *others)
    return *results, *torch.autograd.grad(results, leaves, grads)


def error(call: Callable, definition: Callable, make: Callable) -> float:
    """Largest relative error of any result or gradient against the definition in fp64, 256 tokens, 512 words."""
    leaves, others, grads = make(256, 512, 7)
    double = lambda xs: tuple(x.detach().double() if x.is_floating_point() else x for x in xs)  # noqa: E731
    exact = both_passes(definition, tuple(x.requires_grad_() for x in double(leaves)), double(others), double(grads))
    return max(relative_error(x, y) for x, y in zip(both_passes(call, leaves, others, grads), exact, strict=True))


def measure(layer: str, tokens: int, options: argparse.Namespace) -> list[dict]:
    make, definition, contenders = LAYERS[layer]
    device, calls, errors = torch.device("cuda"), {}, {}
    sets = [make(tokens, VOCAB, seed) for seed in range(3 if layer != "loss" else 1)]
    for name, call in contenders.items():
        try:
            errors[name] = error(call, definition, make)
            both_passes(call, *sets[0])
        except (ImportError, RuntimeError) as problem:  # not installed; out of memory is a RuntimeError
            print(f"{layer}, {name}, {tokens} tokens: no row, {type(problem).__name__}: {str(problem)[:150]}")
            torch.cuda.empty_cache()
            continue
        if errors[name] > LIMIT:
            print(f"{layer}, {name}: no row, relative error {errors[name]:.2e} > {LIMIT}")
            continue
        calls[f"{name} forward"] = lambda n, call=call: call(*sets[n % len(sets)][0], *sets[n % len(sets)][1])
        calls[f"{name} total"] = lambda n, call=call: both_passes(call, *sets[n % len(sets)])
    times = harness.time_interleaved(calls, device, rounds=options.rounds)
    rows = []
    for name in (name for name in contenders if f"{name} total" in calls):
        total, p20, p80 = harness.percentiles(times[f"{name} total"])
        package = PACKAGES.get(name)
        rows.append({
            "layer": layer, "contender": name, "tokens": tokens,
            "forward_ms": harness.percentiles(times[f"{name} forward"])[0], "total_ms": total, "total_p20_ms": p20,
            "total_p80_ms": p80,
            "peak_extra_gib": harness.peak_extra_gib(lambda name=name: calls[f"{name} total"](0), device),
            "max_relative_error": errors[name], "package": f"{package} {harness.version(package)}" if package else "",
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/layers.py: expected a CUDA GPU, got none")
    origin = harness.provenance(torch.device("cuda"))
    print(" · ".join(f"{key} {value}" for key, value in origin.items()))
    rows = []
    for layer in options.layers:
        for tokens in options.lengths:
            for row in measure(layer, tokens, options):
                rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in (row | origin).items()})
    harness.append_rows(options.output, COLUMNS, rows)
    print(f"\n{harness.table(SHOWN, rows)}\n\n{len(rows)} rows appended to {options.output}")


if __name__ == "__main__":
    sys.exit(main())
