"""The experts on 300 drawn calls: sizes, routings with skipped slots, strides, dtypes, with and without the clamp."""

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from gptoss_kernels.fuzz import ExpertsCall, check_experts, draw_experts
from gptoss_kernels.testing import ExpertsCase

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
PARTS, CALLS = 5, 60


@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_calls(part):
    @seed(part)
    @settings(max_examples=CALLS, deadline=None, database=None)
    @given(st.randoms(use_true_random=False))
    def run(random):
        call = draw_experts(random, 300 if GPU else 10, DTYPES)
        note(str(call))
        check_experts(call, DEVICE)

    run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong, limit", [({"alpha": 1.0}, 1000.0), ({"limit": 6.0}, 7.0)], ids=str)
def test_mistakes_are_noticed(wrong, limit, dtype):
    call = ExpertsCall(ExpertsCase(tokens=9, hidden=32, intermediate=32, dtype=dtype, size=6.0), limit=limit)
    assert 0 < check_experts(call, DEVICE) <= 1
    with pytest.raises(AssertionError, match="of ExpertsCall.*: error .* allowed"):
        check_experts(call, DEVICE, **wrong)
