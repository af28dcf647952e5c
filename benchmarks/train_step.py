"""Speed, peak memory and where the time goes of one training step of gpt-oss, on random weights of real shapes.

python benchmarks/train_step.py                       ours, lean and as fast as memory allows, 8,192 and 16,384 tokens
python benchmarks/train_step.py --variants ours:auto,flex,flash_attention_4,eager --lengths 4096,8192,16384,32768
python benchmarks/train_step.py --training full --variants ours:lean,flex                 all weights, on one 141 GB GPU
python benchmarks/train_step.py --training full --variants ours:auto:on_host=1            the same, on one 80 GB GPU

A step is the whole step: one document of the full length, copied to the GPU, forward, backward, clipping, AdamW. With
all weights trained there is no clipping, and AdamW keeps 8-bit moments: ours inside the backward pass (configs/
sft_full_single.yaml), that of bitsandbytes for the others.
Variants:
  ours:lean|auto|fast  patch_gpt_oss and the fused loss; what is kept for the backward pass as sft.py's recomputation
  ours:...:on_host=SHARE    full: that share of the optimizer's moments waits in the host's memory
  flex, flash_attention_4   that attention, Transformers' grouped_mm, Liger's fused linear cross-entropy
  eager                     eager attention, grouped_mm, full logits
  ATTENTION/EXPERTS/LOSS    any mixture, such as gptoss_triton/grouped_mm/trl; LOSS is ours, trl, liger or logits
All with gradient checkpointing, bf16 weights, autocast as Trainer uses it, and LoRA r=8 on q, k, v, o or all weights
(ours then takes TRL's loss, for a trained LM head). Random routing is nearly balanced: the load (max over mean) is in
the row.
"""

import argparse
import contextlib
import gc
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from gptoss_kernels import patch_gpt_oss, unpatch_gpt_oss
from gptoss_kernels.testing import SHAPES, random_gpt_oss

COLUMNS = [
    "variant", "training", "model", "layers", "tokens", "tokens_per_second", "step_ms", "step_p20_ms", "step_p80_ms",
    "peak_gib", "mfu", "attention_ms", "grouped_gemm_ms", "gemm_ms", "loss_ms", "experts_ms", "norm_rope_ms",
    "other_ms", "idle_ms", "kept_attention", "kept_experts", "kept_whole", "load_max_over_mean", "loss", "packages",
    "gpu", "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SHOWN = COLUMNS[:2] + COLUMNS[4:7] + COLUMNS[9:22]

# variant -> attention, experts, loss
STACKS = {
    "flex": ("flex_attention", "grouped_mm", "liger"),
    "flash_attention_4": ("flash_attention_4", "grouped_mm", "liger"),
    "eager": ("eager", "grouped_mm", "logits"),
}
LOSSES = ("ours", "trl", "liger", "logits")
ON_HOST = r":on_host=(0?\.\d+|1)"
BESIDE = ("aten::", "Memcpy HtoD", "Memcpy DtoH")  # in a profile, no kernels: copies that run beside them

# GPU kernels by name; the first pattern that is found decides. GEMMs are those of projections and the LM head.
PARTS = {
    "grouped_gemm_ms": r"GroupProblemShape|grouped",
    "attention_ms": r"^(forward|dkdv|dq)(_hopper)?_kernel|[Ff]lash|FLASH|flex|softmax|triton_tem|cutlass.*[Aa]ttn",
    "loss_ms": r"cross_entropy|liger_",
    "gemm_ms": r"nvjet|gemm|cutlass|splitKreduce",
    "experts_ms": r"^(activation|combine|expert_sum)|gather_kernel|radix_sort|RadixSort|topk|TopK|searchsorted",
    "norm_rope_ms": r"^(rms_norm|rope)",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--variants", default="ours:lean,ours:auto", help="of ours:lean, ours:auto, ours:fast, flex, eager, "
        "flash_attention_4, ATTENTION/EXPERTS/LOSS")  # fmt: skip
    add("--training", default="lora", choices=["lora", "full"], help="LoRA on attention, or all weights")
    add("--lengths", default="8192,16384", help="tokens")
    add("--model", default="gpt-oss-20b", choices=list(SHAPES))
    add("--layers", type=int, help="fewer than the model's, to try the script")
    add("--steps", type=int, default=8, help="timed steps, >= 2")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "train_step.csv", help="rows go here")
    options = parser.parse_args(arguments)
    options.variants = options.variants.split(",")
    for variant in options.variants:
        known = rf"ours:(lean|auto|fast)({ON_HOST})?|{'|'.join(STACKS)}|\w+/\w+/({'|'.join(LOSSES)})"
        if not re.fullmatch(known, variant):
            parser.error(f"--variants: expected ours:lean, ours:auto, ours:fast, {', '.join(STACKS)} or "
                         f"ATTENTION/EXPERTS/LOSS, got {variant!r}")  # fmt: skip
        if re.search(ON_HOST, variant) and options.training != "full":
            parser.error(f"--variants: on_host needs --training full, got {variant!r}")
    try:
        options.lengths = [int(part) for part in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: expected integers with commas between, got {options.lengths!r}")
    if options.steps < 2:
        parser.error(f"--steps: expected >= 2, got {options.steps}")
    options.layers = options.layers or SHAPES[options.model]["num_hidden_layers"]
    return options


def model_flops(config, tokens: int, training: str = "lora") -> float:
    """FLOPs that a step needs: products of active weights forward, for the gradient of their input and, if all are
    trained, for their own; attention over the keys that each layer's window lets through, and 2.5 times that backward.
    """
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * width + 2 * kv) + 3 * config.num_experts_per_tok * hidden * config.intermediate_size
    layer += hidden * config.num_local_experts
    weights = config.num_hidden_layers * layer + config.vocab_size * hidden
    pairs = 0
    for kind in config.layer_types:
        window = min(config.sliding_window, tokens) if kind == "sliding_attention" else tokens
        pairs += window * (window + 1) // 2 + (tokens - window) * window
    return (4.0 if training == "lora" else 6.0) * weights * tokens + 3.5 * 4.0 * width * pairs


