"""Data sets and tokenizers: from files and the Hub to the rows that are trained.

A row is one of
  messages             a conversation; or prompt and completion as lists of messages, of which the second is trained
  user, final          one question and its answer as columns; optional: analysis, developer, reasoning_language
  prompt, completion   two strings, joined as they are; the completion is trained
  text                 a string, trained as a whole
and a conversation may have `tools` and `reasoning_effort` of its own. Other columns are ignored.

`python -m gptoss_kernels.finetune.data show --config FILE` shows what of them is trained.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import harmony
from .config import Arguments, DataArguments
from .errors import SetupError
from .packing import CHANNELS, Document, Report, build, truncate

ROOT = Path(__file__).resolve().parents[2]
SHIPPED_DATA, SHIPPED_TOKENIZER = "data/reasoning", "data/tokenizer"
SPECIAL = ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
# The columns of a row, by kind of row; the first kind whose columns are all there is taken.
KINDS = (("messages",), ("prompt", "completion"), ("user", "final"), ("text",))
OPTIONAL = ("tools", "reasoning_effort", "chat_template_kwargs", "analysis", "developer", "reasoning_language")


@dataclass
class Split:
    """Rows as they were read."""

    name: str
    rows: list[dict] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # where each row stands: file and line, or name and number
    skipped: list[str] = field(default_factory=list)  # where and why

    def bad(self, place: str, error: Exception, policy: str) -> None:
        """A row that cannot be trained on: an error, or one more that is skipped."""
        if policy == "error":
            raise SetupError(f"{place}: {error} (bad_rows: skip leaves such rows out)") from None
        self.skipped.append(f"{place}: {error}")


def find(name: str) -> Path | None:
    """The file or folder called `name`, looked for from here and then from the project's folder; None if neither."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path
    return None


