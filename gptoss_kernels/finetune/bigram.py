"""The bigram model that a trained model has to beat."""

import numpy as np
from datasets import Dataset


def bigram_entropy(train: Dataset, test: Dataset) -> float:
    """Held-out cross-entropy of a bigram model in nats a token: what is left to explain once the last token is known.

    The model is fit on the train rows with Witten-Bell smoothing: p(b|a) = (n(ab) + t(a) p(b)) / (n(a) + t(a)), where
    t(a) is the number of distinct tokens seen after a, and p(b) the token's frequency, with one added to each count.
    Tokens are weighted as the held-out loss weighs them; no step leads from one document to the next.

    Args:
        train, test: from `packing.build`: input_ids, loss_weights and seq_lengths.
    """
    a, b, _ = _transitions(train)
    x, y, weights = _transitions(test)
    size = int(max(a.max(), b.max(), x.max(), y.max())) + 1
    unigram = np.bincount(b, minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(a * size + b, return_counts=True)
    followed = np.bincount(a, minlength=size)
    kinds = np.bincount(pairs // size, minlength=size)

    wanted = x * size + y
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    total = followed[x] + kinds[x]
    known = (seen + kinds[x] * unigram[y]) / np.maximum(total, 1)
    return float(-np.average(np.log(np.where(total > 0, known, unigram[y])), weights=weights))


def _transitions(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every step from a token to the next within a document, and its weight in the loss."""
    before, after, weights = [], [], []
    for row in dataset:
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        inside = np.ones(len(ids), dtype=bool)
        inside[np.cumsum([0, *row["seq_lengths"][:-1]])] = False
        at = np.flatnonzero(inside)
        before.append(ids[at - 1])
        after.append(ids[at])
        weights.append(np.asarray(row["loss_weights"], dtype=np.float64)[at])
    return np.concatenate(before), np.concatenate(after), np.concatenate(weights)
