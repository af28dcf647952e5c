"""Conversations as gpt-oss reads and writes them: the Harmony format, and which of its tokens are trained.

A conversation becomes spans of text (`render`), and spans become token ids, weights and channels (`encode`). Only what
the model itself would generate can carry loss: all that follows a prompt's `<|start|>assistant`, headers and end tokens
included, each with the weight of its channel. The prompt, earlier turns and what tools return weigh 0.

>>> row = {"messages": [
...     {"role": "user", "content": "2 + 3?"},
...     {"role": "assistant", "thinking": "Easy.", "content": "5"},
...     {"role": "user", "content": "Times 2?"},
...     {"role": "assistant", "thinking": "5 * 2.", "content": "10"}]}
>>> def trained(example):
...     return "".join(span.text for span in example if span.weight)

Every answered user turn is an example of its own, in the context in which the model would have to answer it: the first
turn's reasoning is trained in the first example, and absent from the second.

>>> first, second = render(row, Rendering())
>>> trained(first)
'<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>5<|return|>'
>>> trained(second)
'<|channel|>analysis<|message|>5 * 2.<|end|><|start|>assistant<|channel|>final<|message|>10<|return|>'
>>> print(text(second).split("medium")[1])
<BLANKLINE>
<BLANKLINE>
# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|><|start|>user\
<|message|>2 + 3?<|end|><|start|>assistant<|channel|>final<|message|>5<|end|><|start|>user<|message|>Times 2?<|end|>\
<|start|>assistant<|channel|>analysis<|message|>5 * 2.<|end|><|start|>assistant<|channel|>final<|message|>10<|return|>

The text is that of gpt-oss's own chat template (TRL's copy, `trl/chat_templates/gptoss.jinja`), except where training
on it would go wrong:

- The template writes a conversation once: earlier turns without their reasoning, and nothing tells a trainer that these
  replies were given without it. Here earlier turns are context, and each is trained in an example of its own.
- It drops the reasoning before a tool call as soon as an answer follows, in the same turn as well. But the model has it
  in view when it writes that answer, so here it goes only once the next user turn begins.
- It asks the clock for the date; here the date is fixed.
- It encodes a tool call's `arguments` as JSON once more if they are a string, as in OpenAI's API; here a string is
  taken as the JSON that it is.
- It silently leaves out second tool calls of a message and system messages that are not the first; here these are
  errors, and so are turns that gpt-oss could not have produced (see `render`).
- A final reply ends with `<|return|>` wherever it is trained, not only at the end of the conversation.
- `thinking` that is null or empty is no reasoning, rather than an error or an empty message.
- It can describe gpt-oss's built-in tools (`builtin_tools`: browser, python); here that is an error.

OpenAI's own renderer (`openai-harmony`) writes a few things otherwise: no blank line after the instructions, what tools
return without JSON quotes, objects in tool signatures indented. Where the two differ, this follows the template.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHANNELS = ("analysis", "commentary", "final")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in "start channel constrain message end return call".split())
ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
TURNS = ("all", "last")
END_TOKENS = ("return", "end")


@dataclass(frozen=True)
class Rendering:
    """How conversations become text, and which of its tokens carry loss.

    >>> row = {"messages": [
    ...     {"role": "user", "content": "2 + 3?"},
    ...     {"role": "assistant", "thinking": "Easy.", "content": "5"},
    ...     {"role": "user", "content": "Times 2?"},
    ...     {"role": "assistant", "thinking": "5 * 2.", "content": "10"}]}
    >>> def weights(example):
    ...     return [(span.text, span.weight) for span in example if span.weight]

    Attributes:
        channel_weights: weight of each channel's tokens in the loss, at least 0; a channel left out weighs 0. To train
            the answers alone, or the reasoning alone at half weight:

            >>> weights(render(row, Rendering(channel_weights={"final": 1.0}))[0])[:3]
            [('<|start|>', 1.0), ('assistant', 1.0), ('<|channel|>', 1.0)]
            >>> weights(render(row, Rendering(channel_weights={"analysis": 0.5}))[0])
            [('<|channel|>', 0.5), ('analysis', 0.5), ('<|message|>', 0.5), ('Easy.', 0.5), ('<|end|>', 0.5)]

        turns: "all": an example for every user turn that was answered; "last": for the last of these only.

            >>> len(render(row, Rendering(turns="all"))), len(render(row, Rendering(turns="last")))
            (2, 1)

        end_token: what ends a trained reply. "return": `<|return|>`, at which generation stops; "end": `<|end|>`, which
            the same reply has once it is context. Earlier turns have `<|end|>` either way.

            >>> text(render(row, Rendering(end_token="end"))[0])[-19:]
            '<|message|>5<|end|>'

        reasoning_effort: "low", "medium" or "high", for the system message; a row's own `reasoning_effort` wins.

            >>> "Reasoning: low" in text(render(row, Rendering(reasoning_effort="low"))[0])
            True
            >>> row_of_its_own = {**row, "reasoning_effort": "high"}
            >>> "Reasoning: high" in text(render(row_of_its_own, Rendering(reasoning_effort="low"))[0])
            True

        conversation_date: year-month-day, for the system message. Fixed: tomorrow's run trains on the same text.

            >>> "Current date: 2025-12-24" in text(render(row, Rendering(conversation_date="2025-12-24"))[0])
            True

        model_identity: how the system message begins.

            >>> text(render(row, Rendering(model_identity="You are Ada."))[0])[:40]
            '<|start|>system<|message|>You are Ada.\\nK'

    Raises:
        ValueError: naming the attribute, what was expected and what came.
    """

    channel_weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(CHANNELS, 1.0))
    turns: str = "all"
    end_token: str = "return"
    reasoning_effort: str = "medium"
    conversation_date: str = "2025-06-28"
    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI."

    def __post_init__(self):
        weights = self.channel_weights
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(
                f"channel_weights: expected a weight for some of {_either(CHANNELS)}, got {_show(weights)}"
            )
        for channel, weight in weights.items():
            if channel not in CHANNELS:
                raise ValueError(f"channel_weights: expected channels among {_either(CHANNELS)}, got {_show(channel)}")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise ValueError(f"channel_weights[{channel!r}]: expected a number of at least 0, got {_show(weight)}")
        if not any(weights.values()):
            raise ValueError(f"channel_weights: expected a weight above 0, or nothing is trained, got {_show(weights)}")
        _one_of(self.turns, TURNS, "turns")
        _one_of(self.end_token, END_TOKENS, "end_token")
        _one_of(self.reasoning_effort, EFFORTS, "reasoning_effort")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", _string(self.conversation_date, "conversation_date")):
            raise ValueError(f"conversation_date: expected year-month-day, got {self.conversation_date!r}")
        _string(self.model_identity, "model_identity")


@dataclass(frozen=True)
class Span:
    """A piece of the rendered text.

    Attributes:
        text: never empty.
        special: whether it is exactly one special token, such as "<|start|>"; other text is plain, whatever it says.
        role: system, developer, user, assistant or tool.
        channel: of assistant messages; None for all else, and for the `<|start|>assistant` that a prompt ends with.
        weight: of each of its tokens in the loss; 0: context.
    """

    text: str
    special: bool
    role: str
    channel: str | None
    weight: float


Example = tuple[Span, ...]


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: three lists of one length.

    Attributes:
        input_ids: token ids.
        weights: each token's weight in the loss, as a label.
        channels: "analysis", "commentary", "final", or "" for what is no channel's.
    """

    input_ids: list[int]
    weights: list[float]
    channels: list[str]


