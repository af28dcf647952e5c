"""A gpt-oss small enough to train in seconds, and runs of it."""

import json
import random
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "model_type": "gpt_oss",
    "vocab_size": 2048,  # the shipped tokenizer has fewer
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    # As in gpt-oss's own config.json, so that tests notice if it takes effect.
    "router_aux_loss_coef": 0.9,
}


@pytest.fixture(autouse=True)
def reference_attention(monkeypatch):
    """Training through the interpreter would take hours; the kernels' numbers have tests of their own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> str:
    """A .json file with the small model's shapes."""
    path = tmp_path_factory.mktemp("shapes") / "small.json"
    path.write_text(json.dumps(SHAPES))
    return str(path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """A folder with 120 of the shipped train rows and 30 of the test rows."""
    return some_rows(tmp_path_factory.mktemp("rows"), train=120, test=30)


def some_rows(folder: Path, **splits: int) -> str:
    """Writes that many of the shipped rows of each split into the folder."""
    for split, rows in splits.items():
        lines = (ROOT / "data" / "reasoning" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(random.Random(0).sample(lines, rows)), encoding="utf-8")
    return str(folder)


@pytest.fixture
def settings(shapes, dataset, tmp_path):
    """Makes the settings of a short run on the CPU; keyword arguments are keys, lists several values."""
    from gptoss_kernels.finetune.config import parse

    def make(**keys):
        defaults = {
            "model_name_or_path": shapes,
            "model_init": "random",
            "dataset_name": dataset,
            "output_dir": str(tmp_path / "run"),
            "dtype": "float32",
            "bf16": "false",
            "use_cpu": "true",
            "packing": "true",
            "max_length": 384,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_checkpointing": "false",
            "max_steps": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": "true",
        }
        argv = []
        for key, value in (defaults | keys).items():
            argv += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
        return parse(argv)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped tokenizer, as a run loads it."""
    from gptoss_kernels.finetune.data import load_tokenizer

    return load_tokenizer("data/tokenizer", conversation_date="2025-06-28")


@pytest.fixture
def fresh(tmp_path):
    """A copy of a folder that a test may change."""

    def copy(source) -> Path:
        return Path(shutil.copytree(source, tmp_path / "copy"))

    return copy
