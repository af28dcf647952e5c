"""What carries loss, the text beside the templates', the real vocabulary, OpenAI's own parser, and bad rows."""

import doctest
import json
import subprocess
import sys
import time
from pathlib import Path

import o200k
import openai_harmony
import pytest
from bpe_openai import get_encoding
from test_harmony_fuzz import CLOCK, TEMPLATE, fuzz
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gptoss_kernels.finetune import harmony
from gptoss_kernels.finetune.harmony import Rendering, Span, encode, prompt, render, text

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-06-28\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
USER = {"role": "user", "content": "Rain in Oslo?"}
CALL = {"role": "assistant", "thinking": "Look.", "tool_calls": [{"name": "rain", "arguments": {"at": "Oslo"}}]}
RESULT = {"role": "tool", "content": "no"}
ANSWER = {"role": "assistant", "thinking": "Dry.", "content": "No."}
THANKS = {"role": "user", "content": "Thanks!"}
WELCOME = {"role": "assistant", "thinking": "Polite.", "content": "You're welcome."}
INSTRUCTIONS = {"role": "developer", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rain",
            "description": "Is it raining?",
            "parameters": {
                "type": "object",
                "properties": {
                    "at": {"type": "string", "description": "a city"},
                    "unit": {"type": "string", "enum": ["mm", "in"], "default": "mm"},
                    "days": {"type": "array", "items": {"type": "integer"}, "default": [1]},
                    "where": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}},
                    "when": {"oneOf": [{"type": "string"}, {"type": "integer", "default": 3}]},
                },
                "required": ["at"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def small():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tokenizer")


@pytest.fixture(scope="module")
def real():
    return o200k.build()


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """OpenAI's own renderer and parser, with its vocabulary from a file on this disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(o200k.write_ranks(tmp_path_factory.mktemp("ranks"))))
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def by_template(tokenizer, messages, tools=None, *, prompt=False, **variables) -> str:
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=TEMPLATE.replace(CLOCK, '"2025-06-28"'),
        add_generation_prompt=prompt,
        tokenize=False,
        **variables,
    )


def trained(example) -> list[tuple[str, float]]:
    """Neighbouring spans of one weight joined: text and weight of what carries loss."""
    runs = []
    for span in example:
        if runs and runs[-1][1] == span.weight:
            runs[-1] = (runs[-1][0] + span.text, span.weight)
        else:
            runs.append((span.text, span.weight))
    return [run for run in runs if run[1]]


def test_examples_of_the_documentation():
    result = doctest.testmod(harmony)
    assert result.attempted > 15 and result.failed == 0


def test_needs_no_torch():
    """The module by itself is plain Python."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, harmony.__file__], check=True)


# What carries loss


def test_every_span_of_a_turn_with_a_tool_call():
    (example,) = render(
        {"messages": [USER, CALL, RESULT, ANSWER]}, Rendering(channel_weights={"analysis": 2, "final": 3})
    )

    def message(role, author, channel, weight, header, content, end, *, prompted=False):
        opening = (None, 0.0) if prompted else (channel, weight)
        spans = [Span("<|start|>", True, role, *opening), Span(author, False, role, *opening)]
        spans += [Span(part, part.startswith("<|"), role, channel, weight) for part in header]
        return [
            *spans,
            Span("<|message|>", True, role, channel, weight),
            Span(content, False, role, channel, weight),
            Span(end, True, role, channel, weight),
        ]

    commentary = ["<|channel|>", "commentary"]
    assert list(example) == [
        *message("system", "system", None, 0.0, [], SYSTEM, "<|end|>"),
        *message("user", "user", None, 0.0, [], "Rain in Oslo?", "<|end|>"),
        *message(
            "assistant", "assistant", "analysis", 2.0, ["<|channel|>", "analysis"], "Look.", "<|end|>", prompted=True
        ),
        *message(
            "assistant",
            "assistant",
            "commentary",
            0.0,
            [" to=functions.rain", "<|channel|>", "commentary json"],
            '{"at": "Oslo"}',
            "<|call|>",
        ),
        *message("tool", "functions.rain", None, 0.0, [" to=assistant", *commentary], '"no"', "<|end|>"),
        *message(
            "assistant", "assistant", "analysis", 2.0, ["<|channel|>", "analysis"], "Dry.", "<|end|>", prompted=True
        ),
        *message("assistant", "assistant", "final", 3.0, ["<|channel|>", "final"], "No.", "<|return|>"),
    ]


def test_a_turn_that_begins_with_its_call_is_trained_from_the_recipient_on():
    call = {"role": "assistant", "tool_calls": CALL["tool_calls"]}
    (example,) = render({"messages": [USER, call]}, Rendering())
    assert trained(example) == [(' to=functions.rain<|channel|>commentary json<|message|>{"at": "Oslo"}<|call|>', 1.0)]


def test_each_turn_is_trained_in_the_context_it_would_have_had(real):
    row = {"messages": [USER, CALL, RESULT, ANSWER, THANKS, WELCOME]}
    first, second = render(row, Rendering())
    answer = "<|channel|>analysis<|message|>Dry.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>"
    assert trained(first)[-1] == (answer, 1.0)
    # The reasoning before the call is still in view when the answer to the result is written …
    assert "Look." in text(first).split("<|call|>")[0]
    # … and gone, like that of the answer, when the next turn begins; the call and its result stay.
    assert "Look." not in text(second) and "Dry." not in text(second) and "<|call|>" in text(second)
    assert len(trained(second)) == 1 and "No.<|end|>" in text(second)
    assert render(row, Rendering(turns="last")) == [second]
    for example, messages in ((first, [USER]), (first, [USER, CALL, RESULT]), (second, row["messages"][:-1])):
        start = text(prompt(messages, Rendering()))
        assert text(example).startswith(start) and start == by_template(real, messages, prompt=True)


def test_reasoning_stays_until_an_answer_even_if_the_user_breaks_in(real):
    messages = [USER, CALL, RESULT, {"role": "user", "content": "Well?"}, ANSWER, THANKS, WELCOME]
    first, second, third = render({"messages": messages}, Rendering())
    assert text(first).endswith("<|call|>")  # the result that follows is nothing to train on
    assert "Look." in text(second) and "Look." not in text(third)
    for example, end in ((second, 4), (third, 6)):
        assert text(example).startswith(by_template(real, messages[:end], prompt=True))


@pytest.mark.parametrize("end", ["return", "end"])
def test_end_token(end):
    first, second = render({"messages": [USER, ANSWER, THANKS, WELCOME]}, Rendering(end_token=end))
    assert text(first).endswith(f"No.<|{end}|>") and text(second).endswith(f"welcome.<|{end}|>")
    assert "No.<|end|>" in text(second)


def test_prompt_with_completion_trains_the_completion_alone():
    messages = [USER, CALL, RESULT, ANSWER]
    (example,) = render({"prompt": messages[:3], "completion": messages[3:]}, Rendering())
    (whole,) = render({"messages": messages}, Rendering())
    assert text(example) == text(whole) and trained(example) == trained(whole)[1:] and len(trained(whole)) == 2
    (example,) = render({"prompt": [USER, ANSWER, THANKS], "completion": [WELCOME]}, Rendering())
    assert trained(example) == trained(render({"messages": [USER, ANSWER, THANKS, WELCOME]}, Rendering())[1])


def test_channels_of_messages():
    remark = {"role": "assistant", "channel": "commentary", "content": "I'll look it up."}
    thought = {"role": "assistant", "channel": "analysis", "content": "Look."}
    call = {"role": "assistant", "tool_calls": CALL["tool_calls"]}
    answer = {"role": "assistant", "channel": "final", "content": "No."}
    (example,) = render({"messages": [USER, thought, remark, call, RESULT, answer]}, Rendering())
    assert trained(example)[0][0].startswith(
        "<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I'll look it up.<|end|>"
        "<|start|>assistant to=functions.rain<|channel|>commentary json<|message|>"
    )
    together = {**CALL, "content": remark["content"], "channel": "commentary"}
    assert render({"messages": [USER, together, RESULT, answer]}, Rendering()) == [example]


def test_a_call_may_be_constrained(real, openai):
    call = {"name": "rain", "arguments": '{"at":"Oslo"}', "content_type": "<|constrain|>json"}
    (example,) = render({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, Rendering())
    ids = encode(example, real).input_ids
    assert o200k.SPECIAL["<|constrain|>"] in ids
    message = openai.parse_messages_from_completion_tokens(ids, role=None)[-1]
    assert (message.content_type, message.content[0].text) == ("<|constrain|>json", '{"at":"Oslo"}')


# Beside the templates

CONVERSATIONS = {
    "plain": [USER, {"role": "assistant", "content": "No."}],
    "reasoning": [USER, ANSWER],
    "developer": [INSTRUCTIONS, USER, ANSWER],
    "system": [{"role": "system", "content": "reasoning language: French\n\nBe kind."}, USER, ANSWER],
    "two turns": [INSTRUCTIONS, USER, ANSWER, THANKS, WELCOME],
    "tool call": [USER, CALL],
    "tool call after an answer": [USER, ANSWER, THANKS, CALL],
    "reasoning as content": [USER, {"role": "assistant", "content": "Look.", "tool_calls": CALL["tool_calls"]}],
    "result as an object": [USER, {**CALL, "thinking": ""}, {"role": "tool", "content": {"rain": ["né"]}}, ANSWER],
    "greeting": [{"role": "assistant", "content": "Hi!"}, USER, ANSWER],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_agrees_with_the_template_that_trl_ships(messages, tools, real):
    row = {"messages": messages, "tools": tools, "reasoning_effort": "high"}
    example = render(row, Rendering())[-1]
    assert text(example) == by_template(real, messages, tools, reasoning_effort="high")
    identity = Rendering(model_identity="You are Ada.")
    assert text(prompt(messages[:-1], identity, tools)) == by_template(
        real, messages[:-1], tools, prompt=True, model_identity="You are Ada."
    )


@pytest.mark.parametrize("name", ["plain", "reasoning", "developer", "system", "two turns", "greeting"])
def test_agrees_with_the_template_beside_the_shipped_tokenizer(name, small):
    messages = CONVERSATIONS[name]
    example = render({"messages": messages, "reasoning_effort": "low"}, Rendering(conversation_date="2026-01-31"))[-1]
    variables = {"reasoning_effort": "low", "conversation_date": "2026-01-31", "tokenize": False}
    assert text(example) == small.apply_chat_template(messages, **variables)
    start = small.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert text(prompt(messages[:-1], Rendering())) == start


def test_arguments_that_are_json_already_stay_as_they_are(real):
    """The template would quote them once more."""
    call = {"role": "assistant", "tool_calls": [{"name": "rain", "arguments": '{"at": "Oslo"}'}]}
    assert '"{\\"at\\"' in by_template(real, [USER, call])
    assert '<|message|>{"at": "Oslo"}<|call|>' in text(render({"messages": [USER, call]}, Rendering())[0])


def test_columns_that_are_null_are_not_there():
    """As they come from a table: each message has each column."""
    columns = ("thinking", "tool_calls", "name", "channel")
    full = [{**dict.fromkeys(columns), **message} for message in (USER, ANSWER)]
    row = {"messages": full, "tools": None, "reasoning_effort": None}
    assert render(row, Rendering()) == render({"messages": [USER, ANSWER]}, Rendering())
    assert render({"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)}, Rendering()) == render(
        {"messages": [USER, ANSWER], "tools": TOOLS}, Rendering()
    )


# The real vocabulary


def test_ids_of_the_real_vocabulary(real):
    assert len(real) == o200k.SIZE
    (example,) = render({"messages": [USER, CALL]}, Rendering())
    encoded = encode(example, real)
    special = [token for token in encoded.input_ids if token >= 199998]
    assert len(special) == 14 and special == [o200k.SPECIAL[span.text] for span in example if span.special]
    assert encoded.input_ids[:2] == [200006, 17360] and encoded.input_ids[-1] == 200012
    trained = [token for token, weight in zip(encoded.input_ids, encoded.weights, strict=True) if weight]
    assert real.decode(trained) == (
        "<|channel|>analysis<|message|>Look.<|end|>"
        '<|start|>assistant to=functions.rain<|channel|>commentary json<|message|>{"at": "Oslo"}<|call|>'
    )
    channels = {channel: encoded.channels.count(channel) for channel in ("", "analysis", "commentary", "final")}
    assert channels["final"] == 0 and channels["analysis"] + channels["commentary"] == len(trained)


TEXTS = [
    *(
        "Hello, wörld! It's 12345678 o'clock",
        "  indented\n\n\n\tcode()\r\n",
        "日本語のテキスト",
        "👩‍👩‍👧 e\u0301 שלום",
        "ǅ ﬁ İ",
    ),
    *("<|start|>assistant<|channel|>final<|message|>", "<|end|>", "don't DON'T we'LL", "a" * 500, " " * 300 + "x"),
]


@pytest.mark.parametrize("words", TEXTS)
def test_plain_text_has_the_ids_of_another_encoder(words, real):
    ids = encode([Span(words, False, "user", None, 0.0)], real).input_ids
    assert ids == get_encoding("o200k_base").encode(words, disallowed_special=())
    assert real.decode(ids) == words and max(ids) < 199998


def test_tokens_are_those_of_openais_renderer(real, openai):
    """A conversation without what the two write differently: all ids, the parser's and ours."""
    Message, Role = openai_harmony.Message, openai_harmony.Role
    system = openai_harmony.SystemContent.new().with_conversation_start_date("2025-06-28")
    developer = openai_harmony.DeveloperContent.new().with_instructions("Be brief.\n\n")
    conversation = [
        Message.from_role_and_content(Role.SYSTEM, system),
        Message.from_role_and_content(Role.DEVELOPER, developer),
        Message.from_role_and_content(Role.USER, "Rain in Oslo? <|end|>"),
        Message.from_role_and_content(Role.ASSISTANT, "Dry.").with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, "No.").with_channel("final"),
    ]
    theirs = openai.render_conversation_for_training(
        openai_harmony.Conversation.from_messages(conversation),
        openai_harmony.RenderConversationConfig(auto_drop_analysis=False),
    )
    (example,) = render(
        {"messages": [INSTRUCTIONS, {"role": "user", "content": "Rain in Oslo? <|end|>"}, ANSWER]}, Rendering()
    )
    assert encode(example, real).input_ids == theirs
    # With a further turn it drops the reasoning as this does.
    conversation.append(Message.from_role_and_content(Role.USER, "Thanks!"))
    theirs = openai.render_conversation_for_completion(
        openai_harmony.Conversation.from_messages(conversation), Role.ASSISTANT
    )
    messages = [INSTRUCTIONS, {"role": "user", "content": "Rain in Oslo? <|end|>"}, ANSWER, THANKS]
    assert encode(prompt(messages, Rendering()), real).input_ids == theirs


def parsed(openai, ids) -> list[tuple]:
    return [
        (message.author.role.value, message.author.name, message.recipient, message.channel, message.content[0].text)
        for message in openai.parse_messages_from_completion_tokens(ids, role=None)
    ]


def test_openais_parser_reads_roles_channels_and_content(real, openai):
    row = {"messages": [INSTRUCTIONS, USER, CALL, RESULT, ANSWER], "tools": TOOLS}
    (example,) = render(row, Rendering())
    system, developer, *rest = parsed(openai, encode(example, real).input_ids)
    assert system[0] == "system" and system[-1] == SYSTEM + (
        "\nCalls to these tools must go to the commentary channel: 'functions'."
    )
    assert developer[0] == "developer" and developer[-1].startswith("# Instructions\n\nBe brief.\n\n# Tools\n\n")
    assert rest == [
        ("user", None, None, None, "Rain in Oslo?"),
        ("assistant", None, None, "analysis", "Look."),
        ("assistant", None, "functions.rain", "commentary", '{"at": "Oslo"}'),
        ("tool", "functions.rain", "assistant", "commentary", '"no"'),
        ("assistant", None, None, "analysis", "Dry."),
        ("assistant", None, None, "final", "No."),
    ]


def test_openais_parser_reads_fuzzed_conversations(real, openai):
    def check(row, rendering):
        for example in render(row, rendering):
            spans, messages = list(example), []
            while spans:
                end = next(at for at, span in enumerate(spans) if span.text == "<|message|>" and span.special)
                header, content, spans = spans[:end], spans[end + 1], spans[end + 3 :]
                messages.append((header[0].role, header[-1].channel, content.text))
            read = parsed(openai, encode(example, real).input_ids)
            assert [
                (role, channel if role == "assistant" else None, said) for role, _, _, channel, said in read
            ] == messages

    fuzz(check, rows=300, number=99)


# Bad rows


def row_of(*messages, **columns) -> dict:
    return {"messages": [*messages], **columns}


def with_call(**call) -> dict:
    return row_of(USER, {"role": "assistant", "tool_calls": [{"name": "rain", "arguments": {}, **call}]})


ALONE = "\ud800"
CIRCLE = []
CIRCLE.append(CIRCLE)
MESSAGES = [
    ([], "row: expected an object, got []"),
    ({"text": "x"}, "prompt: expected a list of messages that is not empty, got nothing"),
    (row_of(), "messages: expected a list of messages that is not empty, got []"),
    ({"messages": "x"}, "messages: expected a list of messages that is not empty, got 'x'"),
    ({"prompt": [USER], "completion": []}, "completion: expected a list of messages that is not empty, got []"),
    (
        {"prompt": [USER], "completion": [{"role": "assistant"}]},
        "completion[0].content: expected text that is not empty",
    ),
    (row_of("x"), "messages[0]: expected an object with role and content, got 'x'"),
    (
        row_of(USER, {"content": "No."}),
        "messages[1].role: expected system, developer, user, assistant or tool, got nothing",
    ),
    (
        row_of(USER, {**ANSWER, "role": "bot"}),
        "messages[1].role: expected system, developer, user, assistant or tool, got 'b",
    ),
    (
        row_of(USER, {**ANSWER, "role": ["user"]}),
        "messages[1].role: expected system, developer, user, assistant or tool",
    ),
    (
        row_of(USER, ANSWER, INSTRUCTIONS),
        "messages[2].role: expected instructions as the first message only, got 'develop",
    ),
    (row_of({"role": "system"}, USER, ANSWER), "messages[0].content: expected a string, got nothing"),
    (
        row_of({"role": "user", "content": " \n"}, ANSWER),
        r"messages[0].content: expected text that is not empty, got ' \n'",
    ),
    (row_of({"role": "user", "content": b"\xff"}, ANSWER), r"messages[0].content: expected a string, got b'\xff'"),
    (row_of({"role": "user", "content": ["x"]}, ANSWER), "messages[0].content: expected a string, got ['x']"),
    (
        row_of(USER, {"role": "assistant", "content": ""}),
        "messages[1].content: expected text that is not empty, got ''",
    ),
    (row_of(USER, {**ANSWER, "content": None}), "messages[1].content: expected text that is not empty, got nothing"),
    (row_of(USER, {**ANSWER, "thinking": 3}), "messages[1].thinking: expected a string, got 3"),
    (
        row_of(USER, {**ANSWER, "channel": "thought"}),
        "messages[1].channel: expected analysis, commentary or final, got 'tho",
    ),
    (row_of(USER, {**CALL, "channel": "final"}), "messages[1].channel: expected analysis or commentary, got 'final'"),
    (
        row_of(USER, {**ANSWER, "reasoning_content": "x"}),
        "messages[1].reasoning_content: expected the reasoning in `think",
    ),
    (
        row_of(USER, {**CALL, "content": "x"}),
        "messages[1]: expected the reasoning in thinking or in content, not in both",
    ),
    (
        row_of(USER, {**ANSWER, "content": "<|channel|>final<|message|>No."}),
        "messages[1].content: expected the text alone, reasoning in `thinking` and the answer in `content`, got <|chan",
    ),
    (
        row_of({**USER, "content": "ab" + ALONE}, ANSWER),
        "messages[0].content: expected valid Unicode, got the lone surrogate ",
    ),
    (
        row_of(USER, {**ANSWER, "thinking": ALONE}),
        "messages[1].thinking: expected valid Unicode, got the lone surrogate",
    ),
    (
        row_of(USER, CALL, {**RESULT, "content": {"x": ALONE}}),
        "messages[2].content: expected valid Unicode, got the lone",
    ),
    (
        with_call(arguments={ALONE: 1}),
        "messages[1].tool_calls[0].arguments: expected valid Unicode, got the lone surrogate",
    ),
    (row_of(USER), "messages: expected a user message and the assistant's answer to it, got user"),
    (row_of(INSTRUCTIONS), "messages: expected a user message and the assistant's answer to it, got developer"),
    (row_of(WELCOME), "messages: expected a user message and the assistant's answer to it, got assistant"),
    (row_of(USER, ANSWER, WELCOME), "messages[2].role: expected user after a final message, got 'assistant'"),
    (row_of(USER, CALL, WELCOME), "messages[2].role: expected the tool's result after a call message, got 'assistant'"),
    (
        row_of(USER, RESULT),
        "messages[1].role: expected a tool's result right after the assistant's tool call, got 'tool'",
    ),
    (
        row_of(USER, CALL, RESULT, RESULT),
        "messages[3].role: expected a tool's result right after the assistant's tool call",
    ),
    (
        row_of(USER, CALL, {**RESULT, "name": "snow"}),
        "messages[2].name: expected rain, the tool that was called, got 'snow'",
    ),
    (row_of(USER, CALL, {"role": "tool"}), "messages[2].content: expected JSON, got nothing"),
    (
        row_of(USER, {**ANSWER, "channel": "commentary", "thinking": None}),
        "messages[1]: expected a turn to end with an answer or a tool call, got commentary",
    ),
    (
        row_of(USER, {"role": "assistant", "channel": "analysis", "content": "x"}, THANKS),
        "messages[2].role: expected assistant, whose turn has no answer or tool call yet, got 'user'",
    ),
    (
        row_of(USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}),
        "messages[1].tool_calls: expected a list of one call",
    ),
    (row_of(USER, {**CALL, "tool_calls": {"name": "x"}}), "messages[1].tool_calls: expected a list of one call"),
    (
        row_of(USER, {**CALL, "tool_calls": ["x"]}),
        "messages[1].tool_calls[0]: expected an object with name and arguments",
    ),
    (with_call(name=None), "messages[1].tool_calls[0].name: expected a string, got nothing"),
    (
        with_call(name="to be"),
        "messages[1].tool_calls[0].name: expected a name without white space, '<', '|' and '>', got",
    ),
    (with_call(arguments=None), "messages[1].tool_calls[0].arguments: expected JSON, got nothing"),
    (with_call(arguments="{x"), "messages[1].tool_calls[0].arguments: expected JSON, got '{x'"),
    (with_call(arguments={"x": float("nan")}), "messages[1].tool_calls[0].arguments: expected JSON, got {'x': nan}"),
    (
        with_call(arguments=CIRCLE),
        "messages[1].tool_calls[0].arguments: expected JSON, got [[[...]]] (Circular reference",
    ),
    (
        with_call(content_type="a b"),
        "messages[1].tool_calls[0].content_type: expected a word such as 'json', got 'a b'",
    ),
    (row_of(USER, ANSWER, reasoning_effort="max"), "reasoning_effort: expected low, medium or high, got 'max'"),
    (
        row_of(USER, ANSWER, builtin_tools=["python"]),
        "builtin_tools: expected none, gpt-oss's own tools are not rendered",
    ),
    (row_of(USER, ANSWER, tools="["), "tools: expected a list or its JSON, got '['"),
    (row_of(USER, ANSWER, tools={"name": "x"}), "tools: expected a list or its JSON, got {'name': 'x'}"),
    (row_of(USER, ANSWER, tools=["x"]), "tools[0]: expected an object with name, description and parameters, got 'x'"),
    (row_of(USER, ANSWER, tools=[{"function": {}}]), "tools[0].name: expected a string, got nothing"),
    (row_of(USER, ANSWER, tools=[{"name": "f", "description": 3}]), "tools[0].description: expected a string, got 3"),
    (
        row_of(USER, ANSWER, tools=[{"name": "f", "parameters": {"properties": {"x": {}}, "required": True}}]),
        "tools[0].parameters: expected a JSON schema, got {'properties': {'x': {}}, 'required': True}",
    ),
]


@pytest.mark.parametrize("row, message", MESSAGES, ids=[message[:60] for _, message in MESSAGES])
def test_bad_rows(row, message):
    with pytest.raises(ValueError) as caught:
        render(row, Rendering())
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 400
    str(caught.value).encode("utf-8")  # can be printed


def test_prompts_end_before_the_assistant():
    with pytest.raises(ValueError, match=r"messages\[1\].role: expected user or tool, to be answered, got 'assistant'"):
        prompt([USER, ANSWER], Rendering())
    with pytest.raises(ValueError, match=r"messages\[0\].role: expected user or tool, to be answered, got 'developer'"):
        prompt([INSTRUCTIONS], Rendering())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"channel_weights": {"analisys": 1}},
            "channel_weights: expected channels among analysis, commentary or final",
        ),
        ({"channel_weights": {"final": -1}}, r"channel_weights\['final'\]: expected a number of at least 0, got -1"),
        (
            {"channel_weights": {"final": float("nan")}},
            r"channel_weights\['final'\]: expected a number of at least 0, got nan",
        ),
        (
            {"channel_weights": {"final": True}},
            r"channel_weights\['final'\]: expected a number of at least 0, got True",
        ),
        ({"channel_weights": {"final": 0}}, "channel_weights: expected a weight above 0, or nothing is trained"),
        (
            {"channel_weights": {}},
            "channel_weights: expected a weight for some of analysis, commentary or final, got {}",
        ),
        ({"turns": "first"}, "turns: expected all or last, got 'first'"),
        ({"end_token": "<|end|>"}, r"end_token: expected return or end, got '<\|end\|>'"),
        ({"reasoning_effort": "none"}, "reasoning_effort: expected low, medium or high, got 'none'"),
        ({"conversation_date": "28.6.2025"}, "conversation_date: expected year-month-day, got '28.6.2025'"),
        ({"model_identity": None}, "model_identity: expected a string, got nothing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Rendering(**options)


@pytest.mark.parametrize("letter", ["a", " ", "\n", "😀", "<|start|>", "it's "])
@pytest.mark.parametrize("name", ["small", "real"])
def test_a_megabyte_in_one_message(letter, name, request):
    tokenizer = request.getfixturevalue(name)
    content = letter * (1_000_000 // len(letter.encode())) + "?"
    began = time.monotonic()
    (example,) = render(row_of({"role": "user", "content": content}, ANSWER), Rendering())
    encoded = encode(example, tokenizer)
    assert time.monotonic() - began < 60
    assert tokenizer.decode(encoded.input_ids) == text(example) and content in text(example)


def test_tokenizers_that_cannot_do_it(small):
    (example,) = render(row_of({"role": "user", "content": "<|end|>"}, ANSWER), Rendering())

    def changed():
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))

    raw = json.loads(small.backend_tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["content"] != "<|end|>"
    with pytest.raises(ValueError, match=r"expected plain text to stay plain, <\|end\|> became a token in '<\|end\|>'"):
        encode(example, changed())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|return|>"]
    with pytest.raises(ValueError, match=r"expected one with gpt-oss's special tokens, it has no <\|return\|>"):
        encode(
            render(row_of(USER, ANSWER), Rendering())[0],
            changed(),
        )


def test_an_array_of_either_kind_of_object_is_an_array_of_anything():
    parameters = {"type": "object", "properties": {"rows": {"type": "array", "items": {"type": ["object", "object"]}}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [tool]}
    assert "rows?: any[]" in text(render(row, Rendering())[0])
