"""Pretrain data/tiny-gpt-oss on one GPU with this project's kernels, on the corpus of corpus.py.

    python data/pretrain.py                               # about 3 minutes on an H100
    python data/pretrain.py --steps 20 --length 2048 --output /tmp/tiny      # a look at it, on a CPU too

Weights are fp32 and computed with in bf16 (on a CPU in fp32). For the last steps the experts' weights are rounded to
MXFP4 in every forward pass and trained through the rounding, so that the model's bf16 and MXFP4 files hold the same
numbers. Written to the output folder: config.json, model.safetensors, the tokenizer, log.jsonl, loss.png, and mxfp4/,
the same model in OpenAI's layout. At the end the held-out problems are answered.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from corpus import make_packed
from mxfp4 import EXPERT_WEIGHTS, straight_through, write_twin
from score import ask, read_rows, score, table
from tokenizers import Tokenizer
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptoss_kernels import patch_gpt_oss

HERE = Path(__file__).resolve().parent
SHAPES = HERE.parent / "configs" / "models" / "gpt-oss-tiny.json"
TOKENIZER = HERE / "tokenizer"
LOG_EVERY = 50


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "tiny-gpt-oss", help="folder (default: %(default)s)")
    parser.add_argument("--shapes", type=Path, default=SHAPES, help="a config.json (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="end earlier, with the schedule's end, after so long")
    parser.add_argument("--length", type=int, default=65536, help="tokens a step, packed (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="the highest (default: %(default)s)")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="of matrices (default: %(default)s)")
    parser.add_argument("--balance", type=float, default=0.01, help="router's loss, its weight (default: %(default)s)")
    parser.add_argument("--round_from", type=float, default=0.6, help="share of steps in full (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="that write the corpus")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


_worker: dict = {}


def _start_worker(seed: int, length: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(seed=seed, length=length, tokenizer=Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")))


def _work(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return make_packed(index, **_worker)


def learning_rate(progress: float, highest: float) -> float:
    """Linear over the first 2%, then a cosine down to a hundredth."""
    if progress < 0.02:
        return highest * max(progress, 1e-4) / 0.02
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)) / 2)


def computed_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype, rounded: bool) -> dict[str, torch.Tensor]:
    """The weights that the forward pass uses: in dtype, those of the experts rounded to MXFP4 if asked."""
    return {
        name: (straight_through(w) if rounded and name.rpartition(".")[2] in EXPERT_WEIGHTS else w).to(dtype)
        for name, w in weights.items()
    }


def packed_inputs(packed, device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's inputs for one packed row, and its labels (length,), -100 where nothing is learned."""
    ids, learned, cu_seqlens = (torch.from_numpy(x) for x in packed)
    ids = ids.to(device, torch.int64)
    cu_seqlens = cu_seqlens.to(device)
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    positions = torch.arange(len(ids), device=device) - starts.repeat_interleave(lengths, output_size=len(ids))
    labels = ids.masked_fill(~learned.to(device), -100)
    labels[starts] = -100  # the first token of a document follows nothing
    longest = int(np.diff(packed[2]).max())
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, labels


def train(model, args: argparse.Namespace, corpus, log) -> dict[str, torch.Tensor]:
    """Trains for args.steps steps, and returns the final weights in fp32."""
    device = model.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
    matrices = [w for w in weights.values() if w.ndim >= 2]
    others = [w for w in weights.values() if w.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    model.train()
    began = lap = time.perf_counter()
    sums, counted = torch.zeros(2, device=device), 0
    with tqdm(total=args.steps, unit="step") as bar:
        for step, packed in enumerate(corpus, 1):
            progress = (step - 1) / args.steps
            if args.minutes:
                progress = max(progress, (time.perf_counter() - began) / (60 * args.minutes))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(min(progress, 1.0), args.learning_rate)
            inputs, labels = packed_inputs(packed, device)
            used = computed_weights(weights, dtype, rounded=progress >= args.round_from)
            output = functional_call(
                model, used, kwargs={**inputs, "output_router_logits": True, "use_cache": False}, tie_weights=False
            )
            loss = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), labels[1:])
            (loss + args.balance * output.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            sums += torch.stack([loss.detach(), output.aux_loss.detach()])
            counted += 1
            bar.update()
            last = step == args.steps or progress >= 1
            if step % LOG_EVERY == 0 or last:
                mean = (sums / counted).tolist()
                now = time.perf_counter()
                entry = {
                    "step": step,
                    "num_input_tokens_seen": step * args.length,
                    "loss": round(mean[0], 5),
                    "balance": round(mean[1], 4),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "tokens_per_second": round(counted * args.length / (now - lap)),
                    "seconds": round(now - began, 1),
                }
                log(entry)
                bar.set_postfix(loss=f"{mean[0]:.4f}", tokens_per_s=f"{entry['tokens_per_second']:,}")
                sums.zero_()
                counted, lap = 0, now
            if last:
                break
    return {name: w.detach() for name, w in weights.items()}


def save(model, weights: dict[str, torch.Tensor], output: Path) -> None:
    """Writes the model in bf16, its experts rounded to MXFP4 first, and its twin to output/mxfp4."""
    stored = computed_weights(weights, torch.bfloat16, rounded=True)
    for name, parameter in model.named_parameters():
        parameter.data = stored[name]  # not model.to(): that would round the rotary frequencies too
    model.save_pretrained(output)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, output / path.name)
    write_twin(output, output / "mxfp4")


def main() -> None:
    args = arguments()
    # Before anything touches the GPU: the processes that write the corpus are forked from this one.
    pool = multiprocessing.get_context("fork").Pool(args.workers, _start_worker, (args.seed, args.length))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = AutoConfig.for_model(**json.loads(args.shapes.read_text(encoding="utf-8")))
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="gptoss_triton", experts_implementation="gptoss_triton"
    ).to(device)
    patch_gpt_oss(model)
    print(f"{model.num_parameters():,} parameters, {args.steps * args.length / 1e6:.0f} M tokens at most, on {device}")

    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "log.jsonl", "w", encoding="utf-8") as file, pool:

        def log(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        del setting["output"], setting["shapes"], setting["workers"]
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        log({"settings": setting, "device": where, "torch": torch.__version__, "parameters": model.num_parameters()})
        weights = train(model, args, pool.imap(_work, range(args.steps)), log)
        pool.terminate()
        save(model, weights, args.output)
        rows = read_rows()
        shares = score(rows, ask(model, tokenizer, rows, batch_size=400 if device.type == "cuda" else 50))
        log({"held_out": {name: round(share, 4) for name, share in shares.items()}})
    print(table({str(args.output): shares}))
    plot(args.output)


def plot(folder: Path) -> None:
    """Draws folder/loss.png from folder/log.jsonl."""
    from gptoss_kernels.finetune.report import plot_loss

    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    try:
        plot_loss([entry for entry in map(json.loads, lines) if "loss" in entry], folder / "loss.png")
    except ModuleNotFoundError as error:
        print(f"loss.png is not drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
