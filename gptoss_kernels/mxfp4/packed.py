"""One projection of all experts, kept in MXFP4: takes the place of its weights in `gptoss_kernels.fused_experts`."""

import torch

from .reference import BYTES, GROUP


class PackedExperts:
    """Frozen weights of (experts, in, out) in 17/32 of a byte each.

    Args:
        blocks: uint8 (experts, out, in / 32, 16), two codes a byte with the first in the low nibble.
        scales: uint8 (experts, out, in / 32), exponents of two plus 127.
        dtype: of the model around them, which PEFT gives adapters; the weights are exact in bf16 and fp32.

    The tensors are kept as they are, and are not copied unless they are not contiguous.

    Raises:
        TypeError: another dtype than uint8.
        ValueError: shapes or devices that do not fit together.
    """

    requires_grad = False

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16):
        for name, tensor in (("blocks", blocks), ("scales", scales)):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8:
                got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected a torch.uint8 tensor, got {got}")
        if blocks.dim() != 4 or blocks.shape[3] != BYTES:
            raise ValueError(f"blocks: expected (experts, out, in / {GROUP}, {BYTES}), got {tuple(blocks.shape)}")
        if scales.shape != blocks.shape[:3]:
            raise ValueError(f"scales: expected shape {tuple(blocks.shape[:3])}, got {tuple(scales.shape)}")
        if scales.device != blocks.device:
            raise ValueError(f"scales: expected the device of blocks {blocks.device}, got {scales.device}")
        self.blocks, self.scales, self.dtype = blocks.contiguous(), scales.contiguous(), dtype

    @property
    def shape(self) -> torch.Size:
        """(experts, in, out): of the weights that are meant."""
        experts, out, groups, _ = self.blocks.shape
        return torch.Size((experts, groups * GROUP, out))

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def data(self):
        raise RuntimeError(
            "packed MXFP4 weights are frozen: to merge an adapter into them, load the model with its experts in bf16"
        )

    def dim(self) -> int:
        return 3

    def numel(self) -> int:
        return self.shape.numel()

    def __repr__(self) -> str:
        return f"PackedExperts(shape={tuple(self.shape)}, device={self.device})"
