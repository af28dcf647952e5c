"""What cannot be done exactly raises, and the message names the setting."""

import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gptoss_kernels import patch_flash_attention, triton_flash_attention
from gptoss_kernels.testing import random_gpt_oss

from .conftest import assert_close, logits, through


def _refused(model, route, match, *args, **kwargs):
    with through(route, model), pytest.raises(ValueError, match=match):
        logits(model, *args, **kwargs)


RESTARTING = torch.cat([torch.arange(20), torch.arange(30)])[None]


def test_packed_rows_in_a_batch(model, tokens, route):
    position_ids = torch.cat([torch.arange(50)[None], RESTARTING])
    _refused(
        model,
        route,
        r"position_ids.*batch 1, got batch 2 \(row 1, token 20\)",
        tokens(2, 50),
        position_ids=position_ids,
    )
    _refused(model, route, "position_ids.*batch 1, got batch 2", tokens(2, 50), position_ids=RESTARTING)


def test_packed_and_padded_in_one_row(model, tokens, route):
    """Neither the mask nor the positions can be followed alone: one would leak."""
    mask = torch.ones(1, 50, dtype=torch.long)
    mask[:, 45:] = 0
    _refused(
        model,
        route,
        r"attention_mask, position_ids.*row 0, token 20",
        tokens(1, 50),
        position_ids=RESTARTING,
        attention_mask=mask,
    )


