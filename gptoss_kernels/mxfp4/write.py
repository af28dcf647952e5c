"""safetensors files written piece by piece: what a shard holds never is in memory at once, as it would have to be for
`safetensors.torch.save_file`.

Source: the format as documented by safetensors: the header's length in 8 bytes, a JSON header, the tensors' bytes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .read import INDEX, SINGLE

DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype that are made together, and go into one file one behind the other.

    Args:
        shapes: of each tensor, by its name.
        dtype: of all, torch.bfloat16 or torch.uint8.
        pieces: gives their elements in order, in tensors of any size.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(_count(shape) for shape in self.shapes.values()) * self.dtype.itemsize


def write_checkpoint(
    folder: Path, groups: Sequence[Group], shard_bytes: int, written: Callable[[Group], object] = lambda group: None
) -> list[Path]:
    """Writes model.safetensors, or model-0000N-of-0000M.safetensors and their index, as Transformers names them.

    Args:
        folder: is there.
        groups: in the order in which they fill the shards.
        shard_bytes: of tensors in one file, at most, unless one group has more.
        written: is called with each group after it.

    Returns:
        The files with tensors.

    Raises:
        ValueError: a group gave more or fewer bytes than its shapes say, or another dtype.
        OSError: the disk is full, or cannot be written.
    """
    shards, size = [[]], 0
    for group in groups:
        if shards[-1] and size + group.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, written)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(group.nbytes for group in groups)},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for g in shard for key in g.shapes
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _write_shard(path: Path, shard: list[Group], written: Callable[[Group], object]) -> None:
    shard = sorted(shard, key=lambda group: -group.dtype.itemsize)  # bytes last: every tensor stands aligned
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for group in shard:
        for name, shape in group.shapes.items():
            end = place + _count(shape) * group.dtype.itemsize
            header[name] = {"dtype": DTYPES[group.dtype], "shape": list(shape), "data_offsets": [place, end]}
            place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in shard:
            start = file.tell()
            for piece in group.pieces():
                if piece.dtype != group.dtype:
                    raise ValueError(f"pieces: expected {group.dtype} for {', '.join(group.shapes)}, got {piece.dtype}")
                file.write(piece.detach().contiguous().flatten().cpu().view(torch.uint8).numpy())
            if file.tell() - start != group.nbytes:
                raise ValueError(
                    f"pieces: expected {group.nbytes} bytes for {', '.join(group.shapes)}, got {file.tell() - start}"
                )
            written(group)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
