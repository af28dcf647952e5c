"""Experts kept in MXFP4: how fast they are made dense, and the training step over them, on random weights.

python -m benchmarks.mxfp4 tiles                       bandwidth of the kernel by tile, beside a copy
python -m benchmarks.mxfp4 step                        gpt-oss-20b, 4,096 tokens, LoRA on attention, MXFP4 and bf16
python -m benchmarks.mxfp4 step --targets attention,attention+experts --lengths 16384 --recomputation auto
python -m benchmarks.mxfp4 step --weights mxfp4 --lengths 2048 --memory-gib 14.9          as on a 16 GB GPU
python -m benchmarks.mxfp4 step --weights mxfp4 --model gpt-oss-120b
python -m benchmarks.mxfp4 step --weights mxfp4 --lengths 131072 --offload
python -m benchmarks.mxfp4 equal                      loss and adapters' gradients, over MXFP4 and over the same in bf16

A step is that of train_step.py. reserved_gib is the most that the process held, from building the model on.
"""

import argparse
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import harness

COLUMNS = [
    "model", "layers", "weights", "targets", "recomputation", "offload", "tokens", "tokens_per_second", "step_ms",
    "step_p20_ms", "step_p80_ms", "peak_gib", "reserved_gib", "model_gib", "memory_gib", "attention_ms",
    "grouped_gemm_ms", "gemm_ms", "loss_ms", "experts_ms", "norm_rope_ms", "other_ms", "idle_ms", "kept_attention",
    "kept_experts", "kept_whole", "loss", "gpu", "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SHOWN = COLUMNS[:1] + COLUMNS[2:9] + COLUMNS[11:15] + COLUMNS[23:27]
TILES = [(n, g, w) for n in (32, 64, 128) for g in (2, 4, 8) for w in (2, 4, 8)]  # out rows, groups, warps


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", choices=["tiles", "step", "equal"])
    add("--model", default="gpt-oss-20b", choices=["gpt-oss-20b", "gpt-oss-120b"])
    add("--layers", type=int, help="fewer than the model's, to try the script")
    add("--weights", default="mxfp4,bf16", help="of mxfp4, bf16")
    add("--targets", default="attention", help="parts with adapters, joined by +: attention, experts, router")
    add("--lengths", default="4096", help="tokens")
    add("--recomputation", default="lean", choices=["lean", "auto", "fast"])
    add("--rank", type=int, default=8)
    add("--offload", action="store_true", help="the layers' inputs wait in the host's memory")
    add("--memory-gib", type=float, help="memory that the process may take; default: the GPU's")
    add("--steps", type=int, default=8, help="timed steps, >= 2")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "mxfp4.csv", help="rows go here")
    options = parser.parse_args(arguments)
    options.weights = options.weights.split(",")
    if not set(options.weights) <= {"mxfp4", "bf16"}:
        parser.error(f"--weights: expected mxfp4, bf16 or both with a comma, got {','.join(options.weights)}")
    options.targets = options.targets.split(",")
    known = {"attention", "experts", "router"}
    if unknown := {part for targets in options.targets for part in targets.split("+")} - known:
        parser.error(f"--targets: expected parts of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    try:
        options.lengths = [int(part) for part in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: expected integers with commas between, got {options.lengths!r}")
    if options.steps < 2:
        parser.error(f"--steps: expected >= 2, got {options.steps}")
    return options


def tiles() -> None:
    """Prints TB/s of every tile for both projections of 20b; the fastest last."""
    from triton import cdiv
    from triton.testing import do_bench

    from gptoss_kernels.mxfp4.dequantize import dequantize_kernel

    for rows in (5760, 2880):
        blocks = torch.randint(0, 256, (32, rows, 90, 16), dtype=torch.uint8, device="cuda")
        scales = torch.randint(115, 125, (32, rows, 90), dtype=torch.uint8, device="cuda")
        out = torch.empty(32, 2880, rows, dtype=torch.bfloat16, device="cuda")
        moved = blocks.nbytes + scales.nbytes + out.nbytes
        source = torch.empty_like(out)
        rates = {"copy": 2 * out.nbytes / do_bench(lambda to=out, x=source: to.copy_(x), return_mode="median")}
        for n, g, warps in TILES:
            grid = cdiv(rows, n), cdiv(90, g), 32
            call = lambda n=n, g=g, warps=warps, grid=grid, x=(blocks, scales, out), rows=rows: dequantize_kernel[grid](  # noqa: E731
                *x, ROWS=rows, GROUPS=90, BLOCK_N=n, BLOCK_G=g, num_warps=warps
            )
            rates[f"{n} x {g}, {warps} warps"] = moved / do_bench(call, return_mode="median")
        for name, rate in sorted(rates.items(), key=lambda item: item[1]):
            print(f"{rows} rows  {name:18s} {rate / 1e9:6.3f} TB/s")


def steps(options: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    from benchmarks.train_step import Step, measure
    from gptoss_kernels.finetune.config import LORA_TARGETS
    from gptoss_kernels.finetune.model import build_random, census, load_config
    from gptoss_kernels.mxfp4 import buffer

    device = torch.device("cuda")
    origin = harness.provenance(device)
    total = torch.cuda.get_device_properties(device).total_memory
    if options.memory_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * 2**30 / total))
    config = load_config(options.model, random=True)
    if options.layers:
        config.num_hidden_layers, config.layer_types = options.layers, config.layer_types[: options.layers]
    implementations = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    for weights in options.weights:
        for targets in options.targets:
            buffer.release()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = build_random(config, device, torch.bfloat16, packed=weights == "mxfp4", **implementations)
            held = torch.cuda.memory_allocated() / 2**30
            built = torch.cuda.max_memory_reserved() / 2**30
            model.enable_input_require_grads()
            parts = targets.split("+")
            parameters = [name for part in parts if part != "attention" for name in LORA_TARGETS[part]]
            modules = LORA_TARGETS["attention"] if "attention" in parts else None
            adapted = get_peft_model(
                model,
                LoraConfig(
                    r=options.rank,
                    lora_alpha=2 * options.rank,
                    target_modules=modules,
                    target_parameters=parameters or None,
                ),
            )
            print(f"{weights}, trained: {census(adapted)}")
            for tokens in options.lengths:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                step = Step(f"ours:{options.recomputation}", adapted, tokens, offload=options.offload)
                result = measure(step, SimpleNamespace(steps=options.steps, training="lora"))
                row = {
                    "model": options.model, "layers": config.num_hidden_layers, "weights": weights, "targets": targets,
                    "recomputation": options.recomputation, "offload": options.offload, "tokens": tokens, **result,
                    "model_gib": held,
                    "reserved_gib": max(built, torch.cuda.max_memory_reserved() / 2**30),
                    "memory_gib": options.memory_gib or total / 2**30, **origin,
                }  # fmt: skip
                row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS}
                harness.append_rows(options.output, COLUMNS, [row])
                print(harness.table(SHOWN, [row]), flush=True)
                del step
            del model, adapted


