"""A model's reply to a prompt, streamed with its channels apart, or to many."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from . import harmony
from .data import load_tokenizer
from .errors import SetupError
from .model import load_adapter, load_checkpoint, load_config, load_packed

MESSAGE, ENDS = "<|message|>", ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
ENDED = re.compile("|".join(map(re.escape, ENDS)))


def channels(text: str) -> list[dict[str, str]]:
    """The messages of a reply as `reply` returns it, in their order, an unfinished one included.

    Returns:
        {"channel": "analysis", "commentary" or "final", "to": recipient of a tool call or "", "text": ...} each; what
        is no Harmony stands in one with channel "".
    """
    messages, header = [], ""
    for part in ENDED.split(text):
        if MESSAGE not in part:
            header = part  # "assistant" after <|start|>; of an unfinished reply, its last header
            continue
        header, _, body = part.partition(MESSAGE)
        channel, to = re.search(r"<\|channel\|>(\w+)", header), re.search(r"to=([^\s<]+)", header)
        messages.append({"channel": channel[1] if channel else "", "to": to[1] if to else "", "text": body})
    return messages or [{"channel": "", "to": "", "text": header}]


class ChannelStreamer(TextStreamer):
    """Prints a reply as it comes, each message under the name of its channel or of the tool that it calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True)
        self._header, self._body = [], False

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for token in value.flatten().tolist():
            name = self.tokenizer.convert_ids_to_tokens(token)
            if name == MESSAGE:
                (message,) = channels(self.tokenizer.decode(self._header) + MESSAGE)
                print(f"[{'call ' + message['to'] if message['to'] else message['channel']}]", flush=True)
                self._header, self._body = [], True
            elif name in ENDS:
                if self._body:
                    super().end()
                    self.next_tokens_are_prompt = False
                self._body = False
            elif self._body:
                super().put(torch.tensor([token]))
            else:
                self._header.append(token)

    def end(self) -> None:
        if self._body:
            super().end()
        self._header, self._body, self.next_tokens_are_prompt = [], False, True


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
    rendering: harmony.Rendering | None = None,
) -> str:
    """What the model answers, reasoning and channel markers included.

    Args:
        model, tokenizer: a causal language model and its tokenizer, with Harmony's special tokens.
        prompt: the user's message.
        system: the system's or developer's message before it.
        max_new_tokens: longest reply; it ends earlier at the tokenizer's end token or a tool call.
        temperature: 0 takes the likeliest token each time.
        streamer: gets the tokens as they come.
        rendering: of the prompt; its date and reasoning effort count, as in training. None: the defaults.

    Raises:
        ValueError: the prompt or the system's message is empty, or no text.
    """
    rendered = render(prompt, system, rendering or harmony.Rendering())
    (text,) = _generate(model, tokenizer, [rendered], max_new_tokens, temperature, streamer)
    return text


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[harmony.Example],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 8,
) -> list[str]:
    """As `reply`, for many prompts of `harmony.prompt`, batch_size of them at a time, padded on the left."""
    texts = []
    with tqdm(total=len(prompts), unit=" prompts", disable=None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            texts += _generate(model, tokenizer, batch, max_new_tokens, temperature)
            bar.update(len(batch))
    return texts


@torch.no_grad()
def _generate(model, tokenizer, prompts, max_new_tokens, temperature, streamer=None) -> list[str]:
    ids = [harmony.encode(prompt, tokenizer).input_ids for prompt in prompts]
    length, pad = max(map(len, ids)), tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=model.device)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|call|>")]
    was_training = model.training
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    rows = []
    for row in output[:, length:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))  # padding after it
        rows.append(tokenizer.decode(row[:stop]))
    return rows


def render(prompt: str, system: str | None, rendering: harmony.Rendering) -> harmony.Example:
    """The prompt as training renders it. ValueError says what is wrong with it."""
    messages = [{"role": "system", "content": system}] if system else []
    return harmony.prompt([*messages, {"role": "user", "content": prompt}], rendering)


def read_prompts(path: str | Path, system: str | None, rendering: harmony.Rendering) -> list[harmony.Example]:
    """The prompts in a file: of .jsonl, `messages` (and `tools`) or `prompt` of each row; of others, each line.

    Raises:
        SetupError: it cannot be read, holds nothing, or a line is no prompt, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SetupError(f"prompts: cannot read {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if str(path).endswith(".jsonl") else {"prompt": line}
            if not isinstance(row, dict) or not {"messages", "prompt"} & set(row):
                raise ValueError("expected an object with messages or prompt")
            if "messages" in row:
                prompts.append(harmony.prompt(row["messages"], rendering, row.get("tools")))
            else:
                prompts.append(render(row["prompt"], row.get("system", system), rendering))
        except ValueError as error:
            raise SetupError(f"prompts: {path}, line {number}: {error}") from None
    if not prompts:
        raise SetupError(f"prompts: expected a prompt a line, {path} has none")
    return prompts


def answer(prompts: str, output: str, *, batch_size: int = 8, max_new_tokens: int, temperature: float, **keys) -> int:
    """Loads a model as `stream` does and writes its replies to the prompts of a file, one JSON object a line: `reply`,
    as generated, and `messages`, see `channels`. Returns how many.

    Raises:
        SetupError: as `stream` and `read_prompts`; output is there already.
    """
    if Path(output).exists():
        raise SetupError(f"output: expected a file that is not there yet, {output} is")
    rendering = _rendering(keys)
    examples = read_prompts(prompts, keys.pop("system"), rendering)
    model, tokenizer = _load(**keys)
    texts = replies(
        model, tokenizer, examples, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size
    )
    with open(output, "x", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"reply": text, "messages": channels(text)}, ensure_ascii=False) + "\n")
    return len(texts)


def _rendering(keys: dict) -> harmony.Rendering:
    try:
        return harmony.Rendering(
            reasoning_effort=keys.pop("reasoning_effort"), conversation_date=keys["conversation_date"]
        )
    except ValueError as error:
        raise SetupError(str(error)) from None


def stream(
    model: str,
    adapter: str | None,
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    reasoning_effort: str,
    conversation_date: str,
    dtype: str,
    attn_implementation: str,
    base_weights: str = "bf16",
    raw: bool = True,
) -> str:
    """Loads a model, with an adapter or without, and prints its reply to a prompt token by token: with raw as it is
    generated, otherwise with its channels apart. Attention and experts run through this package's kernels.

    Raises:
        SetupError: the model, the adapter or the tokenizer cannot be read, or the prompt is no text.
    """
    try:
        rendering = harmony.Rendering(reasoning_effort=reasoning_effort, conversation_date=conversation_date)
        render(prompt, system, rendering)
    except ValueError as error:
        raise SetupError(str(error)) from None
    network, tokenizer = _load(model, adapter, conversation_date, dtype, attn_implementation, base_weights)
    return reply(
        network,
        tokenizer,
        prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        streamer=TextStreamer(tokenizer, skip_prompt=True) if raw else ChannelStreamer(tokenizer),
        rendering=rendering,
    )


def _load(
    model: str,
    adapter: str | None,
    conversation_date: str,
    dtype: str,
    attn_implementation: str,
    base_weights: str = "bf16",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = load_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    keys = {
        "dtype": dtype, "attn_implementation": attn_implementation, "experts_implementation": "gptoss_triton",
    }  # fmt: skip
    if base_weights == "mxfp4":
        network = load_packed(model, config, device=device, **keys)
    else:
        network = load_checkpoint(model, config, device_map={"": device}, **keys)
    if adapter is not None:
        network = load_adapter(network, adapter)
    return network, load_tokenizer(model, conversation_date=conversation_date)