def text(example: Iterable[Span]) -> str:
    """The rendered text, special tokens included."""
    return "".join(span.text for span in example)


def render(row: Mapping[str, Any], rendering: Rendering) -> list[Example]:
    """The training examples of a conversation: one for each user turn that was answered, or for the last of them.

    Args:
        row: `messages`, or `prompt` and `completion` that are lists of messages (only the completion is trained), and
            optionally `tools` (as in OpenAI's API; a list or its JSON) and `reasoning_effort`.
            A message has a `role` and `content`; of the assistant also `thinking` (its reasoning), `tool_calls` (one
            call) and `channel` (of its content: "final", or "analysis" beside a tool call, unless given; "commentary"
            is a remark before a tool call). The first message may be a system or developer message: the instructions.
        rendering: the options.

    Returns:
        Examples, which end with the last assistant message of their turn. One may carry no loss at all: if only the
        reasoning has weight and there is none of it.

    Raises:
        ValueError: naming the field (`messages[3].content`), what was expected and what came: for missing fields and
            wrong types, text that is not valid Unicode, empty turns, unknown channels, no answered turn, and an order
            that gpt-oss does not produce: a turn that ends without an answer or a tool call, a tool's result without
            a call, an assistant message that follows a final one or a call.

    >>> example, = render({"messages": [
    ...     {"role": "system", "content": "Be brief."},
    ...     {"role": "user", "content": "Rain in Oslo?"},
    ...     {"role": "assistant", "thinking": "Look.", "tool_calls": [{"name": "rain", "arguments": {"at": "Oslo"}}]},
    ...     {"role": "tool", "content": "no"},
    ...     {"role": "assistant", "content": "No."}],
    ...     "tools": [{"name": "rain", "description": "Is it raining?",
    ...                "parameters": {"properties": {"at": {"type": "string"}}, "required": ["at"]}}]}, Rendering())
    >>> print(text(example).split("# Valid")[1])
     channels: analysis, commentary, final. Channel must be included for every message.
    Calls to these tools must go to the commentary channel: 'functions'.<|end|>\
<|start|>developer<|message|># Instructions
    <BLANKLINE>
    Be brief.
    <BLANKLINE>
    # Tools
    <BLANKLINE>
    ## functions
    <BLANKLINE>
    namespace functions {
    <BLANKLINE>
    // Is it raining?
    type rain = (_: {
    at: string,
    }) => any;
    <BLANKLINE>
    } // namespace functions<|end|><|start|>user<|message|>Rain in Oslo?<|end|>\
<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>\
<|start|>assistant to=functions.rain<|channel|>commentary json<|message|>{"at": "Oslo"}<|call|>\
<|start|>functions.rain to=assistant<|channel|>commentary<|message|>"no"<|end|>\
<|start|>assistant<|channel|>final<|message|>No.<|return|>
    """
    messages, names = _messages(row)
    if row.get("builtin_tools"):
        raise ValueError(
            f"builtin_tools: expected none, gpt-oss's own tools are not rendered, got {_show(row['builtin_tools'])}"
        )
    effort = row.get("reasoning_effort") or rendering.reasoning_effort
    instructions, pieces, last = _pieces(messages, names)
    if last == "reasoning":
        raise ValueError(f"{names[-1]}: expected a turn to end with an answer or a tool call, got {pieces[-1].channel}")
    first = len(row["prompt"]) if "messages" not in row else 0
    trained = [piece for piece in pieces if piece.role == "assistant" and piece.turn > 0 and piece.index >= first]
    if not trained:
        raise ValueError(
            f"{names[-1].split('[')[0]}: expected a user message and the assistant's answer to it, got "
            f"{' '.join(message['role'] for message in messages[:8])}"
        )
    turns = sorted({piece.turn for piece in trained})
    head = _head(instructions, _tools(row.get("tools")), effort, rendering)
    return [
        tuple(head + _body(pieces, turn, first, rendering))
        for turn in (turns if rendering.turns == "all" else turns[-1:])
    ]


