"""Made-up conversations: the text comes back, weights cover what was asked for, each context is the real one."""

import itertools
import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import o200k
import pytest
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import chat_template_utils

from gptoss_kernels.finetune.harmony import CHANNELS, Rendering, encode, prompt, render, text

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (Path(chat_template_utils.__file__).parent / "chat_templates" / "gptoss.jinja").read_text(encoding="utf-8")
CLOCK = 'strftime_now("%Y-%m-%d")'
# GPTOSS_FUZZ_ROWS=2500 makes it the 10,000 that it is checked with now and then.
PARTS, ROWS, REAL_ROWS = 4, int(os.environ.get("GPTOSS_FUZZ_ROWS", "600")), 250
FRAGMENTS = [
    *o200k.SPECIAL,
    *(
        "<|start|>assistant",
        "<|reserved_200000|>",
        "<|im_start|>",
        "<|",
        "|>",
        " to=functions.f",
        "# Tools",
        "analysis",
    ),
    *("\0", "\r\n", "\n\n\n", "   ", "\t", "\ufeff", "\uffff", "\u2028", "\U0010ffff", "e\u0301\u0301", "\u202eabc"),
    *("👩‍👩‍👧", "日本語", "שלום", "ﬁ", "İ", "don't", "12345", "{{ x }}", "{% y %}", "\\ud800", '"', "</s>"),
]
MARKERS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")  # refused in what the assistant writes
NAMES = ("f", "get_weather", "a.b-c", "météo")
# One draw makes all the text of a row, which is far quicker than a draw for each: letters from here on stand for a
# fragment, all others for themselves.
FIRST = 0xF0000
LETTERS = st.one_of(
    st.characters(min_codepoint=FIRST, max_codepoint=FIRST + len(FRAGMENTS) - 1),
    st.characters(exclude_categories=["Cs"]),
)