class Step:
    """One variant of the training step, set up on the model."""

    def __init__(self, variant: str, model, tokens: int, training: str = "lora", offload: bool = False):
        """offload: layers' inputs wait for the backward pass in the host's memory (activation_offloading)."""
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

        self.variant, self.model, self.tokens, self.training = variant, model, tokens, training
        self.base = next(module for module in model.modules() if isinstance(module, GptOssForCausalLM))
        self.chooser = None
        unpatch_gpt_oss(model)
        vars(self.base).pop("forward", None)  # TRL's, of an earlier variant
        model.train()
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if variant.startswith("ours"):
            patch_gpt_oss(model)
            self.loss = "ours" if training == "lora" else "trl"
            self.recompute(variant.split(":")[1])
        else:
            attention, experts, self.loss = STACKS.get(variant) or variant.split("/")
            self.base.set_attn_implementation(attention)
            self.base.set_experts_implementation(experts)
        if self.loss == "trl":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(self.base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = trained
        if training == "lora":
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        elif variant.startswith("ours"):
            from gptoss_kernels.finetune.optimizer import AdamW8bit

            share = re.search(ON_HOST, variant)
            self.optimizer = AdamW8bit(trained, lr=1e-5, in_backward=True, on_host=float(share[1]) if share else 0.0)
        else:
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(trained, lr=1e-5)
        self.offloading = contextlib.nullcontext()
        if offload:
            from trl.models.activation_offloading import get_act_offloading_ctx_manager

            self.offloading = get_act_offloading_ctx_manager(model)
        generator = torch.Generator().manual_seed(0)
        vocab = self.base.config.vocab_size
        self.batches = [torch.randint(0, vocab, (1, tokens), generator=generator).pin_memory() for _ in range(3)]

    def recompute(self, mode: str) -> None:
        from gptoss_kernels.finetune.recompute import Recomputation

        chooser = Recomputation(self.base, mode, self.tokens)
        chooser.apply(*((len(chooser.layers),) * 3 if mode == "fast" else (0, 0)))
        self.chooser, self.automatic = chooser, mode == "auto"

    def settle(self) -> None:
        """After each of the first steps: what its peak leaves free is used."""
        if self.chooser and self.automatic:
            self.chooser.use_free_memory(torch.device("cuda"))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.loss == "logits":
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        if self.loss == "trl":
            return self.model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        hidden = self.base.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        if self.loss == "ours":
            from gptoss_kernels.layers.loss import linear_cross_entropy

            return linear_cross_entropy(hidden, self.base.lm_head.weight, ids[0, 1:])[0].mean()
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, self.base.lm_head.weight, ids[0, 1:])

    def __call__(self, n: int) -> torch.Tensor:
        ids = self.batches[n % 3].to("cuda", non_blocking=True)
        with self.offloading:
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.forward(ids)
            loss.backward()
        if self.training == "lora":
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(step: Step, options: argparse.Namespace) -> dict:
    """Median time of a step, its peak memory, and its parts by the profiler."""
    device = torch.device("cuda")
    for n in range(3 if step.chooser and step.automatic else 2):
        step(n)
        step.settle()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for n in range(options.steps):
        start = time.perf_counter()
        loss = step(n)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    median, p20, p80 = harness.percentiles(times)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(0)
        torch.cuda.synchronize()
    parts = dict.fromkeys([*PARTS, "other_ms"], 0.0)
    top = []
    for event in profile.key_averages():
        if event.device_type.name != "CUDA" or event.key.startswith(BESIDE):
            continue
        name = next((part for part, pattern in PARTS.items() if re.search(pattern, event.key)), "other_ms")
        parts[name] += event.self_device_time_total / 1e3
        top.append((event.self_device_time_total / 1e3, event.count, event.key[:90]))
    parts["idle_ms"] = max(0.0, median - sum(parts.values()))
    print(f"{step.variant}, {step.tokens} tokens: top ten of {sum(t for t, _, _ in top):.0f} ms")
    for ms, count, name in sorted(top, reverse=True)[:10]:
        print(f"  {ms:8.2f} ms  {count:5d}x  {name}")
    flops = model_flops(step.base.config, step.tokens, options.training)
    return {
        "tokens_per_second": round(step.tokens / median * 1e3), "step_ms": median, "step_p20_ms": p20,
        "step_p80_ms": p80, "peak_gib": peak, "mfu": flops / median / 1e-3 / 989e12, **parts,
        **{f"kept_{name}": getattr(step.chooser, name, None) for name in ("attention", "experts", "whole")},
        "loss": loss.item(),
    }  # fmt: skip


