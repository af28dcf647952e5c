"""Packed documents stay apart, padding is honoured, and values of masks and positions are read once a forward.

The truth is always eager attention on each document alone and unpadded: eager itself leaks when documents are packed.
"""

import functools
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss

from .conftest import assert_close, assert_gradients_close, logits, loss_and_gradients, through

LENGTHS = (41, 1, 70, 16)  # the window is 32: documents shorter, longer and of one token


def _positions(lengths=LENGTHS, start=0):
    return torch.cat([torch.arange(n) + start for n in lengths])[None]


def _bounds(lengths=LENGTHS, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.fixture
def packed(tokens):
    """(input_ids, labels) of one packed row."""
    return tokens(1, sum(LENGTHS)), tokens(1, sum(LENGTHS))


@pytest.fixture
def alone(model, packed):
    """(logits, gradients) of the documents through eager attention, one at a time."""
    ids, labels = packed
    model.zero_grad()
    outs = []
    for part, target in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        outs.append(model(part, use_cache=False).logits)
        loss = torch.nn.functional.cross_entropy(outs[-1][0], target[0], reduction="sum")
        (loss / sum(LENGTHS)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return torch.cat(outs, dim=1).detach(), gradients


PACKINGS = {
    "position_ids": lambda: {"position_ids": _positions()},
    "position_ids and a mask of ones": lambda: {
        "position_ids": _positions(),
        "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long),
    },
    "positions with an offset": lambda: {"position_ids": _positions(start=7)},
    "cu_seq_lens": lambda: {"position_ids": _positions(), "cu_seq_lens_q": _bounds(), "cu_seq_lens_k": _bounds()},
    "cu_seq_lens of int64 and a mask of ones": lambda: {
        "position_ids": _positions(),
        "cu_seq_lens_q": _bounds(dtype=torch.int64),
        "cu_seq_lens_k": _bounds(dtype=torch.int64),
        "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.bool),
    },
    "cu_seq_lens and positions that run through": lambda: {"cu_seq_lens_q": _bounds(), "cu_seq_lens_k": _bounds()},
    "a cache that is still empty": lambda: {"position_ids": _positions(), "use_cache": True},
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_equals_alone(model, packed, alone, route, packing):
    with through(route, model):
        got = logits(model, packed[0], **PACKINGS[packing]())
    assert_close(got, alone[0], 1e-5)


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens"])
def test_gradients_of_packed_equal_alone(model, packed, alone, route, packing):
    with through(route, model):
        _, found = loss_and_gradients(model, *packed, **PACKINGS[packing]())
    assert_gradients_close(found, alone[1])


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens"])
def test_without_cu_seqlens_documents_leak(monkeypatch, model, packed, alone, route, packing):
    """The control of the tests above: they would fail, by far, if cu_seqlens were lost on the way."""
    attend, seen = integration.flash_attention, []

    def forgetful(*args, cu_seqlens, **kwargs):
        seen.append(cu_seqlens.tolist())
        return attend(*args, **kwargs)

    monkeypatch.setattr(integration, "flash_attention", forgetful)
    with through(route, model):
        got = logits(model, packed[0], **PACKINGS[packing]())
    assert seen == [_bounds().tolist()] * model.config.num_hidden_layers
    first = LENGTHS[0]
    assert_close(got[:, :first], alone[0][:, :first], 1e-5)
    assert (got[:, first:] - alone[0][:, first:]).abs().max() > 0.1


def test_packed_equals_alone_through_the_kernels(kernels, tokens):
    small = random_gpt_oss(seed=3, num_hidden_layers=2, sliding_window=8)
    lengths = (13, 1, 20)
    ids = tokens(1, sum(lengths))
    want = torch.cat([logits(small, part) for part in ids.split(lengths, 1)], dim=1)
    with through("registered", small):
        got = logits(small, ids, position_ids=_positions(lengths))
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("start", [0, 5])
def test_shifted_positions_are_no_packing(model, tokens, route, start):
    ids = tokens(2, 60)
    position_ids = torch.arange(60).expand(2, -1) + torch.tensor([[start], [0]])
    want = logits(model, ids, position_ids=position_ids)
    with through(route, model):
        got = logits(model, ids, position_ids=position_ids)
    assert_close(got, want, 1e-5)


# ----------------------------------------------------------------------------------------------------------- padding


def _padded(tokens, side, mask_dtype=torch.long):
    """(rows, input_ids, mask): rows of 100, 37 and 60 tokens, and the same padded to 100."""
    rows = [tokens(1, n) for n in (100, 37, 60)]
    ids, mask = torch.zeros(3, 100, dtype=torch.long), torch.zeros(3, 100, dtype=mask_dtype)
    for i, row in enumerate(rows):
        where = slice(100 - row.shape[1], 100) if side == "left" else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return rows, ids, mask


@pytest.mark.parametrize("positions", ["default", "of generate", "zero in padding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(model, tokens, route, side, positions):
    rows, ids, mask = _padded(tokens, side)
    position_ids = None
    if positions != "default":  # these restart where padding ends, which is no packing: the mask decides
        position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1 if positions == "of generate" else 0)
    with through(route, model):
        got = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    for i, row in enumerate(rows):
        assert_close(got[i, mask[i].bool()], logits(model, row)[0], 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_equal_unpadded(model, tokens, maskless, side):
    rows, ids, mask = _padded(tokens, side, torch.bool)
    labels = tokens(3, 100)
    real = sum(row.shape[1] for row in rows)
    model.zero_grad()
    for i, row in enumerate(rows):
        out = model(row, use_cache=False).logits[0]
        (torch.nn.functional.cross_entropy(out, labels[i, mask[i]], reduction="sum") / real).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with through(maskless, model):
        _, found = loss_and_gradients(model, ids, labels.masked_fill(~mask, -100), attention_mask=mask)
    assert_gradients_close(found, gradients)


def test_without_the_mask_padding_is_seen(model, tokens, route):
    """The control of the tests above."""
    rows, ids, mask = _padded(tokens, "left")
    with through(route, model):
        got = logits(model, ids)
    assert (got[1, mask[1].bool()] - logits(model, rows[1])[0]).abs().max() > 0.1


def test_padded_equals_unpadded_through_the_kernels(kernels, tokens):
    small = random_gpt_oss(seed=3, num_hidden_layers=2, sliding_window=8)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    want = logits(small, ids[:1, 11:])
    with through("registered", small):
        got = logits(small, ids, attention_mask=mask)
    assert_close(got[:1, 11:], want, 1e-5)


def test_a_hole_in_the_mask(model, tokens, route):
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, 20:33] = 0
    counted = mask.cumsum(1) - 1
    want = [logits(model, ids, attention_mask=mask, position_ids=p)[mask.bool()] for p in (None, counted)]
    with through(route, model):
        got = [logits(model, ids, attention_mask=mask, position_ids=p)[mask.bool()] for p in (None, counted)]
    assert (want[0] - want[1]).abs().max() > 1e-2
    assert_close(got[0], want[0], 1e-5)
    assert_close(got[1], want[1], 1e-5)


# --------------------------------------------------------------------------------------- one reading a forward


class _Reads(TorchDispatchMode):
    """Counts the operators that bring a value to the host, or go over a dense mask."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,  # what it is in inference mode
            torch.ops.aten.item.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.any.dim,  # over a dense mask
        )
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """[(layer, values read), ...] of every attention call, the mask's reading included."""
    found = []

    def watch(name):
        original = getattr(integration, name)

        @functools.wraps(original)
        def counted(module, *args, **kwargs):
            with _Reads() as mode:
                result = original(module, *args, **kwargs)
            if mode.count:
                found.append((module.layer_idx, name))
            return result

        monkeypatch.setattr(integration, name, counted)

    watch("_visibility")
    watch("_read_dense_mask")
    return found


def _readings(reads, run):
    reads.clear()
    run()
    return list(reads)


READINGS = {
    "nothing given": ({}, [0]),
    "position_ids": ({"position_ids": _positions()}, [0]),
    "cu_seq_lens": (PACKINGS["cu_seq_lens"](), [0]),
    # A mask for each of the two layer kinds; positions once, with the first of them.
    "mask of ones": ({"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)}, [0, 1]),
    "padding": ({"attention_mask": (torch.arange(sum(LENGTHS)) > 8).long()[None]}, [0, 1]),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("given", READINGS)
def test_values_are_read_once_a_forward_not_once_a_layer(reads, model, packed, maskless, given, inference):
    inputs, layers = READINGS[given]
    with through(maskless, model), torch.inference_mode(inference):
        inputs = {name: x.clone() for name, x in inputs.items()}  # inference tensors, which have no version
        found = _readings(reads, lambda: model(packed[0], use_cache=False, **inputs))
    assert [layer for layer, _ in found] == layers


def test_dense_masks_are_read_once_a_forward(reads, model, packed):
    with through("assigned", model):
        logits(model, packed[0])
    # Each dense mask at the first layer of its kind, the positions at the first layer.
    assert reads == [(0, "_read_dense_mask"), (0, "_visibility"), (1, "_read_dense_mask")]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens"])
def test_recomputing_a_layer_reads_nothing_again(reads, packed, alone, maskless, packing, use_reentrant):
    model = random_gpt_oss(seed=1)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with through(maskless, model):
        got, found = loss_and_gradients(model, *packed, **PACKINGS[packing]())
    assert [layer for layer, _ in reads] == [0]
    assert_close(got, alone[0], 1e-5)
    assert_gradients_close(found, alone[1])


def test_decoding_reads_nothing(reads, model, tokens, maskless):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with through(maskless, model):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        longer = torch.cat([mask, mask[:, -1:]], dim=1)
        found = _readings(reads, lambda: model(ids[:, :1], attention_mask=longer, past_key_values=cache))
    assert found == []


@pytest.mark.parametrize("inference", [False, True])
def test_values_changed_in_place_are_read_again(model, packed, maskless, inference):
    """The answer is kept beside the tensor, but not beyond a change of its values."""
    ids = packed[0]
    with through(maskless, model), torch.inference_mode(inference):
        position_ids, mask = _positions().clone(), torch.ones_like(ids)
        first = model(ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
        position_ids.copy_(torch.arange(ids.shape[1]))
        second = model(ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
        mask[:, :20] = 0
        third = model(ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
    want = torch.cat([logits(model, part) for part in ids.split(LENGTHS, 1)], dim=1)
    assert_close(first, want, 1e-5)
    assert_close(second, logits(model, ids), 1e-5)
    assert_close(third[:, 20:], logits(model, ids, attention_mask=mask)[:, 20:], 1e-5)


def test_a_batch_can_be_saved_after_it_was_used(model, packed, route):
    batch = {"position_ids": _positions(), "attention_mask": torch.ones(1, sum(LENGTHS))}
    with through(route, model):
        logits(model, packed[0], **batch)
    torch.save(batch, io.BytesIO())


# ------------------------------------------------------------------------------------------------- a memory bound


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("given", ["nothing", "padding", "position_ids"])
def test_no_matrix_of_length_by_length_is_built(monkeypatch, maskless, tokens, given):
    """Everything around flash_attention, the masks included, at a length whose square would stand out."""
    length = 4000
    small = random_gpt_oss(num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=64)
    monkeypatch.setattr(integration, "flash_attention", lambda q, k, v, *args, **kwargs: q)
    inputs = {
        "nothing": {},
        "padding": {"attention_mask": (torch.arange(length) > 8).long()[None]},
        "position_ids": {"position_ids": _positions((1500, 2500))},
    }[given]
    with through(maskless, small), _LargestTensor() as largest:
        logits(small, tokens(1, length) % 64, **inputs)
    assert largest.numel <= length * 64  # the logits
    with _LargestTensor() as largest:
        logits(small, tokens(1, 400) % 64)
    assert largest.numel >= 400 * 400  # eager's mask does stand out
