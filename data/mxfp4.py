"""OpenAI's MXFP4 layout, written: 32 weights share a power of two, each is one of eight magnitudes with a sign."""

import json
import shutil
from pathlib import Path

import torch

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest MXFP4 weight; the group's power of two is the largest that its greatest weight does not fall below 4.

    Args:
        weight: (experts, in, out) as Transformers keeps it, in a multiple of 32; any floating dtype.

    Returns:
        blocks uint8 (experts, out, in / 32, 16), two codes a byte with the first in the low nibble, and
        scales uint8 (experts, out, in / 32), exponents of two plus 127.
    """
    groups = weight.detach().float().mT.unflatten(-1, (-1, GROUP))  # [experts, out, in / 32, 32]
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 3  # the greatest weight lies in [4, 8) after division
    exponent = exponent.clamp(-126, 127)
    scaled = groups * torch.exp2(-exponent.float())[..., None]
    magnitudes = torch.tensor(MAGNITUDES, device=weight.device)
    codes = torch.bucketize(scaled.abs().contiguous(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight that `quantize`'s results mean: (experts, in, out) fp32, exact in bf16."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()  # [experts, out, in / 32, 32]
    values = torch.tensor((*MAGNITUDES, *(-x for x in MAGNITUDES)), device=blocks.device)[codes]
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).mT


def straight_through(weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to MXFP4, whose gradient is taken as the weight's own."""
    return dequantize(*quantize(weight)) + (weight - weight.detach())


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
