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
    experts, out, groups, _ = blocks.shape
    weight = torch.empty(experts, groups * GROUP, out, dtype=dtype, device=blocks.device)
    for expert in range(experts):  # the codes take 32 bits each while they are looked up
        codes = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1).flatten(-2).int()  # [out, groups, 32]
        scale = torch.exp2(scales[expert].float() - 127)
        weight[expert] = (values[codes] * scale[..., None]).flatten(-2).T
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
    groups = weight.detach().float().mT.unflatten(-1, (-1, GROUP))  # [experts, out, in / 32, 32]
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
    size = (groups / scale).abs().contiguous()
    magnitudes = torch.tensor(MAGNITUDES, device=groups.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    middles[1::2] = middles[1::2].nextafter(magnitudes[0])  # a tie falls below: here it goes up, to the even code
    codes = torch.bucketize(size, middles)
    error = ((magnitudes[codes] - size) * scale).square().sum(-1)
    return (codes + 8 * (groups < 0)).to(torch.uint8), error
