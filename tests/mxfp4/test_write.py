"""Writing safetensors piece by piece."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptoss_kernels.mxfp4.read import read_tensors, weight_files
from gptoss_kernels.mxfp4.write import Group, write_checkpoint


def draw() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    bytes_ = {
        "x_blocks": torch.randint(0, 256, (2, 3, 1, 16), generator=generator),
        "x_scales": torch.randint(0, 256, (2, 3, 1), generator=generator),
        "odd": torch.randint(0, 256, (7,), generator=generator),
    }
    floats = {"y": torch.randn(5, 3, generator=generator), "z": torch.randn(1, generator=generator)}
    return {k: x.to(torch.uint8) for k, x in bytes_.items()} | {k: x.bfloat16() for k, x in floats.items()}


def groups_of(tensors) -> list[Group]:
    groups = [Group({k: tuple(x.shape)}, x.dtype, lambda x=x: x) for k, x in tensors.items() if k[0] != "x"]
    packed = {k: tensors[k] for k in ("x_blocks", "x_scales")}
    shapes = {k: tuple(x.shape) for k, x in packed.items()}
    return [Group(shapes, torch.uint8, lambda: (part for x in packed.values() for part in x)), *groups]


def test_one_file_is_what_safetensors_writes(tmp_path):
    tensors, seen = draw(), []
    files = write_checkpoint(tmp_path, groups_of(tensors), 10**6, seen.append)
    assert [file.name for file in files] == ["model.safetensors"] and len(seen) == 4
    got = load_file(files[0])
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], x) and got[name].dtype == x.dtype for name, x in tensors.items())
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with safe_open(files[0], "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()


def test_shards_and_their_index(tmp_path):
    tensors = draw()
    files = write_checkpoint(tmp_path, groups_of(tensors), 38)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_files(tmp_path) == files
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    sizes = {file.name: sum(x.nbytes for _, x in read_tensors([file])) for file in files}
    assert sizes == {files[0].name: 102, files[1].name: 37, files[2].name: 2}, "a group alone may be larger than a file"


@pytest.mark.parametrize(
    "pieces, message",
    [
        (lambda: [torch.zeros(3, dtype=torch.uint8)], "expected 4 bytes for w, got 3"),
        (lambda: [torch.zeros(5, dtype=torch.uint8)], "expected 4 bytes for w, got 5"),
        (lambda: [torch.zeros(4)], "expected torch.uint8 for w, got torch.float32"),
    ],
)
def test_pieces_that_do_not_fit(tmp_path, pieces, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path, [Group({"w": (4,)}, torch.uint8, pieces)], 100)