def test_packed_documents_with_a_filled_cache(model, tokens, route):
    with through(route, model):
        cache = model(tokens(1, 10), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids.*past_key_values"):
            model(tokens(1, 50), position_ids=RESTARTING, past_key_values=cache)


def test_positions_that_jump_forward(model, tokens, route):
    position_ids = torch.arange(50)[None].clone()
    position_ids[:, 30:] += 9
    _refused(model, route, r"position_ids.*jump forward \(row 0, token 30", tokens(1, 50), position_ids=position_ids)


@pytest.mark.parametrize("shape", [(50,), (3, 50), (2, 49)])
def test_position_ids_of_another_shape(model, tokens, route, shape):
    module = model.model.layers[0].self_attn
    query, key = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \(2 or 1, 50\)"):
        triton_flash_attention(module, query, key, key, None, position_ids=torch.zeros(shape, dtype=torch.long))


CU = torch.tensor([0, 20, 50], dtype=torch.int32)


@pytest.mark.parametrize(
    ("match", "batch", "given"),
    [
        ("cu_seq_lens_k: expected an integer tensor", 1, {"cu_seq_lens_q": CU}),
        ("cu_seq_lens_q: expected an integer tensor.*got list", 1, {"cu_seq_lens_q": [0, 50], "cu_seq_lens_k": CU}),
        ("cu_seq_lens_q: expected an integer tensor.*float32", 1, {"cu_seq_lens_q": CU.float(), "cu_seq_lens_k": CU}),
        ("cu_seq_lens_q, cu_seq_lens_k: expected shape", 1, {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU[:2]}),
        (
            "cu_seq_lens_k: expected cu_seq_lens_q's values",
            1,
            {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU // 2 * 2 - CU // 50 + 1},
        ),
        ("cu_seq_lens_q: expected 0 first", 1, {"cu_seq_lens_q": CU[:2], "cu_seq_lens_k": CU[:2]}),
        ("cu_seq_lens_q: expected batch 1.*got batch 2", 2, {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU}),
        (
            "attention_mask: expected None or all ones together with cu_seq_lens_q",
            1,
            {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "attention_mask": (torch.arange(50) > 3).long()[None]},
        ),
    ],
)
def test_unsound_cu_seq_lens(model, tokens, route, match, batch, given):
    _refused(model, route, match, tokens(batch, 50), **given)


def test_cu_seq_lens_with_a_filled_cache(model, tokens, route):
    with through(route, model):
        cache = model(tokens(1, 10), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cu_seq_lens_q.*past_key_values"):
            model(tokens(1, 50), cu_seq_lens_q=CU, cu_seq_lens_k=CU, past_key_values=cache)


def test_dropout(tokens, route):
    model = random_gpt_oss(attention_dropout=0.1)
    ids = tokens(1, 20)
    with through(route, model):
        logits(model, ids)  # evaluation has none
        with pytest.raises(ValueError, match="attention_dropout: expected 0.*got 0.1"):
            logits(model.train(), ids)


def test_output_attentions(model, tokens, route):
    _refused(model, route, "output_attentions", tokens(1, 20), output_attentions=True)
    with through(route, model), pytest.raises(ValueError, match="output_attentions"):
        model.generate(tokens(1, 4), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("way", ["patched", "assigned"])
def test_output_attentions_in_the_configuration(tokens, way):
    model = random_gpt_oss(output_attentions=True)
    _refused(model, way, "output_attentions", tokens(1, 20))


def test_4d_masks(model, tokens, maskless):
    mask = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), torch.finfo(torch.float32).min)
    _refused(model, maskless, r"attention_mask.*4-D mask \(1, 1, 20, 20\)", tokens(1, 20), attention_mask=mask)
    masks = {"full_attention": None, "sliding_attention": mask}
    _refused(model, maskless, r"attention_mask.*4-D", tokens(1, 20), attention_mask=masks)


@pytest.mark.parametrize("shape", [(1, 19), (1, 21), (2, 20), (20,)])
def test_masks_of_another_length(model, tokens, maskless, shape):
    _refused(model, maskless, "attention_mask: expected", tokens(1, 20), attention_mask=torch.ones(shape))


def test_a_mask_shorter_than_the_cache(model, tokens, maskless):
    with through(maskless, model):
        cache = model(tokens(1, 10), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask: expected \(batch, 15\).*cached ones included"):
            model(tokens(1, 5), attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_a_mask_longer_than_the_cache_is_cut(model, tokens, maskless):
    """As eager does: what stands beyond the tokens seen so far is not looked at."""
    ids = tokens(1, 60)
    mask = torch.ones(1, 90, dtype=torch.long)
    mask[:, :7] = 0

    def run():
        cache = model(ids[:, :50], attention_mask=mask, use_cache=True, past_key_values=None).past_key_values
        return model(ids[:, 50:], attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad():
        want = run()
        with through(maskless, model):
            got = run()
    assert_close(got, want, 1e-5)


def test_static_cache_in_generate(model, tokens, route):
    options = {"max_new_tokens": 8, "cache_implementation": "static", "do_sample": False}
    with through(route, model), pytest.raises(ValueError, match="cache_implementation|attention_mask"):
        model.generate(tokens(1, 20), attention_mask=torch.ones(1, 20), pad_token_id=0, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_static_cache(model, tokens, maskless, masked):
    ids = tokens(1, 64)
    mask = torch.ones(1, 64, dtype=torch.long) if masked else None
    want = logits(model, ids)
    with through(maskless, model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="cache_implementation"):
            logits(model, ids[:, :63], past_key_values=cache, attention_mask=None if mask is None else mask[:, :63])
        # Filled to the last key at once, it is as good as none.
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert_close(logits(model, ids, past_key_values=cache, attention_mask=mask), want, 1e-5)


@pytest.mark.parametrize("build", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("overlay", ["or_mask_function", "and_mask_function", "block_sequence_ids", "is_causal"])
def test_mask_overlays(build, overlay):
    config = random_gpt_oss(attn_implementation="gptoss_triton", num_hidden_layers=2).config
    inputs = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 20, 64),
        "attention_mask": None,
        "past_key_values": None,
    }
    assert build(**inputs) is None
    assert build(**inputs, position_ids=torch.cat([torch.arange(8), torch.arange(12)])[None]) is None
    if overlay == "is_causal":
        config.is_causal = False
    elif overlay == "block_sequence_ids":
        inputs[overlay] = torch.zeros(1, 20, dtype=torch.long)
    else:
        inputs[overlay] = lambda batch, head, query, key: key % 2 == 0
    with pytest.raises(ValueError, match="block_sequence_ids.*is_causal"):
        build(**inputs)


@pytest.mark.parametrize("setting", [{"is_causal": False}, {"softcap": 30.0}])
def test_settings_of_other_models(model, setting):
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    with pytest.raises(ValueError, match=next(iter(setting))):
        triton_flash_attention(model.model.layers[0].self_attn, query, key, key, None, **setting)


# ------------------------------------------------------- dense masks, where eager_attention_forward is assigned by hand


def _dense(seen, dtype=torch.float32):
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _causal(length, window=None):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def _attend(model, mask, layer=1, **kwargs):
    generator = torch.Generator().manual_seed(0)
    module = model.model.layers[layer].self_attn
    query, key, value = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    if mask is not None and mask.shape[0] == 1:
        query, key, value = query[:1], key[:1], value[:1]
    return triton_flash_attention(
        module, query, key, value, mask, scaling=0.25, sliding_window=module.sliding_window, **kwargs
    )[0]


@pytest.mark.parametrize("form", ["minimum", "infinity", "bool"])
def test_dense_masks_that_are_understood(model, form):
    real = torch.ones(2, 40, dtype=torch.bool)
    real[0, :5] = real[1, 33:] = False
    for layer, window in ((0, 32), (1, None)):
        seen = _causal(40, window) & real[:, None]
        mask = {"minimum": _dense(seen), "bool": seen[:, None], "infinity": torch.where(seen, 0.0, -torch.inf)[:, None]}
        assert_close(_attend(model, mask[form], layer), _attend(model, real, layer), 0.0)
        assert (_attend(model, mask[form], layer) - _attend(model, None, layer)).abs().max() > 0.1


def test_a_dense_mask_that_has_the_documents(model):
    """What Transformers would build if it gave position_ids to its builders."""
    position_ids = torch.cat([torch.arange(15), torch.arange(25)])[None]
    document = torch.arange(40) >= 15
    seen = _causal(40) & (document[:, None] == document)
    want = _attend(model, _dense(_causal(40)[None]), position_ids=position_ids)
    assert_close(_attend(model, _dense(seen[None]), position_ids=position_ids), want, 0.0)
    with pytest.raises(ValueError, match="attention_mask: expected a dense mask"):
        _attend(model, _dense(seen[None]), position_ids=torch.arange(40)[None])


def _bias():
    return _dense(_causal(40)[None]) - torch.rand(1, 1, 40, 40).tril(-1)


@pytest.mark.parametrize(
    ("what", "mask"),
    [
        ("bidirectional", torch.zeros(1, 1, 40, 40)),
        ("another window", _dense(_causal(40, 31)[None])),
        ("an additive bias", _bias()),
        ("a prefix that all see", _dense((_causal(40) | (torch.arange(40) < 6))[None])),
        (
            "one key hidden from one query",
            _dense((_causal(40) & ~((torch.arange(40) == 30)[:, None] & (torch.arange(40) == 4)))[None]),
        ),
        ("positive", -_dense(_causal(40)[None])),
    ],
)
def test_dense_masks_that_mean_something_else(model, what, mask):
    with pytest.raises(ValueError, match="attention_mask: expected a dense mask of 0"):
        _attend(model, mask)


@pytest.mark.parametrize("shape", [(2, 1, 40, 41), (2, 1, 39, 40), (2, 4, 40, 40), (3, 1, 40, 40)])
def test_dense_masks_of_another_shape(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask: expected a dense mask \(2 or 1, 1, q_len=40, kv_len=40\)"):
        _attend(model, torch.zeros(shape))


def test_patching_a_model_that_the_patch_does_not_reach(model):
    with pytest.raises(ValueError, match="model: expected a gpt-oss model, got Linear"):
        patch_flash_attention(torch.nn.Linear(2, 2))
    flex = random_gpt_oss(num_hidden_layers=1, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match='attn_implementation="eager".*flex_attention'):
        patch_flash_attention(flex)