class Maker:
    """Makes a row from bytes, which choose its shape, and letters, which are its text; both are read in circles."""

    def __init__(self, shape: bytes, letters: str):
        self.shape, self.letters = itertools.cycle(shape), itertools.cycle(letters)

    def one_of(self, *options):
        return options[next(self.shape) % len(options)]

    def words(self) -> str:
        some = itertools.islice(self.letters, self.one_of(0, 1, 2, 3, 5))
        return "".join(FRAGMENTS[ord(x) - FIRST] if 0 <= ord(x) - FIRST < len(FRAGMENTS) else x for x in some)

    def filled(self) -> str:
        words = self.words()
        return words if words.strip() else words + "?"

    def own(self) -> str:
        words = self.filled()
        return "..." if any(marker in words for marker in MARKERS) else words

    def value(self):
        return self.one_of(None, True, -3, 0.5, [1, "<|call|>"], {"a": {}}, self.words())

    def object(self) -> dict:
        return {self.words(): self.value() for _ in range(self.one_of(0, 1, 2))}

    def schema(self, depth: int = 2) -> dict:
        kind = self.one_of(
            "string", "number", "integer", "boolean", "array", "object", "oneOf", "several", "null", "none"
        )
        schema = {"type": kind}
        if kind == "oneOf" and depth:
            schema = {"oneOf": [self.schema(depth - 1) for _ in range(self.one_of(1, 2, 0))]}
        elif kind == "array" and depth:
            schema["items"] = self.schema(depth - 1)
        elif kind == "object" and depth:
            schema["properties"] = {self.words(): self.schema(depth - 1) for _ in range(self.one_of(1, 2, 0))}
            schema["required"] = list(schema["properties"])[: self.one_of(0, 1, 2)]
        elif kind == "several":
            schema = {"type": self.one_of(["string"], ["string", "null"], [])}
        elif kind == "none":
            schema = {}
        for key, value in (("description", self.words), ("default", self.words), ("enum", lambda: [self.words(), "b"])):
            if self.one_of(False, False, True):
                schema[key] = value()
        if self.one_of(False, False, True):
            schema["nullable"] = self.one_of(True, False)
        return schema

    def tool(self) -> dict:
        parameters = self.one_of({}, {"type": "object", "properties": {}}, None)
        if parameters is None:
            parameters = {"properties": {self.words(): self.schema() for _ in range(self.one_of(1, 2))}}
            parameters["required"] = list(parameters["properties"])[: self.one_of(0, 1)]
        function = {"name": self.one_of(*NAMES), "description": self.words(), "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self) -> dict:
        call = {"name": self.one_of(*NAMES), "arguments": self.object()}
        message = {"role": "assistant", "tool_calls": [self.one_of(call, {"type": "function", "function": call})]}
        where = self.one_of("thinking", "content", None)
        return message | ({where: self.own()} if where else {})

    def row(self) -> dict:
        """A row that gpt-oss's template takes too: at least one answered turn, and now and then tool calls, a greeting,
        a turn that is broken off, one that is not answered."""
        messages = []
        if role := self.one_of("system", "developer", None):
            messages.append({"role": role, "content": self.words()})
        if self.one_of(True, *[False] * 7):
            messages.append({"role": "assistant", "content": self.own()})
        for _ in range(self.one_of(1, 2, 3)):
            messages.append({"role": "user", "content": self.filled()})
            calls = self.one_of(0, 0, 0, 1, 2)
            for _ in range(calls):
                messages += [self.call(), {"role": "tool", "content": self.one_of(self.words(), self.object())}]
            if not calls or self.one_of(True, True, True, False):
                thinking = self.one_of({}, {"thinking": self.own()})
                messages.append({"role": "assistant", "content": self.own()} | thinking)
        if self.one_of(True, *[False] * 7):
            messages.append({"role": "user", "content": self.filled()})
        row = {"messages": messages}
        if self.one_of(True, False, False, False):
            row["tools"] = [self.tool() for _ in range(self.one_of(1, 2))]
        if effort := self.one_of("low", "medium", "high", None, None):
            row["reasoning_effort"] = effort
        return row

    def rendering(self) -> Rendering:
        weights = {channel: self.one_of(1, 1.0, 0, 0.25, 3) for channel in CHANNELS if self.one_of(True, True, False)}
        return Rendering(
            channel_weights=weights if any(weights.values()) else {"final": 1},
            turns=self.one_of("all", "last"),
            end_token=self.one_of("return", "end"),
        )


makers = st.builds(Maker, st.binary(min_size=64, max_size=64), st.text(LETTERS, min_size=1, max_size=24))


@pytest.fixture(scope="module")
def small():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tokenizer")


def template(tokenizer, row: dict, messages: list, rendering: Rendering, *, prompt: bool) -> str:
    """The text by the template that TRL ships, with a fixed date."""
    assert CLOCK in TEMPLATE
    return tokenizer.apply_chat_template(
        messages,
        tools=row.get("tools"),
        chat_template=TEMPLATE.replace(CLOCK, json.dumps(rendering.conversation_date)),
        add_generation_prompt=prompt,
        tokenize=False,
        reasoning_effort=row.get("reasoning_effort", rendering.reasoning_effort),
    )


def expected_weights(ids: list[int], tokenizer, rendering: Rendering) -> list[float]:
    """Weights by the tokens alone: the assistant's messages after the last user's, without `<|start|>assistant` where
    the message before is not the assistant's."""
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in o200k.SPECIAL}
    starts = [at for at, token in enumerate(ids) if token == number["<|start|>"]] + [len(ids)]
    messages = []
    for start, end in zip(starts, starts[1:], strict=False):
        header = tokenizer.decode(ids[start : ids.index(number["<|message|>"], start)])
        author, _, rest = header.removeprefix("<|start|>").partition("<|channel|>")
        messages.append((author.split(" ")[0], rest.split(" ")[0], end - start))
    last_user = max(at for at, (author, _, _) in enumerate(messages) if author == "user")
    opening = prompt_end(tokenizer)
    expected = []
    for at, (author, channel, length) in enumerate(messages):
        if author != "assistant" or at < last_user:
            expected += [0.0] * length
            continue
        prompted = 0 if messages[at - 1][0] == "assistant" else opening
        expected += [0.0] * prompted + [rendering.channel_weights.get(channel, 0.0)] * (length - prompted)
    return expected


