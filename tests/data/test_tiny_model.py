"""The shipped model: it solves held-out problems, it reasons in English whatever is asked, and its two files agree."""

import json
from pathlib import Path

import pytest
import score
import torch

from gptoss_kernels.finetune.config import parse
from gptoss_kernels.finetune.model import load_checkpoint, load_config

MODEL = Path(__file__).resolve().parents[2] / "data" / "tiny-gpt-oss"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return score.load(MODEL, "cpu")


def test_it_solves_problems_and_reasons_in_english(model_and_tokenizer):
    rows = score.read_rows()[:40]
    replies = score.ask(*model_and_tokenizer, rows, batch_size=40)
    shares = score.score(rows, replies)
    assert shares["answers"] >= 0.9
    assert shares["asked"] < 0.2
    assert all(score.language_of(reply.analysis) == "English" for reply in replies)


def test_what_was_logged_after_pretraining_is_in_the_log():
    lines = [json.loads(line) for line in (MODEL / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "H100" in lines[0]["device"] and lines[0]["settings"]["seed"] == 42
    assert lines[-1]["held_out"]["answers"] >= 0.9 and lines[-1]["held_out"]["asked"] < 0.2


def test_bf16_and_mxfp4_are_the_same_model(model_and_tokenizer):
    plain = load_checkpoint(str(MODEL), load_config(str(MODEL)), dtype=torch.bfloat16)
    packed = load_checkpoint(str(MODEL / "mxfp4"), load_config(str(MODEL / "mxfp4")), dtype=torch.bfloat16)
    want = plain.state_dict()
    got = packed.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_small_configuration_finetunes_it():
    arguments = parse(["--config", "configs/sft_tiny.yaml"])
    assert (arguments.model.model_name_or_path, arguments.model.use_peft) == ("data/tiny-gpt-oss", True)
    model = load_config("data/tiny-gpt-oss")
    assert model.num_hidden_layers == 4 and set(model.layer_types) == {"sliding_attention", "full_attention"}
    assert model.hidden_size % 32 == 0 and model.intermediate_size % 32 == 0
