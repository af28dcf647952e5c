"""Packing is tight, counted and exact: a document's logits are the same packed and alone."""

import random

import numpy as np
import pytest
import torch

from gptoss_kernels.finetune.packing import CHANNELS, Collator, Document, Report, build, pack, truncate
from gptoss_kernels.testing import random_gpt_oss

PAD = 0


def document(ids, weights=None) -> Document:
    weights = np.ones(len(ids)) if weights is None else np.asarray(weights)
    return Document(
        np.asarray(ids, dtype=np.int32), weights.astype(np.float32), np.full(len(ids), CHANNELS.index("final"), np.int8)
    )


def rows_of(documents, max_length: int, packing: bool = True):
    report = Report("train")
    return build(truncate(documents, max_length, report), packing, report), report


def test_best_fit_by_hand():
    # 6 opens a row with 4 free, 5 one with 5 free; 4 goes where it fits best, and 3 and 2 fill the other.
    assert pack([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]
    assert pack([1] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pack([], 4) == []
    for lengths in ([5], [0, 1]):
        with pytest.raises(ValueError, match="lengths: expected 1 to 4"):
            pack(lengths, 4)


def best_fit_slowly(lengths, capacity):
    gaps = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, gap in enumerate(gaps) if gap >= length]
        if fitting:
            gaps[min(fitting, key=gaps.__getitem__)] -= length
        else:
            gaps.append(capacity - length)
    return sorted(gaps)


def test_every_document_once_and_the_gaps_of_best_fit():
    generator = random.Random(0)
    for _ in range(100):
        capacity = generator.randint(1, 60)
        lengths = [generator.randint(1, capacity) for _ in range(generator.randint(1, 80))]
        rows = pack(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        gaps = sorted(capacity - sum(lengths[i] for i in row) for row in rows)
        assert gaps == best_fit_slowly(lengths, capacity)
        assert rows == pack(lengths, capacity)


def test_a_hundred_thousand_documents_pack_quickly_and_tightly():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(6.5, 0.8, 100_000).astype(int), 1, 8192)
    rows = pack(lengths, 8192)  # half a second; a search over all rows would take an hour
    assert lengths.sum() / (len(rows) * 8192) > 0.99


def test_rows_hold_their_documents():
    documents = [document(range(100 * n, 100 * n + size)) for n, size in enumerate((3, 6, 2, 5, 4))]
    dataset, report = rows_of(documents, 10)
    assert [row["seq_lengths"].tolist() for row in dataset] == [[6, 4], [5, 3, 2]]
    assert dataset[0]["input_ids"].tolist() == [*range(100, 106), *range(400, 404)]
    assert (report.rows, report.tokens, report.fill) == (2, 20, 1.0)
    dataset, report = rows_of(documents, 10, packing=False)
    assert [row["seq_lengths"].tolist() for row in dataset] == [[3], [6], [2], [5], [4]] and report.fill is None


def test_truncation_is_counted_and_said():
    documents = [
        document(range(5)),  # fits
        document(range(9), [0, 0, 1, 1, 1, 1, 1, 1, 1]),  # loses 3 of its 9
        document(range(8), [0] * 6 + [1, 1]),  # loses all that is trained
        document(range(4), [0] * 4),  # never had anything
    ]
    report = Report("train", conversations=4, skipped=["a.jsonl, line 7: no"])
    kept = truncate(documents, 6, report)
    assert [len(d.input_ids) for d in kept] == [5, 6]
    assert (report.examples, report.truncated, report.cut_away, report.untrained) == (2, 1, 1, 1)
    assert (report.tokens, report.trained_tokens, report.tokens_cut) == (11, 9, 5)
    assert report.lengths == [5, 9, 8, 4]
    build(kept, True, report)
    said = str(report)
    for part in (
        "train: 4 conversations, 2 examples, 11 tokens, 9 trained (82%)",
        "packed into 2 rows of 6 tokens, 91.7% full",
        "2 examples lost their end, 5 tokens (19.2%); 1 of them lost every token with a weight and are left out",
        "left out: 1 examples without a token that has a weight",
        "skipped: 1 bad rows, the first of them a.jsonl, line 7: no",
    ):
        assert part in said
    whole = Report("train")
    assert len(truncate(documents, None, whole)) == 3 and whole.tokens_cut == whole.truncated == 0


def test_joined_batch():
    dataset, _ = rows_of([document([5, 6, 7], [0, 0.5, 1]), document([8, 9], [0, 2]), document([3] * 4)], 5)
    batch = Collator(PAD, join=True)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[3, 3, 3, 3, 5, 6, 7, 8, 9]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 0, 0.5, 1, 0, 2]]
    assert batch["labels"].tolist() == [[3, 3, 3, 3, -100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 7, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4 and "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["loss_weights"].dtype == torch.float32


def test_padded_batch():
    dataset, _ = rows_of([document([5, 6, 7], [0, 0.5, 1]), document([PAD, 9], [0, 2])], 5, packing=False)
    batch = Collator(PAD, join=False)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [PAD, 9, PAD]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["loss_weights"].tolist() == [[0, 0.5, 1], [0, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and "position_ids" not in batch
    assert Collator(PAD, join=False, pad_to_multiple_of=4)([dataset[0]])["input_ids"].tolist() == [[5, 6, 7, PAD]]


@pytest.fixture(scope="module")
def network():
    kernels = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    return random_gpt_oss(num_hidden_layers=2, seed=3, **kernels)


@pytest.fixture(scope="module")
def pool() -> list[Document]:
    """Documents of 1 to 60 tokens: shorter and longer than the window."""
    generator = np.random.default_rng(5)
    return [document(generator.integers(1, 256, size)) for size in (*range(1, 21), *range(21, 61, 3))]


@torch.no_grad()
def differences(network, pool, packings: int, unmarked: bool) -> list[float]:
    """The largest difference between a document's logits packed and alone, for each of random packings."""
    alone = [network(input_ids=torch.from_numpy(d.input_ids)[None].long(), use_cache=False).logits[0] for d in pool]
    generator, result = random.Random(1), []
    for _ in range(packings):
        drawn = generator.sample(range(len(pool)), generator.randint(2, 8))
        # A document is known again by its weights.
        documents = [document(pool[i].input_ids, np.full(len(pool[i].input_ids), i + 1.0)) for i in drawn]
        dataset, _ = rows_of(documents, generator.randint(60, 200))
        batch = Collator(PAD, join=True)([dataset[i] for i in range(len(dataset))])
        which = batch.pop("loss_weights")[0, batch["cu_seq_lens_q"][:-1].long()].long() - 1
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        del batch["labels"]
        if unmarked:
            batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        parts = network(**batch, use_cache=False).logits[0].split(lengths)
        pairs = zip(parts, which.tolist(), strict=True)
        result.append(max((part - alone[i]).abs().max().item() for part, i in pairs))
    return result


def test_packed_is_alone(network, pool):
    found = differences(network, pool, 200, unmarked=False)
    assert len(found) == 200 and max(found) <= 1e-5


def test_without_boundaries_it_would_not_be(network, pool):
    """The comparison above notices documents that see each other, in every packing."""
    assert min(differences(network, pool, 20, unmarked=True)) > 1e-2