@cache
def prompt_end(tokenizer) -> int:
    """Tokens of `<|start|>assistant`."""
    return 1 + len(tokenizer("assistant", add_special_tokens=False)["input_ids"])


@cache
def special_ids(tokenizer) -> set[int]:
    found = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert found >= {tokenizer.convert_tokens_to_ids(name) for name in o200k.SPECIAL}
    return found


def check_tokens(row: dict, rendering: Rendering, tokenizer) -> list:
    """Encodes every example of the row; returns them with their tokens."""
    special = special_ids(tokenizer)
    made = []
    for example in render(row, rendering):
        encoded = encode(example, tokenizer)
        assert tokenizer.decode(encoded.input_ids) == text(example)
        assert len(encoded.input_ids) == len(encoded.weights) == len(encoded.channels)
        # No special token but those of the format: whatever the text looks like.
        found = [tokenizer.convert_ids_to_tokens(token) for token in encoded.input_ids if token in special]
        assert found == [span.text for span in example if span.special]
        assert encoded.weights == expected_weights(encoded.input_ids, tokenizer, rendering)
        assert all(
            channel in CHANNELS for channel, weight in zip(encoded.channels, encoded.weights, strict=True) if weight
        )
        made.append((example, encoded))
    return made


def check_contexts(row: dict, rendering: Rendering, made: list, tokenizer) -> None:
    """Every reply stands after the very prompt that gpt-oss would have been given, by its template."""
    messages, turn = row["messages"], -1
    answered = []  # the turn of each reply's start
    for at, message in enumerate(messages):
        turn += message["role"] == "user"
        if message["role"] == "assistant" and turn >= 0:
            answered.append((turn, at))
    kept = sorted({turn for turn, _ in answered})[-1 if rendering.turns == "last" else 0 :]
    assert len(made) == len(kept)
    examples = dict(zip(kept, (text(example) for example, _ in made), strict=True))
    rendering = Rendering(reasoning_effort=row.get("reasoning_effort", "medium"))
    for turn, at in answered:
        start = text(prompt(messages[:at], rendering, row.get("tools")))
        assert start == template(tokenizer, row, messages[:at], rendering, prompt=True)
        assert turn not in examples or examples[turn].startswith(start)


def check_whole(row: dict, tokenizer) -> None:
    """The last turn is the template's text, once the reasoning is out that only the template drops: that of tool calls
    between the answer before and this one."""
    messages = [dict(message) for message in row["messages"]]
    if messages[-1]["role"] != "assistant":
        return
    if "tool_calls" not in messages[-1]:
        for message in reversed(messages[:-1]):
            if "tool_calls" in message:
                message.pop("thinking", None), message.pop("content", None)
            elif message["role"] == "assistant":
                break
    made = render(row | {"messages": messages}, Rendering())
    assert text(made[-1]) == template(tokenizer, row, messages, Rendering(), prompt=False)


def fuzz(check, *, rows: int, number: int) -> None:
    @seed(number)
    @settings(max_examples=rows, deadline=None, database=None)
    @given(makers)
    def run(maker):
        row, rendering = maker.row(), maker.rendering()
        note(f"{row}\n{rendering}")
        check(row, rendering)

    run()


@pytest.mark.parametrize("part", range(PARTS))
def test_fuzzed_conversations(part, small):
    """2,400 in all, on the small vocabulary."""
    seen = Counter()

    def check(row, rendering):
        made = check_tokens(row, rendering, small)
        check_contexts(row, rendering, made, small)
        check_whole(row, small)
        seen.update(["rows", f"{len(made)} examples", f"weights {rendering.channel_weights.get('analysis')}"])
        seen.update({key for key in row} | {"tool calls" for message in row["messages"] if message["role"] == "tool"})

    fuzz(check, rows=ROWS, number=part)
    assert seen["rows"] >= ROWS
    often = ["2 examples", "3 examples", "tools", "tool calls", "weights 0.25", "weights 0", "weights None"]
    assert min(seen[what] for what in often) > ROWS / 40, seen


def test_fuzzed_conversations_on_the_real_vocabulary():
    real = o200k.build()
    fuzz(lambda row, rendering: check_tokens(row, rendering, real), rows=REAL_ROWS, number=PARTS)