def prompt(messages: Sequence[Mapping[str, Any]], rendering: Rendering, tools: Any = None) -> Example:
    """What the model is given to answer a conversation: it ends with `<|start|>assistant`, and all of it weighs 0.

    Args:
        messages: as in `render`; the last is a user's, or a tool's result.
        rendering: the options.
        tools: as in `render`.

    Raises:
        ValueError: as in `render`.

    >>> text(prompt([{"role": "user", "content": "Hi"}], Rendering()))[-51:]
    '<|start|>user<|message|>Hi<|end|><|start|>assistant'
    """
    messages, names = _messages({"messages": messages})
    instructions, pieces, _ = _pieces(messages, names)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{names[-1]}.role: expected user or tool, to be answered, got {messages[-1]['role']!r}")
    head = _head(instructions, _tools(tools), rendering.reasoning_effort, rendering)
    start = [Span("<|start|>", True, "assistant", None, 0.0), Span("assistant", False, "assistant", None, 0.0)]
    return tuple(head + _body(pieces, pieces[-1].turn, len(messages), rendering, whole=True) + start)


def encode(example: Iterable[Span], tokenizer) -> Encoded:
    """The example in tokens; `tokenizer.decode(input_ids)` is its text.

    Args:
        example: spans.
        tokenizer: a `transformers` tokenizer that has the special tokens.

    Raises:
        ValueError: the tokenizer lacks a special token, or takes plain text for one.
    """
    example = list(example)
    plain = iter(_encode_plain([span.text for span in example if not span.special], tokenizer))
    ids, weights, channels = [], [], []
    for span in example:
        piece = [_special_id(span.text, tokenizer)] if span.special else next(plain)
        ids += piece
        weights += [span.weight] * len(piece)
        channels += [span.channel or ""] * len(piece)
    return Encoded(ids, weights, channels)


