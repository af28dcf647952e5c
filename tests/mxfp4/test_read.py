"""Reading a checkpoint as it is stored."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gptoss_kernels.mxfp4.read import read_tensors, weight_files


def test_files_of_an_index_and_their_tensors(tmp_path):
    blocks = torch.randint(0, 256, (2, 4, 1, 16), dtype=torch.uint8)
    others = {"y": torch.ones(3).bfloat16(), "z": torch.ones(1)}
    parts = {"b.safetensors": {"x_blocks": blocks}, "a.safetensors": others}
    names = {}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
        names |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    files = weight_files(tmp_path)
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    found = dict(read_tensors(files))
    assert found.keys() == {"x_blocks", "y", "z"}
    assert torch.equal(found["x_blocks"], blocks) and found["x_blocks"].dtype == torch.uint8
    assert found["y"].dtype == torch.bfloat16
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="got no .*b.safetensors"):
        weight_files(tmp_path)


def test_a_single_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        weight_files(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [name for name, _ in read_tensors(weight_files(tmp_path))] == ["x"]
