"""A model's reply to one prompt."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .data import load_tokenizer
from .model import load_adapter, load_checkpoint, load_config


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
    **template_arguments,
) -> str:
    """What the model answers, reasoning and channel markers included.

    Args:
        model, tokenizer: a causal language model and its tokenizer, with a chat template.
        prompt: the user's message.
        system: the system's or developer's message before it.
        max_new_tokens: longest reply; it ends earlier at the tokenizer's end token.
        temperature: 0 takes the likeliest token each time.
        streamer: gets the tokens as they come.
        template_arguments: reasoning_effort, conversation_date and what else the chat template knows.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_arguments
    ).to(model.device)
    was_training = model.training
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


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
) -> str:
    """Loads a model, with an adapter or without, and prints its reply to a prompt token by token.

    Raises:
        SetupError: the model, the adapter or the tokenizer cannot be read.
    """
    config = load_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        reasoning_effort=reasoning_effort,
        conversation_date=conversation_date,
    )