def _encode_plain(texts: list[str], tokenizer) -> list[list[int]]:
    if not texts:
        return []
    # split_special_tokens: text that looks like a special token is cut up like any other text.
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    numbers = {tokenizer.convert_tokens_to_ids(token): token for token in SPECIAL_TOKENS}
    numbers.pop(tokenizer.unk_token_id, None)  # what it answers for a token that it lacks; None without such an id
    for piece, ids in zip(texts, encoded, strict=True):
        if not numbers.keys().isdisjoint(ids):
            token = next(numbers[number] for number in ids if number in numbers)
            raise ValueError(f"tokenizer: expected plain text to stay plain, {token} became a token in {_show(piece)}")
    return encoded


def _special_id(token: str, tokenizer) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        raise ValueError(f"tokenizer: expected one with gpt-oss's special tokens, it has no {token}")
    return number


# From here on: rows to pieces, pieces to spans.


@dataclass(frozen=True)
class _Piece:
    """One Harmony message: <|start|>author to=recipient<|channel|>channel content_type<|message|>content<|end|>."""

    index: int  # of the message it comes from
    turn: int  # user messages so far
    role: str
    author: str
    recipient: str | None
    channel: str | None
    content_type: str | None
    content: str

    @property
    def end(self) -> str:
        return "<|call|>" if self.role == "assistant" and self.recipient else "<|end|>"


def _messages(row: Mapping[str, Any]) -> tuple[list, list[str]]:
    """The messages of a row and what to call each in an error."""
    if not isinstance(row, Mapping):
        raise ValueError(f"row: expected an object, got {_show(row)}")
    columns = ("messages",) if "messages" in row else ("prompt", "completion")
    messages, names = [], []
    for column in columns:
        value = row.get(column)
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{column}: expected a list of messages that is not empty, got {_show(value)}")
        messages += value
        names += [f"{column}[{index}]" for index in range(len(value))]
    return messages, names


def _pieces(messages: list, names: list[str]) -> tuple[str, list[_Piece], str]:
    """The instructions, the Harmony messages, and what the last of them is (see `last`)."""
    instructions, pieces, turn = "", [], 0
    last = "start"  # what the next message follows: start, user, tool, reasoning (or a remark), call, final
    call = None
    for index, (message, name) in enumerate(zip(messages, names, strict=True)):
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}: expected an object with role and content, got {_show(message)}")
        role = _one_of(message.get("role"), ROLES, f"{name}.role")
        if role in ("system", "developer"):
            if index:
                raise ValueError(f"{name}.role: expected instructions as the first message only, got {role!r}")
            instructions = _string(message.get("content"), f"{name}.content")
            continue
        if last == "reasoning" and role != "assistant":
            raise ValueError(
                f"{name}.role: expected assistant, whose turn has no answer or tool call yet, got {role!r}"
            )
        if role == "user":
            turn += 1
            content = _filled(message.get("content"), f"{name}.content")
            pieces.append(_Piece(index, turn, role, "user", None, None, None, content))
            last = "user"
        elif role == "tool":
            if last != "call":
                raise ValueError(
                    f"{name}.role: expected a tool's result right after the assistant's tool call, got 'tool'"
                )
            called = message.get("name")
            if called not in (None, call, f"functions.{call}"):
                raise ValueError(f"{name}.name: expected {call}, the tool that was called, got {_show(called)}")
            content = _json(message.get("content"), f"{name}.content")
            pieces.append(_Piece(index, turn, role, f"functions.{call}", "assistant", "commentary", None, content))
            last = "tool"
        else:
            if last in ("call", "final"):
                expected = {"call": "the tool's result", "final": "user"}[last]
                raise ValueError(f"{name}.role: expected {expected} after a {last} message, got 'assistant'")
            made, last, call = _assistant(message, name, index, turn)
            pieces += made
    return instructions, pieces, last


