"""Chapter 04's checkers: known mistakes get the message that names them, other ways to be right are accepted."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gptoss_kernels.course import check  # noqa: E402
from gptoss_kernels.course.solutions.chapter_04 import check_online_update  # noqa: E402


def attempt(function, name):
    function.__name__ = name
    return check.attempt(function, chapter=4, strict=True)


def refused(function, name, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(function, name)


# -------------------------------------------------------------------------------------------------- online_update
# Functions of their own, since a checker calls its exercise with the state and a tile alone.


@triton.jit
def _neither(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    return tl.dot(p, v_tile, acc, input_precision="ieee"), new_max, running_sum + tl.sum(p, 1)


@triton.jit
def _acc_kept(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(p, 1)
    return tl.dot(p, v_tile, acc, input_precision="ieee"), new_max, running_sum


@triton.jit
def _sum_kept(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    acc = acc * tl.exp2(running_max - new_max)[:, None]
    return tl.dot(p, v_tile, acc, input_precision="ieee"), new_max, running_sum + tl.sum(p, 1)


@triton.jit
def _base_e(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp(scores - new_max[:, None])
    rescale = tl.exp(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _upside_down(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(new_max - running_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _of_the_tile(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.max(scores, 1)
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _old_maximum(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - running_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _not_returned(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, running_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _divided(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc / running_sum[:, None], new_max, running_sum


@triton.jit
def _not_added(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    return tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee"), new_max, running_sum * rescale


@triton.jit
def _swapped(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, running_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def _nothing(acc, running_max, running_sum, scores, v_tile):
    return acc, running_max, running_sum


@triton.jit
def _p_in_base_e(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _rescale_in_base_e(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp(running_max - new_max)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _columns(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale, input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _tf32(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _not_cast(acc, running_max, running_sum, scores, v_tile):
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _v_cast(acc, running_max, running_sum, scores, v_tile):
    """Right: the other factor is cast."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    acc = tl.dot(p, v_tile.to(tl.float32), acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def _otherwise(acc, running_max, running_sum, scores, v_tile):
    """Right: the product first, in another order and without an accumulator."""
    new_max = tl.max(tl.join(running_max, tl.max(scores, 1)), 1)
    rescale = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    update = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    return update + rescale[:, None] * acc, new_max, tl.sum(p, axis=1) + rescale * running_sum


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_neither, "neither acc nor running_sum is rescaled"),
        (_acc_kept, "^acc is not rescaled"),
        (_sum_kept, "^running_sum is not rescaled"),
        (_base_e, "use tl.exp2"),
        (_upside_down, "upside down"),
        (_of_the_tile, "the maximum is the tile's alone"),
        (_old_maximum, "relative to the old maximum: it has to be the new one"),
        (_not_returned, "the new maximum is not returned"),
        (_divided, "divide once, after the last tile"),
        (_not_added, "weights are not added"),
        (_swapped, "in the order acc, running_max, running_sum"),
        (_p_in_base_e, "p is in base e"),
        (_rescale_in_base_e, "rescale is in base e"),
        (_columns, "rescale multiplies acc's columns"),
        (_tf32, "11 significant bits"),
        (_not_cast, r"p.to\(v_tile.dtype\)"),
        (_nothing, r"running_max: expected .* at \[\d+\], got"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # some of the mistakes are NaN
def test_online_update_names_the_mistake(wrong, message):
    with pytest.raises(check.Mistake, match=message):
        check_online_update(wrong)


@pytest.mark.parametrize("right", [_otherwise, _v_cast])
def test_online_update_otherwise_is_right(right):
    check_online_update(right)


def test_online_update_without_jit():
    refused(lambda *state: state[0] * 2, "online_update", "put @triton.jit above")


# ------------------------------------------------------------------------------------------------------ key_range


def ranges(begin=None, end=None):
    """An attempt with one of its bounds replaced: functions of (start, last, block_n, q_len, kv_len, window)."""

    def key_range(start_m, block_m, block_n, q_len, kv_len, window):
        start = start_m + kv_len - q_len
        arguments = (start, start + block_m - 1, block_n, q_len, kv_len, window)
        right = max(start - window + 1, 0) // block_n * block_n, min(start + block_m, kv_len)
        return begin(*arguments) if begin else right[0], end(*arguments) if end else right[1]

    return key_range


def down(key, block_n):
    return max(key, 0) // block_n * block_n


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ranges(begin=lambda s, last, n, q, kv, w: down(last - w + 1, n)), "begin is the last query's"),
        (ranges(begin=lambda s, last, n, q, kv, w: down(min(last, kv - 1) - w + 1, n)), "begin is the last query's"),
        (ranges(begin=lambda s, last, n, q, kv, w: -(-max(s - w + 1, 0) // n) * n), "begin is rounded up"),
        (ranges(begin=lambda s, last, n, q, kv, w: 0), "begin is 0"),
        (ranges(begin=lambda s, last, n, q, kv, w: down(s - w, n)), "a tile too many"),
        (ranges(begin=lambda s, last, n, q, kv, w: (s - w + 1) // n * n), "there is no key before key 0"),
        (ranges(begin=lambda s, last, n, q, kv, w: max(s - w + 1, 0)), "multiple of block_n: round down"),
        (ranges(end=lambda s, last, n, q, kv, w: s + 1), "end is the first query's"),
        (ranges(end=lambda s, last, n, q, kv, w: last + 1), "end passes the last key"),
        (ranges(end=lambda s, last, n, q, kv, w: kv), "end is kv_len"),
        (ranges(end=lambda s, last, n, q, kv, w: min(last, kv - 1)), "end stops one key early"),
        (ranges(end=lambda s, last, n, q, kv, w: 0), "query 0 sees key 0, which the loop never reaches"),
        (ranges(end=lambda s, last, n, q, kv, w: kv + 999), "visits a tile in which no query"),
        (
            lambda m, block_m, n, q, kv, w: (down(m - w + 1, n), min(m + block_m, kv)),
            "query i does not stand at key i",
        ),
        (lambda *arguments: 3, r"expected \(begin, end\)"),
        (lambda *arguments: (0, "all"), "expected two whole numbers"),
        (lambda *arguments: (0.5, 4), "expected two whole numbers"),
    ],
)
def test_key_range_names_the_mistake(wrong, message):
    refused(wrong, "key_range", message)


@pytest.mark.parametrize(
    "right",
    [
        ranges(),
        ranges(end=lambda s, last, n, q, kv, w: torch.tensor(min(last + 1, kv))),
        ranges(
            end=lambda s, last, n, q, kv, w: -(-min(last + 1, kv) // n) * n
        ),  # rounded up to the tile: the same loop
        lambda m, block_m, n, q, kv, w: [down(m + kv - q - w + 1, n), min(m + block_m, q) + kv - q],
    ],
)
def test_key_range_written_otherwise_is_right(right):
    assert attempt(right, "key_range") is right


# ------------------------------------------------------------------------------------------------ tiles_in_window


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, n, w: math.ceil(w / n), "that is what one query needs"),
        (lambda m, n, w: m + w - 1, "these are keys, not tiles"),
        (lambda m, n, w: m // n + math.ceil(w / n), "the query's own key is one of the window's"),
        (lambda m, n, w: m // n + (w - 1) // n, "round up"),
        (lambda m, n, w: math.ceil((w - 1) / n), "that is the part before the tile"),
        (lambda m, n, w: 1 + math.ceil((w - 1) / n), "not one"),
        (lambda m, n, w: (m + w - 1) / n, "tiles are whole"),
        (lambda m, n, w: 4, r"expected 1 for tiles_in_window\(64, 64, 1\), got 4"),
        (lambda m, n, w: "four", "expected a number"),
    ],
)
def test_tiles_in_window_names_the_mistake(wrong, message):
    refused(wrong, "tiles_in_window", message)


@pytest.mark.parametrize(
    "right",
    [
        lambda m, n, w: m / n + math.ceil((w - 1) / n),
        lambda m, n, w: (m + w + n - 2) // n,
        lambda m, n, w: len(range((8 * m - w + 1) // n * n, 9 * m, n)),
    ],
)
def test_tiles_in_window_written_otherwise_is_right(right):
    assert attempt(right, "tiles_in_window") is right


# ------------------------------------------------------------------------------------------------ document_starts


def by_search(cu_seqlens, tokens, right=True):
    token = torch.arange(tokens)
    return (torch.searchsorted(cu_seqlens.long(), token, right=right) - 1).clamp_min(0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (by_search, "the number of the document"),
        (lambda cu, n: cu[1:].repeat_interleave(cu.diff()), "where the document ends"),
        (lambda cu, n: cu[by_search(cu, n, right=False)], "a token at a boundary begins the next document"),
        (lambda cu, n: torch.arange(n) - cu[by_search(cu, n)], "place in its document"),
        (lambda cu, n: cu.diff().repeat_interleave(cu.diff()), "how long the document is"),
        (lambda cu, n: cu[:-1], r"expected shape \(3,\)"),
        (lambda cu, n: cu[by_search(cu, n)].float(), "expected whole numbers"),
        (lambda cu, n: [0] * n, "expected a tensor"),
        (lambda cu, n: torch.full((n,), 7), r"expected \[0, 0, 2\] for cu_seqlens \[0, 2, 3\]"),
    ],
)
def test_document_starts_names_the_mistake(wrong, message):
    refused(wrong, "document_starts", message)


def by_maximum(cu_seqlens, tokens):
    starts = torch.zeros(tokens, dtype=torch.int64)
    starts[cu_seqlens[:-1].long()] = cu_seqlens[:-1].long()
    return starts.cummax(0).values


@pytest.mark.parametrize("right", [by_maximum, lambda cu, n: cu[by_search(cu, n)]])
def test_document_starts_written_otherwise_is_right(right):
    assert attempt(right, "document_starts") is right
