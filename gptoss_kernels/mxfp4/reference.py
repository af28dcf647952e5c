"""The definition of MXFP4 in plain PyTorch: 32 weights share a power of two, each is one of eight magnitudes, signed.

Source: OCP Microscaling Formats (MX) Specification 1.0, E2M1 elements and E8M0 scales; the layout of two codes a byte
and of gpt-oss's tensors is that of openai/gpt-oss-20b.
"""

import torch

GROUP = 32  # weights that share a scale
BYTES = GROUP // 2  # of a group: two codes a byte, the first in the low nibble
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weights that blocks and scales mean, as Transformers keeps them: transposed to (experts, in, out).

    Args:
        blocks: uint8 (experts, out, in / 32, 16).
        scales: uint8 (experts, out, in / 32), exponents of two plus 127. 255, the standard's NaN, gives inf or NaN.
        dtype: of the result; exact in bf16 and fp32, rounded in fp16.

    Returns:
        (experts, in, out), contiguous, on the device of blocks.
    """
    values = torch.tensor((*MAGNITUDES, *(-x for x in MAGNITUDES)), device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = values[torch.stack([byte & 15, byte >> 4], dim=-1)]  # [256, 2]
    experts, out, groups, _ = blocks.shape
    weight = torch.empty(experts, groups * GROUP, out, dtype=dtype, device=blocks.device)
    for expert in range(experts):  # in fp32, one at a time
        unscaled = torch.nn.functional.embedding(blocks[expert].int(), pairs).flatten(-2)  # [out, groups, 32]
        weight[expert] = (unscaled * torch.exp2(scales[expert].float() - 127)[..., None]).flatten(-2).T
    return weight


def quantize(weight: torch.Tensor, *, best_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest MXFP4 weight for the scale of its group, ties to the even code (0, 1, 2 or 4).

    The group's power of two is 2 ** (floor(log2 of its greatest magnitude) - 2), the standard's rule: the greatest
    weight lies in [4, 8) times it, and what lies above 6 becomes 6. MXFP4 numbers come back as they were.

    Args:
        weight: (experts, in, out) as Transformers keeps it, in a multiple of 32; any floating dtype.
        best_scale: take twice the standard's power of two where the group's squared error is smaller with it.

    Returns:
        blocks uint8 (experts, out, in / 32, 16) and scales uint8 (experts, out, in / 32), as `dequantize` takes them.
    """
    groups = weight.detach().float().mT.contiguous().unflatten(-1, (-1, GROUP))  # [experts, out, in / 32, 32]
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 3  # the greatest weight lies in [4, 8) after division
    exponent = exponent.clamp(-126, 127)
    codes, error = _round(groups, exponent)
    if best_scale:
        above = (exponent + 1).clamp(max=127)
        others, error_above = _round(groups, above)
        better = error_above < error
        exponent, codes = torch.where(better, above, exponent), torch.where(better[..., None], others, codes)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def _round(groups: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes of the numbers nearest to groups (..., 32), and the sum of squared errors (...)."""
    scale = torch.exp2(exponent.float())[..., None]
    size = (groups / scale).abs()
    above_2, above_4 = (size >= 2).float(), (size >= 4).float()
    step = (0.5 + 0.5 * above_2).add_(above_4)  # 0.5 below 2, 1 below 4, 2 below 8: what the numbers lie apart there
    steps = (size / step).round_()  # ties to even
    codes = (steps + 2 * above_2).add_(above_4, alpha=2).clamp_(max=7)  # 4 steps to each power of two, 2 of them new
    error = (steps * step).clamp_(max=MAGNITUDES[-1]).sub_(size).mul_(scale).square_().sum(-1)
    return codes.add_(groups < 0, alpha=8).to(torch.uint8), error