def _assistant(message: Mapping, name: str, index: int, turn: int) -> tuple[list[_Piece], str, str | None]:
    """The Harmony messages of an assistant message, how they leave the turn, and the tool called."""
    for key in ("reasoning_content", "reasoning"):
        if message.get(key):
            raise ValueError(f"{name}.{key}: expected the reasoning in `thinking`, got {_show(message[key])}")
    thinking = _own_text(message.get("thinking"), f"{name}.thinking")
    content = _own_text(message.get("content"), f"{name}.content")
    calls = message.get("tool_calls") or []
    channel = message.get("channel")
    if channel is None:
        channel = "analysis" if calls else "final"
    _one_of(channel, CHANNELS[:2] if calls else CHANNELS, f"{name}.channel")
    if not content and not calls:
        raise ValueError(f"{name}.content: expected text that is not empty, got {_show(message.get('content'))}")
    if thinking and content and channel == "analysis":
        raise ValueError(
            f"{name}: expected the reasoning in thinking or in content, not in both (a remark to the user has "
            f"channel 'commentary'), got {_show(thinking)} and {_show(content)}"
        )
    made = []
    if thinking:
        made.append(_Piece(index, turn, "assistant", "assistant", None, "analysis", None, thinking))
    if content:
        made.append(_Piece(index, turn, "assistant", "assistant", None, channel, None, content))
    if not calls:
        return made, "final" if channel == "final" else "reasoning", None
    tool, content_type, arguments = _call(calls, f"{name}.tool_calls")
    made.append(
        _Piece(index, turn, "assistant", "assistant", f"functions.{tool}", "commentary", content_type, arguments)
    )
    return made, "call", tool


def _call(calls, name: str) -> tuple[str, str, str]:
    """A tool call's tool, content type and arguments."""
    if not isinstance(calls, (list, tuple)) or len(calls) != 1:
        raise ValueError(f"{name}: expected a list of one call, as gpt-oss makes them one by one, got {_show(calls)}")
    call, name = calls[0], f"{name}[0]"
    if isinstance(call, Mapping) and call.get("function"):
        call, name = call["function"], f"{name}.function"
    if not isinstance(call, Mapping):
        raise ValueError(f"{name}: expected an object with name and arguments, got {_show(call)}")
    tool = _tool_name(call.get("name"), f"{name}.name")
    content_type = _string(call.get("content_type") or "json", f"{name}.content_type")
    if not re.fullmatch(r"(<\|constrain\|>)?[^\s<|>]+", content_type):
        raise ValueError(f"{name}.content_type: expected a word such as 'json', got {_show(content_type)}")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return tool, content_type, _json(arguments, f"{name}.arguments")
    _filled(arguments, f"{name}.arguments")
    if content_type.endswith("json"):
        try:
            json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"{name}.arguments: expected JSON, got {_show(arguments)} ({error})") from None
    return tool, content_type, arguments


