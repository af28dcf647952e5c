"""Data sets, tokenizers, and the bigram model that a trained model has to beat."""

import json
import re
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import get_training_chat_template

from .config import DataArguments
from .errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED_DATA, SHIPPED_TOKENIZER = "data/reasoning", "data/tokenizer"
ROLES = ("system", "developer", "user", "assistant", "tool")
# The columns of a row, by kind of row; the first kind whose columns are all there is taken.
KINDS = (("messages",), ("prompt", "completion"), ("text",))


def find(name: str) -> Path | None:
    """The file or folder called `name`, looked for from here and then from the project's folder; None if neither."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path
    return None


def load_tokenizer(
    name: str, *, conversation_date: str, assistant_only_loss: bool = False, revision: str = "main"
) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template renders the same text every day and takes messages without reasoning.

    Args:
        name: a name on the Hub or a folder.
        conversation_date: what the template writes where it would ask the clock.
        assistant_only_loss: whether the template has to mark the assistant's tokens.
        revision: branch, tag or commit on the Hub.

    Raises:
        SetupError: there is no such tokenizer, it has no chat template, or it cannot tell padding from the end.
    """
    path = find(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path or name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"tokenizer_name: cannot load {name!r}: {' '.join(str(error).split())[:400]}") from error
    if not tokenizer.chat_template:
        raise SetupError(f"tokenizer_name: {name} has no chat template")
    if tokenizer.eos_token is None or tokenizer.pad_token in (None, tokenizer.eos_token):
        raise SetupError(
            f"tokenizer_name: expected an end token and another one for padding, {name} has "
            f"eos_token={tokenizer.eos_token!r} and pad_token={tokenizer.pad_token!r}"
        )
    if assistant_only_loss and "generation" not in tokenizer.chat_template:
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
        except ValueError as error:
            raise SetupError(
                f"assistant_only_loss: the chat template of {name} does not mark the assistant's tokens with "
                "{% generation %}"
            ) from error
    tokenizer.chat_template = pin_template(tokenizer.chat_template, conversation_date)
    return tokenizer


def pin_template(template: str, conversation_date: str) -> str:
    """A chat template with a fixed date instead of today's, which also takes `thinking: null`.

    A column of messages holds `thinking` in every row or in none, so it is null for most; gpt-oss's template asks only
    whether the key is there.
    """
    template = re.sub(r"strftime_now\([^)]*\)", json.dumps(conversation_date), template)
    return template.replace('"thinking" in message', "message.thinking")


def load_splits(data: DataArguments, *, held_out: bool, seed: int = 42) -> tuple[Dataset, Dataset | None]:
    """The train split and, if held_out, the test split, each checked row by row.

    Returns:
        Data sets with the columns of one kind of row (`messages`, or `prompt` and `completion`, or `text`) and, for
        conversations, `chat_template_kwargs`.

    Raises:
        SetupError: a file is missing or unreadable, a row is malformed (with file and line), a split is empty.
    """
    if data.dataset_name is None:
        raise SetupError("dataset_name: expected a .jsonl file, a folder or a name on the Hub, got nothing")
    share = data.test_split_size
    if share is not None and not 0 < share < 1:
        raise SetupError(f"test_split_size: expected a share between 0 and 1, got {share}")
    train = _load_split(data, data.dataset_train_split)
    test = None
    if held_out and share is not None:
        halves = train.train_test_split(test_size=share, seed=seed)
        train, test = halves["train"], halves["test"]
    elif held_out:
        test = _load_split(data, data.dataset_test_split)
    return tuple(split and _with_template_arguments(split, data) for split in (train, test))


