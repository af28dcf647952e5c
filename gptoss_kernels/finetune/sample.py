"""A model's reply to one prompt."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from . import harmony
from .data import load_tokenizer
from .errors import SetupError
from .model import load_adapter, load_checkpoint, load_config, load_packed


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
    input_ids = torch.tensor([harmony.encode(rendered, tokenizer).input_ids], device=model.device)
    was_training = model.training
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|call|>")],
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    return tokenizer.decode(output[0, input_ids.shape[1] :])


def render(prompt: str, system: str | None, rendering: harmony.Rendering) -> harmony.Example:
    """The prompt as training renders it. ValueError says what is wrong with it."""
    messages = [{"role": "system", "content": system}] if system else []
    return harmony.prompt([*messages, {"role": "user", "content": prompt}], rendering)


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
) -> str:
    """Loads a model, with an adapter or without, and prints its reply to a prompt token by token.

    Raises:
        SetupError: the model, the adapter or the tokenizer cannot be read, or the prompt is no text.
    """
    try:
        rendering = harmony.Rendering(reasoning_effort=reasoning_effort, conversation_date=conversation_date)
        render(prompt, system, rendering)
    except ValueError as error:
        raise SetupError(str(error)) from None
    config = load_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if base_weights == "mxfp4":
        keys = {"attn_implementation": attn_implementation, "experts_implementation": "gptoss_triton"}
        network = load_packed(model, config, dtype=dtype, device=device, **keys)
    else:
        network = load_checkpoint(
            model, config, dtype=dtype, device_map={"": device}, attn_implementation=attn_implementation
        )
    if adapter is not None:
        network = load_adapter(network, adapter)
    tokenizer = load_tokenizer(model, conversation_date=conversation_date)
    return reply(
        network,
        tokenizer,
        prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        rendering=rendering,
    )
