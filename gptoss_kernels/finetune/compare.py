"""How far an exported model is from the trained one, on held-out text: KL divergence, and the likeliest token."""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DataArguments
from .data import SHIPPED_DATA, Split, encode, find, load_splits, load_tokenizer
from .errors import SetupError
from .model import (
    count_packed_bytes,
    count_parameters,
    load_adapter,
    load_checkpoint,
    load_config,
    load_packed,
    quantization_method,
)

LENGTH = 1024  # tokens of one pass, at most
ROWS = 128  # tokens whose probabilities are compared at a time
LARGEST_ON_CPU = 1_000_000_000  # parameters; more would take hours


@dataclass
class Comparison:
    """kl: mean over tokens of KL(trained || exported), in nats; top1: share of tokens, 0 to 1, whose likeliest next
    token is the same. Both None if nothing was compared, and `note` says why; otherwise it says how."""

    kl: float | None
    top1: float | None
    tokens: int
    note: str

    def __str__(self) -> str:
        if self.kl is None:
            return f"not compared: {self.note}"
        return (
            f"compared on {self.tokens:,} tokens ({self.note}): KL(trained || exported) {self.kl:.2e} nats a token, "
            f"the same likeliest token for {self.top1:.2%}"
        )


def compare(
    source: str | Path, base: str | Path, out: str | Path, *, text: str | None = None, tokens: int = 4096
) -> Comparison:
    """Runs the trained model, then the exported one, through this package's loading code; in fp32 where that fits.

    The log-probabilities of the first are on the disk while the second runs: 4 bytes a token and word.

    Args:
        source: the folder with the adapter or the model that was exported.
        base: the checkpoint under the adapter; unused without one.
        out: the exported folder.
        text: .txt, .jsonl, .csv, a folder with a test split, or a data set on the Hub. None: data/reasoning.
        tokens: of it, at most.

    Raises:
        SetupError: a model or the text cannot be read, or the text has fewer than two tokens.
    """
    source, adapter = Path(source), (Path(source) / "adapter_config.json").is_file()
    names = [str(base) if adapter else str(source), str(out)]
    configs = [load_config(name) for name in names]
    choice = _choose(configs)
    if choice is None:
        again = f"python -m gptoss_kernels.finetune.export {source} --base {base} --to … --out {out} --check only"
        return Comparison(None, None, 0, f"the models are too large for this machine; on a larger one: {again}")
    device, dtype = choice
    tokenizer = load_tokenizer(names[1], conversation_date=DataArguments().conversation_date)
    documents = held_out(text, tokenizer, tokens)
    count, words = sum(len(document) - 1 for document in documents), configs[1].vocab_size
    with tempfile.TemporaryDirectory(dir=Path(out).resolve().parent) as folder:
        path = str(Path(folder) / "log_probs")
        kept = torch.from_file(path, shared=True, size=count * words, dtype=torch.float32).view(count, words)
        model = _load(names[0], configs[0], device, dtype)
        if adapter:
            model = load_adapter(model, str(source))
        for start, log_probs in _log_probs(model, documents):
            kept[start : start + len(log_probs)] = log_probs.cpu()
        del model
        gc.collect()
        kl, same = 0.0, 0
        for start, got in _log_probs(_load(names[1], configs[1], device, dtype), documents):
            want = kept[start : start + len(got)].to(got.device)
            same += (want.argmax(-1) == got.argmax(-1)).sum().item()
            want, got = want.double(), got.double()
            kl += (want.exp() * (want - got)).sum().item()
        del kept
    how = f"{text or SHIPPED_DATA}, {str(dtype).removeprefix('torch.')} on {device.type}"
    return Comparison(kl / count, same / count, count, how)


def held_out(text: str | None, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """Documents of a text, as `compare` takes it, in pieces of at most LENGTH tokens, together at most `tokens` + 1."""
    name = text or SHIPPED_DATA
    path = find(name)
    if path is not None and path.suffix == ".txt":
        try:
            documents = [tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids]
        except (OSError, ValueError) as error:
            raise SetupError(f"text: cannot read {path}: {error}") from error
    else:
        split = "test" if path is None or path.is_dir() else "train"
        data = DataArguments(dataset_name=name, dataset_train_split=split)
        split, _ = load_splits(data, held_out=False)
        documents = _encoded(split, tokenizer, data)
    pieces, left = [], tokens
    for document in documents:
        for start in range(0, len(document) - 1, LENGTH - 1):  # a piece's last token is the next one's first
            piece = document[start : start + LENGTH][: left + 1]
            if len(piece) > 1:
                pieces.append(piece)
                left -= len(piece) - 1
        if not left:
            break
    if not pieces:
        raise SetupError(f"text: expected at least two tokens, {name} has fewer")
    return pieces


def _encoded(split: Split, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Iterator[list[int]]:
    """Every example of the split; row by row, as the first few are all that is wanted."""
    for row, place in zip(split.rows, split.places, strict=True):
        for document in encode(Split(split.name, [row], [place]), tokenizer, data):
            yield document.input_ids.tolist()


def _choose(configs: list) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype in which the larger of the models fits, with a fifth to spare."""
    gpu = torch.cuda.is_available()
    if not gpu and max(map(count_parameters, configs)) > LARGEST_ON_CPU:
        return None
    device = torch.device("cuda" if gpu else "cpu")
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    for dtype in (torch.float32, torch.bfloat16):
        sizes = (
            count_packed_bytes(config, dtype) if quantization_method(config) == "mxfp4"
            else count_parameters(config) * dtype.itemsize
            for config in configs
        )  # fmt: skip
        if 1.2 * max(sizes) < free:
            return device, dtype
    return None


def _load(name: str, config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    keys = {"dtype": dtype, "attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    if quantization_method(config) == "mxfp4":
        return load_packed(name, config, device=device, **keys)
    return load_checkpoint(name, config, device_map={"": device}, **keys)


@torch.no_grad()
def _log_probs(model: PreTrainedModel, documents: list[list[int]]):
    """(number of the first token, fp32 log-probabilities (tokens, words)) of a few tokens at a time."""
    model.eval()
    place = 0
    for document in documents:
        hidden = model(torch.tensor([document[:-1]], device=model.device)).logits[0]
        for rows in hidden.split(ROWS):
            yield place, rows.float().log_softmax(-1)
            place += len(rows)
