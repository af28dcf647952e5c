"""The small model's weights in OpenAI's MXFP4 layout: rounded while it is pretrained, and written beside bf16."""

import json
import shutil
from pathlib import Path

import torch

from gptoss_kernels.mxfp4.reference import dequantize, quantize

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def straight_through(weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to MXFP4, whose gradient is taken as the weight's own."""
    return dequantize(*quantize(weight), torch.float32) + (weight - weight.detach())


def write_twin(source: Path, target: Path) -> None:
    """Writes the checkpoint in `source` to `target` with its experts in MXFP4, everything else as it is.

    The twin is the same model if the experts' weights are MXFP4 numbers already.
    """
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.rpartition(".")[2] in EXPERT_WEIGHTS:
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = (x.contiguous() for x in quantize(tensor))
        else:
            stored[name] = tensor
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.is_file() and path.name not in ("model.safetensors", "config.json", "log.jsonl", "loss.png"):
            shutil.copy(path, target / path.name)
