"""A checkpoint's tensors as they are stored, file by file: packed experts stay packed."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of the checkpoint in a folder, each once.

    Raises:
        FileNotFoundError: there is neither a model.safetensors nor an index, or a file of the index is missing.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"folder: expected {SINGLE}, or all files of {INDEX}, got no {file}")
    return files


def read_tensors(files: Sequence[Path], device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the files, one at a time, in the dtype and the shape that it is stored in.

    Args:
        files: of `weight_files`.
        device: where the tensors are made; a file is mapped, so that the host never holds more than one tensor.
    """
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
