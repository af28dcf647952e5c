"""Export, measured: time and peak memory on random weights of gpt-oss-20b's shapes, and what a finetuned model keeps.

python -m benchmarks.export size                    13 GiB of MXFP4, adapters on attention and router, to each format
python -m benchmarks.export size --targets attention,router,experts --to mxfp4      every expert quantized anew
python -m benchmarks.export kept outputs/sft_tiny   a finetuned small model: divergence and right answers, each format

Peak memory is the most that the exporting process had resident, its libraries and the pages of mapped files included.
Rows go to benchmarks/results/export.csv.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import harness

ROOT = Path(__file__).parents[1]
COLUMNS = [
    "model", "layers", "adapters", "to", "device", "base_gb", "written_gb", "seconds", "peak_host_gib", "tokens", "kl",
    "top1", "relative_error", "problems", "answers_trained", "answers", "asked_trained", "asked", "gpu", "cpus",
    "torch", "triton", "transformers", "date", "commit",
]  # fmt: skip
SIZE, KEPT = COLUMNS[:9], [*COLUMNS[:1], *COLUMNS[2:4], *COLUMNS[9:18]]
# In a process of its own: what it had resident is the export's alone.
CHILD = """
import json, resource, sys
from gptoss_kernels.finetune.export import export
report = export(sys.argv[1], sys.argv[2], sys.argv[3], device=sys.argv[4])
print(json.dumps({"seconds": report.seconds, "nbytes": report.nbytes, "error": report.quantization_error,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", choices=["size", "kept"])
    add("adapters", nargs="*", type=Path, help="kept: folders with adapters of sft.py")
    add("--model", default="gpt-oss-20b", help="size: shapes (default: %(default)s)")
    add("--layers", type=int, help="size: fewer than the model's, to try the script")
    add("--targets", default="attention,router", help="size: parts with adapters (default: %(default)s)")
    add("--to", default="mxfp4,bf16", help="formats (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--folder", type=Path, help="size: where there is room for three checkpoints of MXFP4 size and one of bf16")
    add("--rows", type=int, help="kept: problems to ask (default: all 400)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "export.csv", help="rows go here")
    options = parser.parse_args(arguments)
    if (options.what == "kept") != bool(options.adapters):
        parser.error("adapters: expected folders with kept, and none with size")
    return options


def random_checkpoint(folder: Path, model: str, layers: int | None) -> int:
    """Writes an MXFP4 checkpoint of random weights, one tensor at a time, and a tokenizer. Returns its bytes."""
    from gptoss_kernels.finetune.model import load_config, stored_shapes
    from gptoss_kernels.mxfp4.write import Group, write_checkpoint

    config = load_config(model, random=True)
    if layers:
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    folder.mkdir(parents=True)
    keys = {"quantization_config": {"quant_method": "mxfp4"}, "architectures": ["GptOssForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | keys, default=str))
    for path in (ROOT / "data" / "tokenizer").iterdir():
        shutil.copy(path, folder)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]):
        if name.endswith("_blocks"):
            for _ in range(shape[0]):
                yield torch.empty(shape[1:], dtype=torch.uint8).random_(0, 256, generator=generator)
        elif name.endswith("_scales"):
            yield torch.empty(shape, dtype=torch.uint8).random_(118, 121, generator=generator)
        else:
            yield torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    groups = []
    for name, shape in stored_shapes(config, packed=True).items():
        dtype = torch.uint8 if name.endswith(("_blocks", "_scales")) else torch.bfloat16
        groups.append(Group({name: shape}, dtype, lambda name=name, shape=shape: draw(name, shape)))
    write_checkpoint(folder, groups, 5 * 10**9)
    return sum(group.nbytes for group in groups)


def random_adapter(folder: Path, base: Path, targets: list[str], rank: int = 8) -> None:
    """Writes an adapter for the base as PEFT would, without the base in memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from gptoss_kernels.finetune.config import LORA_TARGETS
    from gptoss_kernels.finetune.model import load_config

    config = load_config(str(base))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = [name for part in targets if part != "attention" for name in LORA_TARGETS[part]]
    modules = LORA_TARGETS["attention"] if "attention" in targets else None
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, target_parameters=parameters or None)
    model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    state = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            state[name.replace(".default.", ".")] = torch.empty(parameter.shape).normal_(0, 0.01)
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    lora.base_model_name_or_path, lora.inference_mode = str(base), True
    lora.save_pretrained(folder)


def run_child(source: Path, to: str, out: Path, device: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), to, str(out), device],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"benchmarks/export.py: the export failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def origin() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return harness.provenance(device) | {"cpus": len(os.sched_getaffinity(0))}


def size(options: argparse.Namespace) -> list[dict]:
    rows = []
    targets = options.targets.split(",")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        start = time.perf_counter()
        nbytes = random_checkpoint(base, options.model, options.layers)
        print(f"{nbytes / 2**30:.2f} GiB of random weights in {time.perf_counter() - start:.0f} s", flush=True)
        random_adapter(adapter, base, targets)
        layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
        for to in options.to.split(","):
            result = run_child(adapter, to, out, options.device)
            rows.append(
                {
                    "model": options.model, "layers": layers, "adapters": "+".join(targets), "to": to,
                    "device": options.device, "base_gb": nbytes / 1e9, "written_gb": result["nbytes"] / 1e9,
                    "seconds": result["seconds"], "peak_host_gib": result["peak"] / 2**30,
                    "relative_error": result["error"] or None,
                }
            )  # fmt: skip
            print(harness.table(SIZE, rows[-1:]), flush=True)
            shutil.rmtree(out)
    return rows


def kept(options: argparse.Namespace) -> list[dict]:
    sys.path.insert(0, str(ROOT / "data"))
    import score

    from gptoss_kernels.finetune.compare import compare
    from gptoss_kernels.finetune.export import base_folder

    problems = score.read_rows()[: options.rows]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def shares(folder: Path) -> dict:
        model, tokenizer = score.load(folder, device)
        return score.score(problems, score.ask(model, tokenizer, problems))

    rows = []
    for adapter in options.adapters:
        base, trained = base_folder(adapter, None), shares(adapter)
        for to in options.to.split(","):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                result = run_child(adapter, to, out, options.device)
                found, got = compare(adapter, base, out), shares(out)
            parts = adapter_parts(adapter)
            rows.append(
                {
                    "model": str(base), "adapters": parts, "to": to, "device": options.device,
                    "layers": json.loads((base / "config.json").read_text())["num_hidden_layers"],
                    "written_gb": result["nbytes"] / 1e9, "seconds": result["seconds"],
                    "peak_host_gib": result["peak"] / 2**30, "relative_error": result["error"] or None,
                    "tokens": found.tokens, "kl": found.kl, "top1": found.top1, "problems": len(problems),
                    "answers_trained": trained["answers"], "answers": got["answers"],
                    "asked_trained": trained.get("asked"), "asked": got.get("asked"),
                }
            )  # fmt: skip
            print(harness.table(KEPT, rows[-1:]), flush=True)
    return rows


def adapter_parts(folder: Path) -> str:
    """The parts of the model that an adapter changes, joined by +."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = {match for name in file.keys() for match in re.findall(r"self_attn|router|experts", name)}
    return "+".join(sorted({"self_attn": "attention"}.get(part, part) for part in found))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = size(options) if options.what == "size" else kept(options)
    rows = [dict.fromkeys(COLUMNS) | row | origin() for row in rows]
    rows = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    harness.append_rows(options.output, COLUMNS, rows)
    print(f"{len(rows)} rows appended to {options.output}")


if __name__ == "__main__":
    main()
