"""The compiled kernels inside a whole model on a GPU."""

import functools

import pytest
import torch

from gptoss_kernels import flash_attention
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss

from .conftest import assert_close, assert_gradients_close, logits, loss_and_gradients, through

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled(reference, monkeypatch):
    monkeypatch.setattr(integration, "flash_attention", functools.partial(flash_attention, backend="triton"))


@pytest.fixture(scope="module")
def gpu_model():
    return random_gpt_oss(seed=1, device="cuda")


@pytest.mark.parametrize("length", [100, 128, 192])
def test_logits_and_every_gradient(gpu_model, tokens, route, length):
    ids, labels = tokens(2, length).cuda(), tokens(2, length).cuda()
    want, gradients = loss_and_gradients(gpu_model, ids, labels)
    with through(route, gpu_model):
        got, found = loss_and_gradients(gpu_model, ids, labels)
    assert_close(got, want, 1e-4)  # eager's own fp32 products differ by as much between two GPU libraries
    assert_gradients_close(found, gradients)


def test_packed_equals_alone(gpu_model, tokens):
    lengths = (1, 40, 77, 10)
    ids = tokens(1, sum(lengths)).cuda()
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    alone = torch.cat([logits(gpu_model, part) for part in ids.split(lengths, dim=1)], dim=1)
    with through("registered", gpu_model):
        assert_close(logits(gpu_model, ids, position_ids=positions), alone, 1e-4)
        assert (logits(gpu_model, ids) - alone).abs().max() > 0.1  # without positions the documents leak


def test_greedy_generation_gives_eagers_tokens(gpu_model, tokens):
    ids = tokens(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    want = gpu_model.generate(ids, **options)
    with through("registered", gpu_model):
        assert torch.equal(gpu_model.generate(ids, **options), want)


def test_bfloat16_is_as_close_to_fp32_as_eager(gpu_model, tokens):
    ids = tokens(16, 300).cuda()  # 300 alone: medians of two right ways, on a CPU, are 0.88 to 1.17 apart
    exact = logits(gpu_model, ids)
    half = random_gpt_oss(seed=1, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for ours, theirs in zip(half.parameters(), gpu_model.parameters(), strict=True):
            ours.copy_(theirs)

    def error():
        # The median token's: where rounding changes a token's choice of experts, its error is that of another choice.
        difference = logits(half, ids).double() - exact.double()
        return (difference.norm(dim=-1) / exact.double().norm(dim=-1)).median()

    eager = error()
    with through("registered", half):
        assert error() <= 1.2 * eager