def _head(instructions: str, tools: str, effort: Any, rendering: Rendering) -> list[Span]:
    """The system message and, for instructions or tools, the developer message."""
    _one_of(effort, EFFORTS, "reasoning_effort")
    system = (
        f"{rendering.model_identity}\nKnowledge cutoff: 2024-06\nCurrent date: {rendering.conversation_date}\n\n"
        f"Reasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if tools:
        system += "\nCalls to these tools must go to the commentary channel: 'functions'."
    spans = _spans(_Piece(0, 0, "system", "system", None, None, None, system))
    developer = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    if tools:
        developer += f"# Tools\n\n{tools}"
    if developer:
        spans += _spans(_Piece(0, 0, "developer", "developer", None, None, None, developer))
    return spans


def _body(pieces: list[_Piece], turn: int, first: int, rendering: Rendering, *, whole: bool = False) -> list[Span]:
    """The messages up to the end of a turn, as they stand when the model answers it.

    Args:
        first: messages from this index on are trained, if they are the assistant's and of this turn.
        whole: keep what follows the turn's last assistant message.
    """
    pieces = [piece for piece in pieces if piece.turn <= turn]
    while not whole and pieces[-1].role != "assistant":
        pieces.pop()
    answered = max((piece.index for piece in pieces if piece.channel == "final" and piece.turn < turn), default=-1)
    spans, generating = [], False
    for piece in pieces:
        # Reasoning goes once its answer is given and the next user turn begins; before that it stays.
        if piece.role == "assistant" and piece.channel == "analysis" and piece.index <= answered:
            continue
        trained = piece.role == "assistant" and piece.turn == turn and piece.index >= first
        weight = float(rendering.channel_weights.get(piece.channel, 0.0)) if trained else 0.0
        end = f"<|{rendering.end_token}|>" if trained and piece.channel == "final" else None
        made = _spans(piece, weight, end)
        if trained and not generating:  # `<|start|>assistant` is the end of the prompt here
            made[:2] = [Span(span.text, span.special, span.role, None, 0.0) for span in made[:2]]
        spans += made
        generating = trained
    return spans


def _spans(piece: _Piece, weight: float = 0.0, end: str | None = None) -> list[Span]:
    """A Harmony message, its author in a span of its own: a prompt ends there."""
    parts = ["<|start|>", piece.author]
    if piece.recipient:
        parts.append(f" to={piece.recipient}")
    if piece.channel:
        header = f"{piece.channel} {piece.content_type}" if piece.content_type else piece.channel
        parts += ["<|channel|>", *re.split(r"(<\|constrain\|>)", header)]
    parts.append("<|message|>")
    special = {"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"}
    channel = piece.channel if piece.role == "assistant" else None
    spans = [Span(part, part in special, piece.role, channel, weight) for part in parts]
    spans.append(Span(piece.content, False, piece.role, channel, weight))
    spans.append(Span(end or piece.end, True, piece.role, channel, weight))
    return spans


# Tools, as TypeScript.


def _tools(tools: Any) -> str:
    """The declaration of the tools, "" for none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools: expected a list or its JSON, got {_show(tools)} ({error})") from None
    if not tools:
        return ""
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools: expected a list or its JSON, got {_show(tools)}")
    declared = "".join(_declaration(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    return f"## functions\n\nnamespace functions {{\n\n{declared}}} // namespace functions"


def _declaration(tool: Any, name: str) -> str:
    if isinstance(tool, Mapping) and tool.get("function"):
        tool, name = tool["function"], f"{name}.function"
    if not isinstance(tool, Mapping):
        raise ValueError(f"{name}: expected an object with name, description and parameters, got {_show(tool)}")
    head = f"type {_tool_name(tool.get('name'), f'{name}.name')} = "
    if tool.get("description") is not None:
        head = f"// {_string(tool['description'], f'{name}.description')}\n{head}"
    parameters = tool.get("parameters") or {}
    _json(parameters, f"{name}.parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not properties:
        return f"{head}() => any;\n\n"
    if not isinstance(properties, Mapping):
        raise ValueError(f"{name}.parameters.properties: expected an object, got {_show(properties)}")
    required = parameters.get("required") or []
    try:
        lines = [_parameter(key, spec, required) for key, spec in properties.items()]
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}.parameters: expected a JSON schema, got {_show(parameters)} ({error})") from None
    return f"{head}(_: {{\n{''.join(lines)}}}) => any;\n\n"


def _parameter(key: str, spec: Any, required: Sequence[str]) -> str:
    spec = spec if isinstance(spec, Mapping) else {}
    comment = f"// {spec['description']}\n" if spec.get("description") else ""
    line = f"{comment}{key}{'' if key in required else '?'}: {_type(spec)}"
    if "default" in spec:
        default = spec["default"]
        as_written = isinstance(default, str) and (spec.get("enum") or spec.get("oneOf"))
        shown = default if as_written else json.dumps(default, ensure_ascii=False)
        line += f"{'' if spec.get('oneOf') and not spec.get('enum') else ', '}// default: {shown}"
    return f"{line},\n"


def _type(spec: Any) -> str:
    """A JSON schema as a TypeScript type, with the line breaks of gpt-oss's chat template."""
    spec = spec if isinstance(spec, Mapping) else {}
    kind = spec.get("type")
    nullable = " | null" if spec.get("nullable") else ""
    if kind == "array":
        if not spec.get("items"):
            return f"any[]{nullable}"
        inner = _type(spec["items"])
        if isinstance(spec["items"], Mapping) and spec["items"].get("type") == "string":
            inner = "string"
        return f"{'any' if inner == 'object | object' or len(inner) > 50 else inner}[]{nullable}"
    if isinstance(kind, (list, tuple)) and kind:
        return " | ".join(map(str, kind))
    if spec.get("oneOf"):
        return " | \n".join(_variant(variant) for variant in spec["oneOf"])
    if kind == "string":
        if spec.get("enum"):
            return '"' + '" | "'.join(map(str, spec["enum"])) + '"'
        return f"string{nullable}"
    if kind == "object" and spec.get("properties"):
        required = spec.get("required") or []
        indent = "\n" + 16 * " "
        fields = (
            f"{key}{'' if key in required else '?'}: {indent}{_type(inner)}"
            for key, inner in spec["properties"].items()
        )
        return "{\n" + ", ".join(fields) + "}"
    plain = {"number": "number", "integer": "number", "boolean": "boolean", "object": "object"}
    return plain.get(kind, "any") if isinstance(kind, str) else "any"


def _variant(spec: Any) -> str:
    spec = spec if isinstance(spec, Mapping) else {}
    shown = _type(spec)
    if spec.get("description"):
        shown += f"// {spec['description']}"
    if "default" in spec:
        shown += f"{20 * ' '}// default: {json.dumps(spec['default'], ensure_ascii=False)}"
    return shown


# Checks. Each returns what it was given, or says what is wrong with it.


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected valid Unicode, got the lone surrogate {value[error.start]!r} at character {error.start}"
        ) from None
    return value


