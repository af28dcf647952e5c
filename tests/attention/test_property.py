"""Attention on 200 drawn calls: lengths, windows, packings, strides, dtypes, odd sinks, infinities, no keys."""

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from gptoss_kernels import flash_attention, fuzz
from gptoss_kernels.fuzz import GPU_SHAPES, INTERPRETER_SHAPES, AttentionCall, check_attention, draw_attention
from gptoss_kernels.testing import AttentionCase

GPU = torch.cuda.is_available()
DEVICE, SHAPES, LONGEST = ("cuda", GPU_SHAPES, 200) if GPU else ("cpu", INTERPRETER_SHAPES, 26)
PARTS, CALLS = 5, 40


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # numpy, of infinities
@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_calls(part):
    @seed(part)
    @settings(max_examples=CALLS, deadline=None, database=None)
    @given(st.randoms(use_true_random=False))
    def run(random):
        call = draw_attention(random, LONGEST, SHAPES)
        note(str(call))
        check_attention(call, DEVICE)

    run()


HALF = AttentionCase(q_len=33, dtype=torch.float16, q_heads=2, kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case, wrong",
    [
        (AttentionCase(q_len=33, window=9), {"sliding_window": 10}),
        (AttentionCase(q_len=33, window=9), {"sliding_window": 8}),
        (AttentionCase(q_len=33, documents=(3, 30)), {"cu_seqlens": None}),
        (AttentionCase(q_len=33, batch=2, padding="left"), {"key_padding_mask": None}),
        (AttentionCase(q_len=33), {"scale": 0.26}),
    ],
    ids=["window + 1", "window - 1", "leak", "mask ignored", "scale"],
)
def test_mistakes_are_noticed(case, wrong, dtype):
    call = AttentionCall(AttentionCase(**(vars(case) | {"dtype": dtype, "q_heads": 2, "kv_heads": 1})))
    assert 0 < check_attention(call, DEVICE) <= 1
    with pytest.raises(AssertionError, match="of AttentionCall.*: error .* allowed"):
        check_attention(call, DEVICE, **wrong)


def test_sinks_and_values_that_are_dropped_are_noticed(monkeypatch):
    call = AttentionCall(HALF)

    def without(q, k, v, sinks, **keywords):
        out, lse = flash_attention(q, k, v, **keywords)
        return out, lse + 0 * sinks.sum()

    monkeypatch.setattr(fuzz, "flash_attention", without)
    with pytest.raises(AssertionError, match="out of AttentionCall"):
        check_attention(call, DEVICE)
    monkeypatch.setattr(
        fuzz, "flash_attention", lambda q, k, v, *s, **keys: flash_attention(q, k, v.detach(), *s, **keys)
    )
    with pytest.raises(RuntimeError, match="unused"):
        check_attention(call, DEVICE)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_scores_stand_where_the_definition_has_them(value, monkeypatch):
    call = AttentionCall(HALF, infinity=value)
    check_attention(call, DEVICE)

    def finite(*args, **keywords):
        return tuple(x.nan_to_num(0, 0, 0) + 1 for x in flash_attention(*args, **keywords))

    monkeypatch.setattr(fuzz, "flash_attention", finite)
    with pytest.raises(AssertionError):
        check_attention(call, DEVICE)