@torch.no_grad()
def load(base, tokens: int) -> float:
    """Largest over mean number of tokens of an expert in the first layer."""
    loads = []
    handle = base.model.layers[0].mlp.router.register_forward_hook(lambda module, args, out: loads.append(out[2]))
    base.model(input_ids=torch.randint(0, base.config.vocab_size, (1, tokens), device="cuda"), use_cache=False)
    handle.remove()
    count = torch.bincount(loads[0].flatten(), minlength=base.config.num_local_experts).float()
    return (count.max() / count.mean()).item()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/train_step.py: expected a CUDA GPU, got none")
    from peft import LoraConfig, get_peft_model

    origin = harness.provenance(torch.device("cuda"))
    print(" · ".join(f"{key} {value}" for key, value in origin.items()))
    model = random_gpt_oss(
        options.model, device="cuda", dtype=torch.bfloat16, attn_implementation="gptoss_triton",
        experts_implementation="gptoss_triton", num_hidden_layers=options.layers,
    )  # fmt: skip
    if options.training == "lora":
        model.enable_input_require_grads()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        trained = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    else:
        trained = model.requires_grad_()
    balance = load(model, 4096)
    names = ("peft", "liger-kernel", "trl", "flash-attn-4", "bitsandbytes")
    packages = " ".join(f"{name} {harness.version(name)}" for name in names if harness.version(name))
    rows = []
    for tokens in options.lengths:
        for variant in options.variants:
            gc.collect()
            torch.cuda.empty_cache()
            step = Step(variant, trained, tokens, options.training)
            try:
                result = measure(step, options)
            except Exception as error:  # running out of memory is what eager does; ours must not
                trained.zero_grad(set_to_none=True)
                if variant.startswith("ours"):
                    raise
                print(f"{variant}: {tokens} tokens: no row, {type(error).__name__}: {str(error).splitlines()[0][:150]}")
                continue
            finally:
                if hasattr(step.optimizer, "remove_hooks"):
                    step.optimizer.remove_hooks()
                del step
            row = {
                "variant": variant, "training": options.training, "model": options.model, "layers": options.layers,
                "tokens": tokens, **result, "load_max_over_mean": balance, "packages": packages, **origin,
            }  # fmt: skip
            rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
            harness.append_rows(options.output, COLUMNS, rows[-1:])
            print(harness.table(SHOWN, rows[-1:]), flush=True)
    print(f"\n{harness.table(SHOWN, rows)}\n\n{len(rows)} rows appended to {options.output}")


if __name__ == "__main__":
    sys.exit(main())