def equal(options: argparse.Namespace) -> None:
    """A row: largest differences between one model over packed experts and over what these mean, in bf16."""
    from peft import LoraConfig, get_peft_model
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    from benchmarks.train_step import Step
    from gptoss_kernels.finetune.config import LORA_TARGETS
    from gptoss_kernels.finetune.model import build_random, load_config
    from gptoss_kernels.mxfp4.reference import dequantize

    origin = harness.provenance(torch.device("cuda"))
    config = load_config(options.model, random=True)
    if options.layers:
        config.num_hidden_layers, config.layer_types = options.layers, config.layer_types[: options.layers]
    implementations = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    model = build_random(config, "cuda", torch.bfloat16, packed=True, **implementations)
    model.enable_input_require_grads()
    targets = {"target_modules": LORA_TARGETS["attention"], "target_parameters": LORA_TARGETS["experts"]}
    adapted = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets))
    generator = torch.Generator("cuda").manual_seed(1)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for p in trained.values():  # PEFT begins with B = 0, where A has no gradient
        p.data.normal_(0, 0.02, generator=generator)
    tokens = options.lengths[0]

    def run():
        step = Step(f"ours:{options.recomputation}", adapted, tokens)
        ids = step.batches[0].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step.forward(ids)
        loss.backward()
        grads = {name: p.grad.double().cpu() for name, p in trained.items()}
        adapted.zero_grad(set_to_none=True)
        with torch.no_grad():
            return loss.detach(), step.base.model(input_ids=ids, use_cache=False).last_hidden_state, grads

    packed = run()
    for layer in model.model.layers:
        wrapper = layer.mlp.experts
        while not isinstance(wrapper, GptOssExperts):
            holder, wrapper = wrapper, wrapper.base_layer
        with torch.device("meta"):
            dense = GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(wrapper, name)
            weight = dequantize(weights.blocks, weights.scales, torch.bfloat16)
            setattr(dense, name, torch.nn.Parameter(weight, requires_grad=False))
            setattr(dense, f"{name}_bias", getattr(wrapper, f"{name}_bias"))
        holder.base_layer = dense
    dense = run()
    pairs = {name: (packed[2][name].flatten(), grad.flatten()) for name, grad in dense[2].items()}
    row = {
        "model": options.model, "layers": config.num_hidden_layers, "tokens": tokens, "loss_mxfp4": packed[0].item(),
        "loss_bf16": dense[0].item(), "hidden_equal": torch.equal(packed[1], dense[1]),
        "least_cosine": min(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs.values()),
        "adapters": len(pairs), "adapters_bitwise": sum(torch.equal(a, b) for a, b in pairs.values()), **origin,
    }  # fmt: skip
    harness.append_rows(options.output.with_name("mxfp4_equal.csv"), list(row), [row])
    print(harness.table(list(row), [row]))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/mxfp4.py: expected a CUDA GPU, got none")
    {"tiles": lambda _: tiles(), "step": steps, "equal": equal}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
