"""From token lists to rows and batches: best-fit packing, truncation that is counted, and the collator.

Documents of a packed row do not see each other: positions restart with each, and `cu_seq_lens` tells attention where.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

CHANNELS = ("", "analysis", "commentary", "final")  # what the numbers in the column `channels` mean


class Document(NamedTuple):
    """What one example trains on; arrays of one length."""

    input_ids: np.ndarray  # (tokens,) int32
    loss_weights: np.ndarray  # (tokens,) fp32, >= 0; 0 for the first token, which nothing predicts
    channels: np.ndarray  # (tokens,) int8, index in CHANNELS


@dataclass
class Report:
    """What became of a split: counts of conversations, examples (documents), tokens and rows."""

    split: str
    conversations: int = 0
    skipped: list[str] = field(default_factory=list)  # bad rows: where, and what is wrong
    examples: int = 0  # trained on
    untrained: int = 0  # examples left out, because no token of theirs has a weight
    cut_away: int = 0  # examples left out, because every token with a weight is beyond max_length
    truncated: int = 0  # examples kept that lost their end
    tokens: int = 0  # trained on or seen as context
    trained_tokens: int = 0  # with a weight above 0
    tokens_cut: int = 0  # lost beyond max_length, those of cut_away examples included
    lengths: list[int] = field(default_factory=list)  # tokens of each example before anything was cut
    rows: int = 0
    max_length: int | None = None
    packed: bool = False

    @property
    def fill(self) -> float | None:
        """Share of the packed rows that holds tokens, 0 to 1; None without packing."""
        return self.tokens / (self.rows * self.max_length) if self.packed else None

    def __str__(self) -> str:
        trained = f"{self.trained_tokens:,} trained ({self.trained_tokens / max(self.tokens, 1):.0%})"
        lines = [
            f"{self.split}: {self.conversations:,} conversations, {self.examples:,} examples, "
            f"{self.tokens:,} tokens, {trained}"
        ]
        if self.packed:
            lines.append(f"packed into {self.rows:,} rows of {self.max_length:,} tokens, {self.fill:.1%} full")
        if self.truncated or self.cut_away:
            share = self.tokens_cut / sum(self.lengths)
            lines.append(
                f"longer than max_length: {self.truncated + self.cut_away:,} examples lost their end, "
                f"{self.tokens_cut:,} tokens ({share:.1%}); {self.cut_away:,} of them lost every token with a weight "
                "and are left out"
            )
        if self.untrained:
            lines.append(f"left out: {self.untrained:,} examples without a token that has a weight")
        if self.skipped:
            lines.append(f"skipped: {len(self.skipped):,} bad rows, the first of them {self.skipped[0]}")
        return "\n  ".join(lines)


def truncate(documents: Sequence[Document], max_length: int | None, report: Report) -> list[Document]:
    """The documents' first max_length tokens, without documents in which no token is trained; counted in the report.

    Args:
        documents: of any length.
        max_length: tokens; None cuts nothing.
        report: examples, untrained, cut_away, truncated, tokens, trained_tokens, tokens_cut and lengths are set.
    """
    kept = []
    report.max_length = max_length
    for document in documents:
        length = len(document.input_ids)
        report.lengths.append(length)
        short = Document(*(column[:max_length] for column in document))
        beyond = length - len(short.input_ids)
        report.tokens_cut += beyond
        trained = int(np.count_nonzero(short.loss_weights))
        if not trained:
            lost = beyond and document.loss_weights.any()
            report.cut_away += bool(lost)
            report.untrained += not lost
            continue
        report.truncated += beyond > 0
        report.tokens += len(short.input_ids)
        report.trained_tokens += trained
        kept.append(short)
    report.examples = len(kept)
    return kept


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents go together: best fit, the longest first, the same for the same lengths.

    Args:
        lengths: tokens of each document, 1 to capacity.
        capacity: tokens of a row.

    Returns:
        Each row's documents, as indices into lengths; every document once.

    Raises:
        ValueError: a document does not fit into a row, or is empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths: expected 1 to {capacity}, got {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # sizes of the gaps that rows have, each once, ascending
    having: dict[int, list[int]] = {}  # rows by the size of their gap
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = having[space].pop()
            if not having[space]:
                del having[space], spaces[at]
        rows[row].append(document)
        left = space - length
        if left:
            if left not in having:
                having[left] = []
                insort(spaces, left)
            having[left].append(row)
    return rows


def build(documents: Sequence[Document], packing: bool, report: Report) -> Dataset:
    """The data set that the trainer gets.

    Args:
        documents: from `truncate`, each with at least one token.
        packing: whether documents share rows of report.max_length tokens; otherwise a row is a document.
        report: rows and packed are set.

    Returns:
        A row: input_ids (tokens,) int32, loss_weights (tokens,) fp32, channels (tokens,) int8, and seq_lengths
        (documents,) int32, all as numpy arrays.
    """
    lengths = [len(document.input_ids) for document in documents]
    rows = pack(lengths, report.max_length) if packing else [[i] for i in range(len(documents))]
    report.rows, report.packed = len(rows), packing
    order = [i for row in rows for i in row]
    counts = [len(row) for row in rows]
    sizes = [sum(lengths[i] for i in row) for row in rows]
    columns = {
        name: _lists(np.concatenate([getattr(documents[i], name) for i in order]), sizes) for name in Document._fields
    }
    columns["seq_lengths"] = _lists(np.array([lengths[i] for i in order], dtype=np.int32), counts)
    return Dataset(pa.table(columns)).with_format("numpy")


def _lists(values: np.ndarray, sizes: Sequence[int]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


@dataclass(frozen=True)
class Collator:
    """Rows of `build` to a batch: joined into one row, or padded on the right.

    Args:
        pad_token_id: fills short rows.
        join: one row of all documents, with positions and boundaries instead of padding and mask.
        pad_to_multiple_of: length of padded rows; not for joined ones.
    """

    pad_token_id: int
    join: bool
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor | int]:
        """A batch.

        Returns:
            input_ids int64, labels int64 (-100 where the weight is 0) and loss_weights fp32, (1, tokens) if joined,
            else (rows, longest). Joined: position_ids (1, tokens) int64, cu_seq_lens_q and cu_seq_lens_k
            (documents + 1,) int32, max_length_q and max_length_k in tokens. Padded: attention_mask (rows, longest)
            int64.
        """
        ids = [torch.from_numpy(np.array(row["input_ids"], dtype=np.int64)) for row in rows]
        weights = [torch.from_numpy(np.array(row["loss_weights"], dtype=np.float32)) for row in rows]
        if self.join:
            lengths = np.concatenate([row["seq_lengths"] for row in rows]).astype(np.int64)
            boundaries = np.concatenate([[0], lengths.cumsum()])
            positions = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)
            cu_seq_lens = torch.from_numpy(boundaries.astype(np.int32))
            batch = {
                "input_ids": torch.cat(ids)[None],
                "loss_weights": torch.cat(weights)[None],
                "position_ids": torch.from_numpy(positions)[None],
                "cu_seq_lens_q": cu_seq_lens,
                "cu_seq_lens_k": cu_seq_lens,
                "max_length_q": int(lengths.max()),
                "max_length_k": int(lengths.max()),
            }
        else:
            step = self.pad_to_multiple_of or 1
            longest = -(-max(map(len, ids)) // step) * step
            batch = {
                "input_ids": _pad(ids, longest, self.pad_token_id),
                "loss_weights": _pad(weights, longest, 0.0),
                "attention_mask": _pad([torch.ones_like(x) for x in ids], longest, 0),
            }
        batch["labels"] = batch["input_ids"].masked_fill(batch["loss_weights"] == 0, -100)
        return batch


def _pad(rows: Sequence[torch.Tensor], longest: int, value: float) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows])
