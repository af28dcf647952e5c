"""Chapter 08's functions inside a model, against eager attention on each row and document alone."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")

from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.testing import random_gpt_oss, relative_error

CLOSE = 1e-5
LENGTHS = (9, 1, 20, 1, 4)  # the window is 8


@pytest.fixture(scope="module")
def notebook():
    module = extract.load("08_patch_transformers")
    AttentionInterface.register("test_course_08", module.packing_adapter)
    AttentionMaskInterface.register("test_course_08", module.layer_padding)
    AttentionInterface.register("test_course_08_draft", module.attention_adapter)
    return module


@pytest.fixture(scope="module")
def model():
    return random_gpt_oss("small", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: torch.randint(0, 256, shape, generator=generator)


def test_the_model_of_the_notebook_is_within_the_kernels(notebook):
    assert random_gpt_oss("small", **notebook.SMALL).config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("start", [0, 5])
def test_packed_equals_alone(notebook, model, tokens, start):
    row = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) + start for n in LENGTHS])[None]
    want = torch.cat([notebook.logits(model, "eager", part) for part in row.split(LENGTHS, dim=1)], dim=1)
    for mask in (None, torch.ones_like(row)):
        got = notebook.logits(model, "test_course_08", row, position_ids=positions, attention_mask=mask)
        assert relative_error(got, want) < CLOSE
    assert relative_error(notebook.logits(model, "test_course_08_draft", row, position_ids=positions), want) > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_alone_with_a_mask_function_only(notebook, model, tokens, side):
    batch, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    real = slice(7, 20) if side == "left" else slice(0, 13)
    mask[0] = 0
    mask[0, real] = 1
    want = notebook.logits(model, "eager", batch[:1, real])
    got = {n: notebook.logits(model, f"test_course_08{n}", batch, attention_mask=mask) for n in ("", "_draft")}
    assert relative_error(got[""][:1, real], want) < CLOSE
    error = relative_error(got["_draft"][:1, real], want)
    assert (error > 0.01) == (side == "left")  # causality hides padding on the right by itself


def test_decoding_with_padding_and_a_sliding_cache(notebook, model, tokens):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :10] = 0  # the window of 8 moves out of the padding on the way
    want = notebook.logits(model, "eager", ids[:1, 10:])
    model.set_attn_implementation("test_course_08")
    cache, got = DynamicCache(config=model.config), []
    with torch.no_grad():
        for begin, end in ((0, 12), (12, 13), (13, 17), (17, 18), (18, 19), (19, 20)):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            got.append(out.logits)
    assert relative_error(torch.cat(got, dim=1)[:1, 10:], want) < CLOSE


def test_what_cannot_be_followed_raises(notebook, model, tokens):
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    for rows in (positions.expand(2, -1), torch.cat([torch.arange(10)[None], positions])):
        with pytest.raises(ValueError, match="batch 1"):
            notebook.logits(model, "test_course_08", tokens(2, 10), position_ids=rows)
    model.set_attn_implementation("test_course_08")
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="q_len == kv_len"):
        model(tokens(1, 10), position_ids=positions, past_key_values=cache)


def test_gradients_through_the_adapter(notebook, model, tokens):
    ids = tokens(1, 20)
    loss, want = notebook.loss_and_gradients(model, "eager", ids)
    want = {name: gradient.clone() for name, gradient in want.items()}
    got_loss, got = notebook.loss_and_gradients(model, "test_course_08", ids)
    assert relative_error(got_loss, loss) < CLOSE
    assert max(relative_error(got[name], want[name]) for name in want) < CLOSE
    model.zero_grad()


def test_influence_finds_the_leak_and_nothing_else(notebook, model, tokens):
    embeddings = model.get_input_embeddings()(tokens(1, 14)).detach()
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]

    def reach(implementation, **inputs):
        model.set_attn_implementation(implementation)
        run = lambda x: model(inputs_embeds=x, use_cache=False, **inputs).logits  # noqa: E731
        return notebook.influence(run, embeddings, 9)

    assert (reach("test_course_08", position_ids=positions) == 0).all()
    assert (reach("test_course_08") > 0).all()


def test_visible_is_what_eagers_mask_lets_through(notebook, model):
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    real = torch.arange(12) >= 3
    model.set_attn_implementation("eager")
    for build, window in ((create_causal_mask, 12), (create_sliding_window_causal_mask, 8)):
        mask = build(model.config, torch.zeros(1, 12, 64), real[None], None)
        assert torch.equal(notebook.visible(real, torch.zeros(12), window), mask[0, 0] == 0)
        document = torch.arange(12) // 5
        mask = build(model.config, torch.zeros(1, 12, 64), None, None, position_ids=(torch.arange(12) % 5)[None])
        assert torch.equal(notebook.visible(torch.ones(12).bool(), document, window), mask[0, 0] == 0)


def test_no_attention_gives_each_token_its_own_value(notebook):
    value = torch.randn(1, 2, 5, 16)
    out, weights = notebook.no_attention(None, torch.zeros(1, 4, 5, 16), value, value, None, scaling=1.0)
    assert weights is None and out.shape == (1, 5, 4, 16)
    assert torch.equal(out[0, :, 1], value[0, 0]) and torch.equal(out[0, :, 2], value[0, 1])


def test_model_step(notebook, model):
    row = notebook.model_step(model.model, "eager", 8, torch.device("cpu"), torch.float32)
    assert row["tokens_per_s"] > 0 and row["peak_gib"] is None
    model.requires_grad_(True)
