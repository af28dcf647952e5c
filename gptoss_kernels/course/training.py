"""Finetuning in a notebook: runs that say little, replies in batches, and a judge of the language they reason in."""

import contextlib
import functools
import gc
import io
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..finetune import harmony
from ..finetune.config import parse
from ..finetune.model import load_adapter, load_checkpoint, load_config, load_packed, quantization_method
from ..finetune.train import Result, run

REPLY = re.compile(
    r"<\|channel\|>analysis<\|message\|>(?P<analysis>.*?)<\|end\|>"
    r"<\|start\|>assistant<\|channel\|>final<\|message\|>(?P<final>.*?)<\|return\|>",
    re.DOTALL,
)


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping]],
    max_new_tokens: int = 96,
) -> list[str]:
    """The model's likeliest replies, channel markers included, in one batch.

    Args:
        conversations: messages of each, the last a user's.
        max_new_tokens: longest reply.
    """
    prompts = [harmony.prompt(messages, harmony.Rendering()) for messages in conversations]
    rows = [harmony.encode(prompt, tokenizer).input_ids for prompt in prompts]
    longest, pad = max(map(len, rows)), tokenizer.pad_token_id
    # Padding on the left: a reply begins where its prompt ends.
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    out = model.eval().generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    return [text.replace(tokenizer.pad_token, "") for text in tokenizer.batch_decode(out[:, longest:])]


def channels(reply: str) -> dict[str, str]:
    """The `analysis` and the `final` text of a reply; {} if it is no whole Harmony reply."""
    match = REPLY.fullmatch(reply)
    return match.groupdict() if match else {}


class Judge:
    """Tells the language of a text by words: each votes for the language in whose reasoning alone it was seen.

    Args:
        rows: with `reasoning_language` and `analysis`.
    """

    def __init__(self, rows: Sequence[Mapping]):
        seen = defaultdict(set)
        for row in rows:
            seen[row["reasoning_language"]].update(self._words(row["analysis"]))
        self.own = {
            name: words - set().union(*(other for key, other in seen.items() if key != name))
            for name, words in seen.items()
        }

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"[^\W\d]+", text.lower())

    def language_of(self, text: str) -> str | None:
        """The language with most votes; None without any."""
        votes = {name: sum(word in own for word in self._words(text)) for name, own in self.own.items()}
        return max(votes, key=votes.get) if any(votes.values()) else None

    def score(self, rows: Sequence[Mapping], replies: Sequence[str]) -> dict[str, dict[str, int]]:
        """By the language asked for: `problems`, `right` answers (the last number of the final channel), and replies
        whose reasoning was in the language `asked` for.

        Args:
            rows: with `reasoning_language` and `answer`.
            replies: from `ask`.
        """
        counts = {name: {"problems": 0, "right": 0, "asked": 0} for name in self.own}
        for row, reply in zip(rows, replies, strict=True):
            found, count = channels(reply), counts[row["reasoning_language"]]
            count["problems"] += 1
            count["right"] += re.findall(r"\d+", found.get("final", ""))[-1:] == [row["answer"]]
            count["asked"] += self.language_of(found.get("analysis", "")) == row["reasoning_language"]
        return counts


class Live(TrainerCallback):
    """Prints the loss as it comes in, to where output went when this was made."""

    def __init__(self):
        self.screen = sys.stdout

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:3}  loss {float(logs['loss']):.3f}", file=self.screen)


def finetune(options: Sequence[str], *, download: bool = False, save: bool = True) -> Result:
    """Trains as sft.py does; of what that prints, the loss and what is trained.

    Args:
        options: sft.py's command line.
        download: whether a model that is not here may be fetched.
        save: False leaves the model out of what is written, where speed and memory are all that is asked for.

    Raises:
        RuntimeError: the model is no folder here, and neither random weights nor a download were asked for.
        SetupError: as sft.py.
    """
    arguments, said = parse(list(options)), io.StringIO()
    name = arguments.model.model_name_or_path
    if not (download or arguments.model.model_init == "random" or Path(name).is_dir()):
        raise RuntimeError(f"model_name_or_path: {name} is no folder here, and download is False")
    arguments.run.sample_prompt = None
    live = Live()
    with contextlib.redirect_stdout(said):
        result = run(arguments, callbacks=(live,), save=save)
    print(*(line for line in said.getvalue().splitlines() if line.startswith(("model:", "trained:"))), sep="\n")
    gc.collect()  # the trainer holds itself, and with it the model
    return result


def load_result(
    name: str, adapter: Path | str, device: torch.device | str, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """A model with the adapter that was trained on it; MXFP4 experts stay packed.

    Args:
        name: of the model: a folder, or a name on the Hub.
        adapter: the run's output_dir.
        device: where to.
        dtype: of all that is not packed; "auto" keeps the checkpoint's.

    Raises:
        SetupError: one of the two cannot be read.
    """
    config = load_config(name)
    if quantization_method(config) == "mxfp4":
        load = functools.partial(load_packed, device=device, experts_implementation="gptoss_triton")
    else:
        load = functools.partial(load_checkpoint, device_map={"": device})
    return load_adapter(load(name, config, dtype=dtype, attn_implementation="gptoss_triton"), str(adapter))