def _filled(value: Any, name: str) -> str:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name}: expected text that is not empty, got {_show(value)}")
    return _string(value, name)


def _own_text(value: Any, name: str) -> str:
    """What the assistant writes, "" for nothing."""
    if value is None:
        return ""
    for marker in ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"):
        if marker in _string(value, name):
            raise ValueError(
                f"{name}: expected the text alone, reasoning in `thinking` and the answer in `content`, got {marker}"
            )
    return value if value.strip() else ""


def _json(value: Any, name: str) -> str:
    if value is None:
        raise ValueError(f"{name}: expected JSON, got nothing")
    try:
        shown = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got {_show(value)} ({error})") from None
    return _string(shown, name)


def _tool_name(value: Any, name: str) -> str:
    if not re.fullmatch(r"[^\s<|>]+", _string(value, name)):
        raise ValueError(f"{name}: expected a name without white space, '<', '|' and '>', got {_show(value)}")
    return value


def _one_of(value: Any, options: Sequence[str], name: str) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected {_either(options)}, got {_show(value)}")
    return value


def _either(options: Sequence[str]) -> str:
    return f"{', '.join(options[:-1])} or {options[-1]}"


def _show(value: Any) -> str:
    """A value for an error message, cut short."""
    if value is None:
        return "nothing"
    shown = repr(value[:100] if isinstance(value, (str, list, tuple)) else value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
