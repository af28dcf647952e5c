"""What chapters that train use: replies in batches, the judge of languages, and runs that never download unasked."""

import json

import pytest
import torch

pytest.importorskip("trl", reason="training needs the training extra")

from transformers import AutoModelForCausalLM, AutoTokenizer

from gptoss_kernels.course import show, training
from gptoss_kernels.course.show import ROOT
from gptoss_kernels.finetune.sample import reply

TINY = ROOT / "data" / "tiny-gpt-oss"


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def rows():
    def read(split):
        return [
            json.loads(line) for line in (ROOT / "data/reasoning" / f"{split}.jsonl").read_text("utf-8").splitlines()
        ]

    return {"train": read("train")[:1000], "test": read("test")}


def test_a_batch_gets_the_replies_that_each_prompt_gets_alone(rows):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="gptoss_triton")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    some = rows["test"][:3]
    assert len({len(row["user"]) for row in some}) == 3, "prompts of one length would need no padding"
    together = training.ask(model, tokenizer, [row["messages"][:-1] for row in some])
    alone = [reply(model, tokenizer, row["user"], system=row["developer"]) for row in some]
    assert together == alone and all(training.channels(text).keys() == {"analysis", "final"} for text in together)


def test_the_judge(rows):
    judge = training.Judge(rows["train"])
    assert [judge.language_of(row["analysis"]) for row in rows["test"]] == [
        row["reasoning_language"] for row in rows["test"]
    ]
    assert judge.language_of("12 + 3 = 15") is None and judge.language_of("") is None


def test_score_counts_by_the_language_asked_for(rows):
    def text(analysis, final, end="<|return|>"):
        return (
            f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{final}{end}"
        )

    french = next(row for row in rows["test"] if row["reasoning_language"] == "French")
    german = next(row for row in rows["test"] if row["reasoning_language"] == "German")
    judge = training.Judge(rows["train"])
    replies = [
        text(french["analysis"], french["final"]),
        text(german["analysis"], french["final"]),
        text(french["analysis"], "7 and then 8"),
        text(french["analysis"], french["final"], end=""),
    ]
    counts = judge.score([french] * 4, replies)
    assert counts["French"] == {"problems": 4, "right": 2, "asked": 2}
    assert counts["German"] == {"problems": 0, "right": 0, "asked": 0}


def test_finetune_downloads_nothing_unasked(tmp_path):
    options = ["--model_name_or_path", "nobody/no-such-model", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(RuntimeError, match="nobody/no-such-model is no folder here, and download is False"):
        training.finetune(options)


def test_finetune_says_little_and_its_result_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--config", "configs/sft_tiny.yaml", "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    options += ["--eval_strategy", "no", "--eval_on_start", "false", "--logging_steps", "1", "--disable_tqdm", "true"]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"user": "2 + 3?", "analysis": "2 + 3 = 5.", "final": "5"}) + "\n")
    training.finetune([*options, "--dataset_name", str(data), "--use_cpu", "true"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["step", "step", "model:", "trained:"]
    tuned = training.load_result("data/tiny-gpt-oss", tmp_path / "out", "cpu", torch.float32)
    assert any(b.abs().max() > 0 for name, b in tuned.named_parameters() if "lora_B" in name)


def test_decorated_functions_are_shown_as_they_are_written(monkeypatch):
    shown = []
    monkeypatch.setattr(show, "display", lambda markdown: shown.append(markdown.data))
    show.source(training.ask, start="longest, pad", end="left")
    assert shown[0].startswith("`gptoss_kernels/course/training.py`, lines ") and "pad_token_id" in shown[0]
