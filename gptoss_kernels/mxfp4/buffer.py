"""Packed experts made dense in one buffer, which all layers of a device take in turns."""

import torch

from .dequantize import launch_dequantize
from .reference import GROUP

_buffers: dict[tuple, torch.Tensor] = {}


def dense(weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight (experts, in, out) itself, or where it has scales, what its blocks mean.

    The latter is valid until the next call on its device and stream. The buffer is as large as the largest weight so
    far and is kept: freed and taken again, its place would fall to smaller tensors and the memory in pieces.
    """
    if scales is None:
        return weight
    experts, rows, groups, _ = weight.shape
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
    key = weight.device, stream
    size = experts * rows * groups * GROUP * dtype.itemsize
    if key not in _buffers or _buffers[key].numel() < size:
        _buffers.pop(key, None)
        _buffers[key] = torch.empty(size, dtype=torch.uint8, device=weight.device)
    out = _buffers[key][:size].view(dtype).view(experts, groups * GROUP, rows)
    launch_dequantize(weight, scales, out)
    return out


def release() -> None:
    """Frees the buffers of all devices; the next packed layer makes a new one."""
    _buffers.clear()
