"""The same logits, gradients, tokens and losses as eager attention."""

import copy

import pytest
import torch
from transformers import DynamicCache

from gptoss_kernels import flash_attention, patch_flash_attention, unpatch_flash_attention
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss

from .conftest import assert_close, assert_gradients_close, logits, loss_and_gradients, through


@pytest.mark.parametrize(
    ("length", "way"),
    [(100, "registered"), (100, "patched"), (100, "assigned"), (128, "registered"), (192, "patched")],
)
def test_logits_and_every_gradient_through_the_kernels(kernels, model, tokens, length, way):
    ids, labels = tokens(1, length), tokens(1, length)
    want, gradients = loss_and_gradients(model, ids, labels)
    with through(way, model):
        got, found = loss_and_gradients(model, ids, labels)
    assert_close(got, want, 1e-5)
    assert_gradients_close(found, gradients)
    assert {"model.layers.0.self_attn.sinks", "model.layers.3.self_attn.v_proj.weight"} <= found.keys()


@pytest.mark.parametrize("length", [1, 31, 100, 128, 192])
def test_logits_and_every_gradient(model, tokens, route, length):
    ids, labels = tokens(2, length), tokens(2, length)
    want, gradients = loss_and_gradients(model, ids, labels)
    with through(route, model):
        got, found = loss_and_gradients(model, ids, labels)
    assert_close(got, want, 1e-5)
    if length == 1:  # one key and a sink: the query cancels but for the sink's share, and some experts see no token
        found, gradients = ({k: g[k] for k in g if "v_proj" in k or "sinks" in k} for g in (found, gradients))
    assert_gradients_close(found, gradients)


def _generate(model, ids, **kwargs):
    out = model.generate(
        ids,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_same_tokens_and_logits_at_every_step(model, tokens, route, padded):
    ids = tokens(2, 20)  # 50 tokens in the end: the window of 32 slides over the cache
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = mask[1, :7] = 0
    want, want_logits = _generate(model, ids, attention_mask=mask)
    with through(route, model):
        got, got_logits = _generate(model, ids, attention_mask=mask)
    assert want.shape == (2, 50) and want_logits.shape == (2, 30, 256)
    assert torch.equal(got, want)
    assert_close(got_logits, want_logits, 1e-5)


def test_generate_through_the_kernels(kernels, tokens):
    small = random_gpt_oss(seed=3, num_hidden_layers=2, sliding_window=8)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :7] = 0  # the window's share of a row's mask lies where the row's stride says
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    want = small.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    with through("registered", small):
        got = small.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits), 1e-5)


@pytest.mark.parametrize("windowed", [True, False])
def test_prefill_in_chunks(model, tokens, route, windowed):
    ids = tokens(2, 100)
    want = logits(model, ids)
    with through(route, model):
        # Without the configuration every layer keeps all keys, the sliding ones too.
        cache = DynamicCache(config=model.config) if windowed else DynamicCache()
        got = [logits(model, part, use_cache=True, past_key_values=cache) for part in ids.split([50, 1, 40, 9], dim=1)]
    assert_close(torch.cat(got, dim=1), want, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(tokens, route, use_reentrant):
    model = random_gpt_oss(seed=4)
    ids, labels = tokens(1, 70), tokens(1, 70)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    want, gradients = loss_and_gradients(model, ids, labels, attention_mask=mask)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with through(route, model):
        got, found = loss_and_gradients(model, ids, labels, attention_mask=mask)
    assert_close(got, want, 1e-5)
    assert_gradients_close(found, gradients)


def test_twenty_optimizer_steps(model, tokens):
    data = [(tokens(2, 64), tokens(2, 64)) for _ in range(20)]

    def losses(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for ids, labels in data:
            loss = torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    want = losses(copy.deepcopy(model))
    patch_flash_attention()
    try:
        got = losses(copy.deepcopy(model))
    finally:
        unpatch_flash_attention()
    again = losses(copy.deepcopy(model))
    assert not torch.equal(got, want), "bitwise equal: the patch was not in use"
    assert_close(got, want, 1e-5)
    assert torch.equal(again, want)


def test_autocast(model, tokens, route):
    ids = tokens(1, 100)
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits(model, ids).float()
        with through(route, model):
            ours = logits(model, ids).float()
    assert (eager - exact).norm() > 1e-3 * exact.norm(), "autocast was not in effect"
    assert (ours - exact).norm() <= 1.2 * (eager - exact).norm()


def test_autocast_is_over_inside_attention(model):
    """q and k arrive in fp32 and v in bf16; what follows the cast is computed as without autocast."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    module = model.model.layers[0].self_attn
    want, _ = integration.attention_forward(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    with torch.autocast("cpu", torch.bfloat16):
        got, weights = integration.attention_forward(module, query, key, value.bfloat16(), None)
    assert weights is None and got.dtype == torch.bfloat16 and got.shape == (1, 40, 4, 16) and got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["plain", "padded", "documents"])
def test_torch_compile_without_a_graph_break(monkeypatch, tokens, case):
    monkeypatch.setattr(integration, "flash_attention", flash_attention)  # with its own choice of the backend
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch.compiler.reset()
    model = random_gpt_oss(
        seed=5, num_hidden_layers=2, attn_implementation="gptoss_triton", experts_implementation="batched_mm"
    )
    ids = tokens(1, 48)
    position_ids = torch.cat([torch.arange(20), torch.arange(28)])[None]
    bounds = torch.tensor([0, 20, 48], dtype=torch.int32)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    inputs = {
        "plain": {"position_ids": torch.arange(48)[None]},
        "padded": {"attention_mask": mask},
        "documents": {"position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
    }[case]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = tokens(1, 48)
    want, gradients = loss_and_gradients(model, ids, labels, **inputs)
    got = compiled(ids, use_cache=False, **inputs).logits
    torch.nn.functional.cross_entropy(got.flatten(0, 1), labels.flatten()).backward()
    assert_close(got, want, 1e-5)
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, gradients)
    if case == "plain":
        with pytest.raises(RuntimeError, match="position_ids.*cu_seq_lens_q"):
            compiled(ids, position_ids=position_ids, use_cache=False)
