"""What is loaded is data: safetensors and JSON, no pickles, and nobody's code unless it is asked for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for place in ("gptoss_kernels", "benchmarks", "data", "sft.py", "generate.py")
    for path in ((ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place])
)
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def findings(source: str) -> list[str]:
    """What in a file's code would run code that comes with data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found += [f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        keys = {key.arg: key.value for key in node.keywords}
        constant = {name: value.value for name, value in keys.items() if isinstance(value, ast.Constant)}
        called = ast.unparse(node.func)
        if called == "torch.load" and constant.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called.endswith(".load") and constant.get("allow_pickle"):
            found.append(f"line {node.lineno}: allow_pickle")
        if constant.get("trust_remote_code"):
            found.append(f"line {node.lineno}: trust_remote_code")
        if constant.get("use_safetensors") is False:
            found.append(f"line {node.lineno}: use_safetensors=False")
        if called in ("eval", "exec"):
            found.append(f"line {node.lineno}: {called}")
    return found


def test_no_file_loads_code_with_data():
    assert len(FILES) > 60
    found = {str(path.relative_to(ROOT)): findings(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, use_safetensors=False)",
        "eval(text)",
    ],
)
def test_it_would_be_noticed(source):
    assert len(findings(source)) == 1
    assert not findings("torch.load(path, weights_only=True)")


def test_the_settings_trust_no_remote_code():
    pytest.importorskip("trl")
    from gptoss_kernels.finetune.config import ModelArguments

    assert not getattr(ModelArguments(), "trust_remote_code", False)  # newer TRLs have no such key


def test_a_pickled_checkpoint_is_refused(tmp_path):
    pytest.importorskip("trl")
    import shutil

    import torch

    from gptoss_kernels.finetune.errors import SetupError
    from gptoss_kernels.finetune.model import load_config, load_packed

    source = ROOT / "data" / "tiny-gpt-oss" / "mxfp4"
    shutil.copy(source / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SetupError, match="expected model.safetensors"):
        load_packed(str(tmp_path), load_config(str(tmp_path)))