def load_tokenizer(name: str, *, conversation_date: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """A tokenizer with Harmony's special tokens; its chat template, if any, renders the same text every day.

    Args:
        name: a name on the Hub or a folder.
        conversation_date: what the template writes where it would ask the clock.
        revision: branch, tag or commit on the Hub.

    Raises:
        SetupError: there is no such tokenizer, it lacks a special token, or it cannot tell padding from the end.
    """
    path = find(name)
    if path is None and not _looks_like_hub(name):
        raise SetupError(f"tokenizer_name: there is no folder {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path or name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"tokenizer_name: cannot load {name!r}: {' '.join(str(error).split())[:400]}") from error
    missing = [token for token in SPECIAL if token not in tokenizer.get_added_vocab()]
    if missing:
        raise SetupError(f"tokenizer_name: expected Harmony's special tokens, {name} lacks {' '.join(missing)}")
    if tokenizer.eos_token is None or tokenizer.pad_token in (None, tokenizer.eos_token):
        raise SetupError(
            f"tokenizer_name: expected an end token and another one for padding, {name} has "
            f"eos_token={tokenizer.eos_token!r} and pad_token={tokenizer.pad_token!r}"
        )
    if tokenizer.chat_template:
        tokenizer.chat_template = pin_template(tokenizer.chat_template, conversation_date)
    return tokenizer


def pin_template(template: str, conversation_date: str) -> str:
    """A chat template with a fixed date instead of today's, which also takes `thinking: null`.

    A column of messages holds `thinking` in every row or in none, so it is null for most; gpt-oss's template asks only
    whether the key is there.
    """
    template = re.sub(r"strftime_now\([^)]*\)", json.dumps(conversation_date), template)
    return template.replace('"thinking" in message', "message.thinking")


def load_splits(
    data: DataArguments, *, held_out: bool, seed: int = 42, progress: bool = False
) -> tuple[Split, Split | None]:
    """The train split and, if held_out, the test split, as rows of one kind.

    Args:
        data: which data; a share of the train split is held out if test_split_size says so.
        held_out: whether a test split is wanted.
        seed: of that share.
        progress: whether to show how far reading is.

    Raises:
        SetupError: a file is missing or unreadable, a row is malformed (with file and line), a split is empty.
    """
    if data.dataset_name is None:
        raise SetupError("dataset_name: expected a .jsonl or .csv file, a folder or a name on the Hub, got nothing")
    share = data.test_split_size
    if share is not None and not 0 < share < 1:
        raise SetupError(f"test_split_size: expected a share between 0 and 1, got {share}")
    train = _load_split(data, data.dataset_train_split, progress)
    if not held_out:
        return train, None
    if share is None:
        return train, _load_split(data, data.dataset_test_split, progress)
    if len(train.rows) < 2:
        raise SetupError(f"test_split_size: expected at least 2 rows to share out, {data.dataset_name} has 1")
    halves = Dataset.from_dict({"row": range(len(train.rows))}).train_test_split(test_size=share, seed=seed)
    parts = []
    for name, part in (("train", halves["train"]["row"]), ("test", halves["test"]["row"])):
        parts.append(Split(name, [train.rows[i] for i in part], [train.places[i] for i in part]))
    parts[0].skipped = train.skipped
    return parts[0], parts[1]


def prepare(
    split: Split, tokenizer: PreTrainedTokenizerBase, arguments: Arguments, *, packing: bool, progress: bool = False
) -> tuple[Dataset, Report]:
    """What the trainer gets of a split, and what became of it.

    Args:
        split: from `load_splits`.
        tokenizer: from `load_tokenizer`.
        arguments: all settings; the data's and max_length are used.
        packing: whether documents share rows of max_length tokens.
        progress: whether to show how far it is.

    Returns:
        The data set, see `packing.build`, and the report.

    Raises:
        SetupError: a row is malformed (with its place), a setting does not fit the rows, or nothing is left.
    """
    for key in ("assistant_only_loss", "completion_only_loss"):
        if getattr(arguments.training, key) and "text" in split.rows[0]:
            raise SetupError(f"{key}: expected conversations or prompts with completions, got rows of `text`")
    documents = encode(split, tokenizer, arguments.data, progress=progress)
    report = Report(split.name, conversations=len(split.rows), skipped=split.skipped)
    documents = truncate(documents, arguments.training.max_length, report)
    if not documents:
        raise SetupError(f"dataset_name: nothing of the {split.name} split can be trained on\n  {report}")
    return build(documents, packing, report), report


def encode(
    split: Split, tokenizer: PreTrainedTokenizerBase, data: DataArguments, *, progress: bool = False
) -> list[Document]:
    """Every example of a split in tokens, whole. Malformed rows are taken out of the split, if bad_rows is skip.

    Raises:
        SetupError: a row is malformed, with its place.
    """
    rendering, documents, bad = data.rendering(), [], set()
    rows = tqdm(split.rows, desc=f"tokenizing {split.name}", unit=" rows", disable=not progress, leave=False)
    for number, row in enumerate(rows):
        try:
            made = [harmony.encode(example, tokenizer) for example in examples(row, rendering, tokenizer.eos_token)]
        except ValueError as error:
            split.bad(split.places[number], error, data.bad_rows)
            bad.add(number)
            continue
        documents += map(_document, made)
    for name in ("rows", "places"):
        setattr(split, name, [x for number, x in enumerate(getattr(split, name)) if number not in bad])
    return documents


def examples(row: dict, rendering: harmony.Rendering, eos_token: str) -> list[harmony.Example]:
    """A row's training examples, as spans of text with weights.

    Args:
        row: of any kind.
        rendering: of conversations.
        eos_token: what ends plain text.

    Raises:
        ValueError: what is wrong with the row, by column.
    """
    kind = next((kind for kind in KINDS if set(kind) <= set(row)), None)
    if kind is None:
        raise ValueError(f"expected {_kinds()}, got {list(row)}")
    if kind == ("user", "final"):
        return harmony.render(_settings(row) | {"messages": _messages(row)}, rendering)
    strings = [isinstance(row[column], str) for column in kind]
    if kind == ("text",):
        return [_plain({"text": 1.0}, row, eos_token)]
    if kind == ("messages",) or not any(strings):
        return harmony.render(_settings(row) | {column: row[column] for column in kind}, rendering)
    if not all(strings):
        raise ValueError("prompt, completion: expected two strings or two lists of messages, got one of each")
    return [_plain({"prompt": 0.0, "completion": 1.0}, row, eos_token)]


def _plain(weights: dict[str, float], row: dict, eos_token: str) -> harmony.Example:
    """Text that is no conversation, and its end."""
    spans = []
    for column, weight in weights.items():
        text = row[column]
        _check_text(column, text)
        if not text:
            raise ValueError(f"{column}: expected a string that is not empty, got ''")
        if text.lstrip().startswith(("<|start|>", "<|startoftext|>")):
            raise ValueError(
                f"{column}: expected plain text, in which <|start|> is no token, got a rendered conversation; give its "
                "messages"
            )
        spans.append(harmony.Span(text.removesuffix(eos_token), False, "", None, weight))
    return (*(span for span in spans if span.text), harmony.Span(eos_token, True, "", None, spans[-1].weight))


def _messages(row: dict) -> list[dict]:
    """The conversation of a row that has its parts as columns."""
    for column in ("user", "final"):
        if not row[column]:
            raise ValueError(f"{column}: expected a string that is not empty, got {row[column]!r}")
    language, developer = row.get("reasoning_language"), row.get("developer")
    instructions = "\n\n".join(filter(None, (language and f"reasoning language: {language}", developer)))
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages.append({"role": "user", "content": row["user"]})
    return [*messages, {"role": "assistant", "thinking": row.get("analysis"), "content": row["final"]}]


def _settings(row: dict) -> dict:
    """What a row says about its own rendering; empty cells and nulls say nothing."""
    extra = row.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict) or not set(extra) <= {"reasoning_effort"}:
        raise ValueError(f"chat_template_kwargs: expected reasoning_effort and nothing else, got {extra}")
    settings = extra | {key: row[key] for key in ("reasoning_effort", "tools") if row.get(key)}
    return {key: value for key, value in settings.items() if value}


def _document(encoded: harmony.Encoded) -> Document:
    weights = np.array(encoded.weights, dtype=np.float32)
    weights[0] = 0  # nothing predicts it
    channels = np.array([CHANNELS.index(channel) for channel in encoded.channels], dtype=np.int8)
    return Document(np.array(encoded.input_ids, dtype=np.int32), weights, channels)


# ---------------------------------------------------------------------------------------------------------- reading


def _load_split(data: DataArguments, name: str, progress: bool) -> Split:
    path = find(data.dataset_name)
    if path is None and not _looks_like_hub(data.dataset_name):
        raise SetupError(f"dataset_name: there is no file or folder {data.dataset_name}")
    if path is None:
        return _from_hub(data, name)
    if path.is_dir():
        folder = path
        path = next((p for p in (folder / f"{name}.jsonl", folder / f"{name}.csv") if p.is_file()), None)
        if path is None:
            present = sorted(p.name for p in folder.iterdir() if p.suffix in (".jsonl", ".csv")) or "no such file"
            raise SetupError(f"dataset_name: {folder / name}.jsonl (or .csv) is missing; {folder} holds {present}")
    elif name != data.dataset_train_split:
        raise SetupError(
            f"dataset_name: {data.dataset_name} is one file, and the held-out rows must come from somewhere: set "
            f"test_split_size, name a folder with {name}.jsonl, or set eval_strategy to 'no'"
        )
    return read(path, name, bad_rows=data.bad_rows, progress=progress)


def _from_hub(data: DataArguments, name: str) -> Split:
    try:
        dataset = load_dataset(data.dataset_name, data.dataset_config, split=name)
    except Exception as error:  # not found, no network, no such split, a broken file: no common base class
        reason = " ".join(str(error).split())[:300]
        raise SetupError(f"dataset_name: cannot load split {name!r} of {data.dataset_name}: {reason}") from error
    kind = next((kind for kind in KINDS if set(kind) <= set(dataset.column_names)), None)
    if kind is None:
        raise SetupError(f"dataset_name: expected {_kinds()}, {data.dataset_name} has {dataset.column_names}")
    columns = [column for column in (*kind, *OPTIONAL) if column in dataset.column_names]
    rows = [_without_nulls(row) for row in dataset.select_columns(columns)]
    # A row's own columns are there even where they are null; its settings are not missed.
    rows = [dict.fromkeys(kind) | row for row in rows]
    return Split(name, rows, [f"{data.dataset_name}, {name}[{number}]" for number in range(len(rows))])


def _without_nulls(value):
    """A value without the nulls that a table puts where another row has a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read(path: Path, name: str = "train", *, bad_rows: str = "error", progress: bool = False) -> Split:
    """The rows of a .jsonl or .csv file, all of one kind, without columns that training does not use.

    A cell of a .csv file in the column messages, tools or chat_template_kwargs is JSON.

    Args:
        path: of the file, in UTF-8.
        name: of the split.
        bad_rows: "error" or "skip".
        progress: whether to show how far it is.

    Raises:
        SetupError: the file cannot be read or holds no rows; a line is no row, with file and line.
    """
    split, kind = Split(name), None
    try:
        with open(path, "rb") as file:
            lines = _lines(file, path, progress)
            rows = _csv_rows(lines) if path.suffix == ".csv" else _json_rows(lines)
            for number, row in rows:
                place = f"{path}, line {number}"
                if isinstance(row, Exception):
                    split.bad(place, row, bad_rows)
                    continue
                found = next((kind for kind in KINDS if set(kind) <= set(row)), None)
                if found is None or found != (kind or found):
                    expected = _kinds() if found is None else f"{' and '.join(kind)} as above"
                    split.bad(place, ValueError(f"expected {expected}, got {list(row)}"), bad_rows)
                    continue
                kind = found
                split.rows.append({column: row[column] for column in (*kind, *OPTIONAL) if column in row})
                split.places.append(place)
    except OSError as error:
        raise SetupError(f"dataset_name: cannot read {path}: {error}") from error
    if not split.rows:
        skipped = f" but bad ones, the first of them {split.skipped[0]}" if split.skipped else ""
        raise SetupError(f"dataset_name: {path} holds no rows{skipped}")
    return split


def _lines(file: BinaryIO, path: Path, progress: bool) -> Iterator[bytes]:
    """The file's lines, without a byte-order mark."""
    size = path.stat().st_size
    with tqdm(
        desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, leave=False, disable=not progress
    ) as bar:
        for number, line in enumerate(file):
            bar.update(len(line))
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _json_rows(lines: Iterator[bytes]) -> Iterator[tuple[int, dict | Exception]]:
    """(line, row or what is wrong with it) of every line that is not blank."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                row = ValueError(f"expected a JSON object, got {type(row).__name__}")
        except (ValueError, RecursionError) as error:  # of the decoding too
            row = ValueError(f"expected a JSON object in UTF-8: {error}")
        yield number, row


def _csv_rows(lines: Iterator[bytes]) -> Iterator[tuple[int, dict | Exception]]:
    """(line where it begins, row or what is wrong with it) of every record after the header."""
    csv.field_size_limit(2**31 - 1)  # else 128 kB a cell
    # Bytes that are no UTF-8 become surrogates, which are found below: the reader needs whole records first.
    reader = csv.DictReader((line.decode("utf-8", "surrogateescape") for line in lines), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, ValueError(f"expected comma-separated values: {error}")
            continue
        cells = [cell for cell in (*row.values(), *row.pop(None, ())) if isinstance(cell, str)]
        number = reader.line_num - sum(cell.count("\n") for cell in cells)
        try:
            if len(cells) != len(reader.fieldnames):
                raise ValueError(f"expected {len(reader.fieldnames)} cells, got {len(cells)}")
            yield number, {column: _cell(column, text) for column, text in row.items()}
        except ValueError as error:
            yield number, error


def _cell(column: str, text: str):
    """What a cell of a .csv file holds."""
    _check_text(column, text)
    if column not in ("messages", "tools", "chat_template_kwargs"):
        return text
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{column}: expected JSON, got {text[:80]!r} ({error})") from None


def _check_text(column: str, text) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{column}: expected a string, got {json.dumps(text)[:80]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{column}: expected valid UTF-8, got something else at character {error.start}") from None


def _kinds() -> str:
    return "`messages`, or `prompt` and `completion`, or `user` and `final`, or `text`"


def _looks_like_hub(name: str) -> bool:
    parts = name.split("/")
    local = Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt") or name.startswith((".", "/", "~"))
    return not local and len(parts) <= 2 and not (len(parts) == 2 and find(parts[0]))


def main(argv: list[str]) -> None:
    """`show`, the one command here, with what follows it."""
    if argv[:1] != ["show"]:
        sys.exit("expected python -m gptoss_kernels.finetune.data show --config FILE [--rows N] [--html FILE]")
    from .show import main as show

    show(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
