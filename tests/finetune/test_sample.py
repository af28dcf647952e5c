"""Replies: channels apart, batches, and the same tokens as eager attention and experts."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gptoss_kernels.finetune import harmony
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.model import load_checkpoint, load_config
from gptoss_kernels.finetune.sample import (
    ChannelStreamer,
    answer,
    channels,
    read_prompts,
    render,
    replies,
    reply,
    stream,
)

MODEL = "data/tiny-gpt-oss"
PROMPTS = [
    "Anna has 3 apples and buys 4 more. How many apples does Anna have?",
    "Ben has 7 boxes with 6 coins each. Later Ben loses 5 coins. How many coins does Ben have now?",
    "Tom has 9 pens.",
]
CALL = (
    "<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a": 1}<|call|>'
)
KEYS = dict(model=MODEL, adapter=None, system=None, max_new_tokens=96, temperature=0.0, reasoning_effort="medium",
            conversation_date="2025-06-28", dtype="float32", attn_implementation="gptoss_triton")  # fmt: skip


@pytest.mark.parametrize(
    "text, want",
    [
        (CALL, [("analysis", "", "I need it."), ("commentary", "functions.f", '{"a": 1}')]),
        ("<|channel|>analysis<|message|>So", [("analysis", "", "So")]),
        ("<|channel|>final<|message|>7<|return|>", [("final", "", "7")]),
        ("no Harmony", [("", "", "no Harmony")]),
    ],
)
def test_channels(text, want):
    assert [tuple(message.values()) for message in channels(text)] == want


def test_a_streamed_reply_has_its_channels_apart(tokenizer, capsys):
    streamer = ChannelStreamer(tokenizer)
    for _ in range(2):
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in tokenizer(CALL, add_special_tokens=False).input_ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
    assert capsys.readouterr().out == 2 * '[analysis]\nI need it.\n[call functions.f]\n{"a": 1}\n'


def test_a_batch_is_what_eager_says_one_by_one(tokenizer, tmp_path):
    config = load_config(MODEL)
    keys = {"attn_implementation": "eager", "experts_implementation": "eager"}
    eager = load_checkpoint(MODEL, config, dtype=torch.float32, **keys)
    lines = Path("data/reasoning/test.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    asked = [json.loads(line)["messages"][:-1] for line in lines]
    prompts = [(messages[-1]["content"], messages[0]["content"]) for messages in asked]
    want = [reply(eager, tokenizer, user, system=system, max_new_tokens=96) for user, system in prompts]
    path, output = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    path.write_text("\n\n".join(json.dumps({"messages": messages}) for messages in asked))
    assert answer(str(path), str(output), batch_size=3, **KEYS) == 5
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["reply"] for row in rows] == want
    assert rows[0]["messages"][0]["channel"] == "analysis" and "<|" not in rows[0]["messages"][0]["text"]
    lengths = {len(tokenizer(text).input_ids) for text in want}
    assert len(lengths) > 1 and max(lengths) < 96, "replies end by themselves, at different places"
    with pytest.raises(SetupError, match="output: expected a file that is not there yet"):
        answer(str(path), str(output), **KEYS)


def test_the_command_line(capsys, monkeypatch):
    import generate

    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", MODEL, "--prompt", PROMPTS[0], "--dtype", "float32"])
    generate.main()
    said = capsys.readouterr().out
    whole = stream(prompt=PROMPTS[0], **(KEYS | {"max_new_tokens": 512}))
    want = "".join(f"[{message['channel']}]\n{message['text']}\n" for message in channels(whole))
    assert said == want and said.startswith("[analysis]\n") and "\n[final]\n" in said
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", MODEL, "--prompts", "x.txt"])
    with pytest.raises(SystemExit, match="2"):
        generate.main()


def test_prompts_of_a_file(tmp_path):
    path, rendering = tmp_path / "prompts.jsonl", harmony.Rendering()
    rows = [
        {"prompt": "Hi"},
        {"prompt": "Hi", "system": "Be kind."},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    got = read_prompts(path, "Be brief.", rendering)
    assert got == [
        render("Hi", "Be brief.", rendering),
        render("Hi", "Be kind.", rendering),
        render("Hi", None, rendering),
    ]
    for line, message in (
        ("[1]", "line 1: expected an object"),
        ("{", "line 1"),
        ("", "has none"),
        ('{"prompt": ""}', "line 1"),
    ):
        path.write_text(line)
        with pytest.raises(SetupError, match=message):
            read_prompts(path, None, rendering)
    with pytest.raises(SetupError, match="cannot read"):
        read_prompts(tmp_path / "nothing.txt", None, rendering)


def test_many_prompts_in_order(tokenizer):
    model = load_checkpoint(MODEL, load_config(MODEL), dtype=torch.float32, attn_implementation="gptoss_triton")
    examples = [render(prompt, None, harmony.Rendering()) for prompt in PROMPTS]
    one, two = (replies(model, tokenizer, examples, max_new_tokens=12, batch_size=size) for size in (1, 3))
    assert one == two