def _load_split(data: DataArguments, split: str) -> Dataset:
    name = data.dataset_name
    path = find(name)
    if path is None and not _looks_like_hub(name):
        raise SetupError(f"dataset_name: there is no file or folder {name}")
    if path is None:
        try:
            dataset = load_dataset(name, data.dataset_config, split=split)
        except Exception as error:  # not found, no network, no such split, a broken file: no common base class
            reason = " ".join(str(error).split())[:300]
            raise SetupError(f"dataset_name: cannot load split {split!r} of {name}: {reason}") from error
        kind = next((kind for kind in KINDS if set(kind) <= set(dataset.column_names)), None)
        if kind is None:
            raise SetupError(f"dataset_name: expected {_kinds()}, {name} has the columns {dataset.column_names}")
        return dataset.select_columns(list(kind))
    if path.is_dir():
        folder, path = path, path / f"{split}.jsonl"
        if not path.is_file():
            present = sorted(p.name for p in folder.glob("*.jsonl")) or "no .jsonl file"
            raise SetupError(f"dataset_name: {path} is missing; {folder} holds {present}")
    elif split != data.dataset_train_split:
        raise SetupError(
            f"dataset_name: {name} is one file, and the held-out rows must come from somewhere: set test_split_size, "
            f"name a folder with {split}.jsonl, or set eval_strategy to 'no'"
        )
    return Dataset.from_list(read_rows(path))


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, without columns that training does not use.

    Raises:
        SetupError: naming the file and the line, for anything but one well-formed conversation, prompt with
            completion, or text a line, all lines of one kind.
    """
    rows, kind = [], None
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    found = _check_row(row)
                except (ValueError, TypeError) as error:
                    raise SetupError(f"{path}, line {number}: {error}") from None
                kind = kind or found
                if found != kind:
                    raise SetupError(f"{path}, line {number}: expected {' and '.join(kind)} as above, got {list(row)}")
                rows.append({column: row[column] for column in kind})
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"dataset_name: cannot read {path}: {error}") from error
    if not rows:
        raise SetupError(f"dataset_name: {path} holds no rows")
    return rows


def _check_row(row) -> tuple[str, ...]:
    """The kind of a row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    kind = next((kind for kind in KINDS if set(kind) <= set(row)), None)
    if kind is None:
        raise ValueError(f"expected {_kinds()}, got {list(row)}")
    for column in kind:
        value = row[column]
        if column == "text" and not isinstance(value, str):
            raise ValueError(f"text: expected a string, got {json.dumps(value)[:80]}")
        if column == "messages" or not isinstance(value, str):
            _check_messages(value, column)
    if len({type(row[column]) for column in kind}) > 1:
        raise ValueError("prompt, completion: expected two strings or two lists of messages, got one of each")
    last = row[kind[-1]][-1:]
    if isinstance(last, list) and last[0]["role"] != "assistant":
        raise ValueError(f"{kind[-1]}: expected the last role to be 'assistant', got {last[0]['role']!r}")
    return kind


def _check_messages(messages, column: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column}: expected a list of messages that is not empty, got {json.dumps(messages)[:80]}")
    for index, message in enumerate(messages):
        where = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: expected an object with role and content, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}.role: expected one of {', '.join(ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}.content: expected a string, got {message.get('content')!r}")
        if not isinstance(message.get("thinking"), (str, type(None))):
            raise ValueError(f"{where}.thinking: expected a string or null, got {message.get('thinking')!r}")


def _kinds() -> str:
    return "`messages`, or `prompt` and `completion`, or `text`"


def _looks_like_hub(name: str) -> bool:
    parts = name.split("/")
    local = Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt") or name.startswith((".", "/", "~"))
    return not local and len(parts) <= 2 and not (len(parts) == 2 and find(parts[0]))


def _with_template_arguments(dataset: Dataset, data: DataArguments) -> Dataset:
    if "text" in dataset.column_names:
        return dataset
    arguments = {"reasoning_effort": data.reasoning_effort, "conversation_date": data.conversation_date}
    return dataset.add_column("chat_template_kwargs", [arguments] * len(dataset))


def bigram_entropy(train: Dataset, test: Dataset) -> float:
    """Held-out cross-entropy of a bigram model in nats a token: what is left to explain once the last token is known.

    The model is fit on the train rows with Witten-Bell smoothing: p(b|a) = (n(ab) + t(a) p(b)) / (n(a) + t(a)), where
    t(a) is the number of distinct tokens seen after a, and p(b) the token's frequency, with one added to each count.
    The tokens scored are those that the training loss counts: not the first of a document, not a masked one.

    Args:
        train, test: prepared by the trainer: input_ids, labels and, where rows are packed, seq_lengths.
    """
    a, b, _ = _transitions(train)
    x, y, scored = _transitions(test)
    size = int(max(a.max(), b.max(), x.max(), y.max())) + 1
    unigram = np.bincount(b, minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(a * size + b, return_counts=True)
    followed = np.bincount(a, minlength=size)
    kinds = np.bincount(pairs // size, minlength=size)

    x, y = x[scored], y[scored]
    wanted = x * size + y
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    total = followed[x] + kinds[x]
    known = (seen + kinds[x] * unigram[y]) / np.maximum(total, 1)
    return float(-np.log(np.where(total > 0, known, unigram[y])).mean())


def _transitions(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every step from a token to the next within a document, and whether the loss counts it."""
    before, after, scored = [], [], []
    for row in dataset:
        ids, labels = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["labels"])
        inside = np.ones(len(ids), dtype=bool)
        starts = np.cumsum([0, *row["seq_lengths"][:-1]]) if "seq_lengths" in row else [0]
        inside[starts] = False
        at = np.flatnonzero(inside)
        before.append(ids[at - 1])
        after.append(ids[at])
        scored.append(labels[at] != -100)
    return np.concatenate(before), np.concatenate(after), np.concatenate(scored)
