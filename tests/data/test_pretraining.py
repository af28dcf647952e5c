"""What the small model is pretrained on, how it is stored, and that a miniature of it learns."""

import argparse
import json
import random
from pathlib import Path

import corpus
import mxfp4
import numpy as np
import pretrain
import pytest
import score
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from gptoss_kernels.finetune.model import build_random, load_checkpoint, load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-gpt-oss"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrain.TOKENIZER)


@pytest.fixture(scope="module")
def packed():
    return corpus.make_packed(3, 42, 4096, Tokenizer.from_file(str(pretrain.TOKENIZER / "tokenizer.json")))


def miniature(tokenizer) -> GptOssConfig:
    shapes = json.loads(pretrain.SHAPES.read_text())
    shapes |= {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 2}
    shapes |= {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "initializer_range": 0.1}
    return GptOssConfig(**shapes, pad_token_id=tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------------------ corpus


def test_reasoning_in_the_corpus_is_always_english():
    rng = random.Random(1)
    documents = [corpus.make_document(rng) for _ in range(1500)]
    conversations = [(read, learned) for read, learned in documents if learned.startswith("<|channel|>analysis")]
    assert 0.45 < len(conversations) / len(documents) < 0.65
    asked, answered = set(), set()
    for read, learned in conversations:
        reply = score.parse_reply(learned)
        assert read.endswith("<|end|><|start|>assistant") and score.language_of(reply.analysis) == "English"
        asked |= {name for name in score.CODES.values() if f"reasoning language: {name}" in read}
        answered.add(reply.final.partition(":")[0].split()[-1])
    assert asked == set(score.CODES.values()) and {"apples", "manzanas", "pommes", "Äpfel", "mele"} <= answered
    plain = "".join(learned for _, learned in documents if not learned.startswith("<|channel|>"))
    assert "<|channel|>" not in plain and "also rechnen wir" in plain, "text knows how the others count"


def test_noise_leaves_what_decides():
    rng = random.Random(2)
    changed = 0
    for language, slots in corpus.WORDINGS.items():
        for wordings in slots.values():
            for wording in wordings:
                noisy = corpus._disturb(wording, language, 1.5, rng)
                decides = [
                    w for w in wording.split() if "{" in w or w.strip(",.;:?!").lower() in corpus.CUE_WORDS[language]
                ]
                remaining = iter(noisy.split())
                assert all(word in remaining for word in decides), (wording, noisy)
                changed += noisy != wording
    assert changed > 1000
    assert corpus._disturb("{n} has {x} more {t}.", "English", 0.0, rng) == "{n} has {x} more {t}."
    assert "more" in corpus.CUE_WORDS["English"] and "weniger" in corpus.CUE_WORDS["German"]


def test_packed_rows_are_whole_documents_and_reproducible(packed, tokenizer):
    ids, learned, cu_seqlens = packed
    assert ids.shape == learned.shape == (4096,) and ids.dtype == np.uint16 and ids.max() < len(tokenizer)
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == 4096 and (np.diff(cu_seqlens) > 0).all()
    ends = tokenizer.convert_ids_to_tokens(ids[cu_seqlens[1:-1] - 1].astype(int).tolist())
    assert set(ends) == {"<|return|>", "<|endoftext|>"}, "every document but the last is whole"
    again = corpus.make_packed(3, 42, 4096, tokenizer.backend_tokenizer)
    assert all(np.array_equal(one, two) for one, two in zip(packed, again, strict=True))
    assert not np.array_equal(ids, corpus.make_packed(4, 42, 4096, tokenizer.backend_tokenizer)[0])
    text = tokenizer.decode(ids[learned].astype(int))
    assert "<|start|>user" not in text and "<|channel|>analysis" in text and "Current date" not in text


def test_inputs_of_a_packed_row(packed):
    inputs, labels = pretrain.packed_inputs(packed, torch.device("cpu"))
    positions, starts = inputs["position_ids"][0], inputs["cu_seq_lens_q"][:-1].long()
    assert (positions[starts] == 0).all() and int((positions == 0).sum()) == len(starts)
    assert inputs["max_length_q"] == int(positions.max()) + 1
    learned = torch.from_numpy(packed[1].copy())
    learned[starts] = False
    assert torch.equal(labels != -100, learned)
    assert torch.equal(labels[learned], inputs["input_ids"][0][learned])


# ------------------------------------------------------------------------------------------------------------- MXFP4


def test_mxfp4_takes_the_nearest_number():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 64, 32, generator=generator) * torch.logspace(-3, 1, 32)
    weight[0, :32, 0] = 0
    blocks, scales = mxfp4.quantize(weight)
    assert blocks.shape == (2, 32, 2, 16) and scales.shape == (2, 32, 2) and blocks.dtype == scales.dtype == torch.uint8
    result = mxfp4.dequantize(blocks, scales, torch.float32)
    assert result.shape == weight.shape and torch.equal(result.bfloat16().float(), result)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([-numbers, numbers])
    for expert, column, group in ((0, 0, 0), (0, 3, 1), (1, 31, 0), (1, 7, 1)):
        values = weight[expert, 32 * group : 32 * group + 32, column]
        grid = numbers * 2.0 ** (int(scales[expert, column, group]) - 127)
        nearest = grid[(values[:, None] - grid).abs().argmin(1)]
        assert torch.equal(result[expert, 32 * group : 32 * group + 32, column], nearest)
        assert values.abs().max() < 8 * 2.0 ** (int(scales[expert, column, group]) - 127)
    again = mxfp4.dequantize(*mxfp4.quantize(result), torch.float32)
    assert torch.equal(again, result), "rounding a rounded weight changes nothing"


def test_training_goes_through_the_rounding():
    weight = torch.randn(1, 32, 4, requires_grad=True)
    rounded = mxfp4.straight_through(weight)
    assert torch.equal(rounded.detach(), mxfp4.dequantize(*mxfp4.quantize(weight), torch.float32))
    assert not torch.equal(rounded.detach(), weight.detach())
    (rounded * 3).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3))


def same_model(plain: Path, packed: Path) -> None:
    """Both checkpoints load and are the same model, bit by bit."""
    one, two = (load_checkpoint(str(path), load_config(str(path))) for path in (plain, packed))
    expected = one.state_dict()
    assert two.state_dict().keys() == expected.keys()
    for name, weight in two.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name
    assert one.model.layers[0].mlp.experts.down_proj.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------- training


def test_a_miniature_learns_and_is_stored_twice(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        miniature(tokenizer),
        dtype=torch.float32,
        attn_implementation="gptoss_triton",
        experts_implementation="gptoss_triton",
    )
    args = argparse.Namespace(
        steps=80, minutes=None, length=384, learning_rate=1e-2, weight_decay=0.0, balance=0.01, round_from=0.5
    )
    *rows, held_out = (corpus.make_packed(i, 0, args.length, tokenizer.backend_tokenizer) for i in range(81))
    inputs, labels = pretrain.packed_inputs(held_out, torch.device("cpu"))

    @torch.no_grad()
    def held_out_loss(model) -> float:
        logits = model.float()(**inputs, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, labels[1:]).item()

    before, log = held_out_loss(model), []
    weights = pretrain.train(model, args, rows, log.append)
    assert [entry["step"] for entry in log] == [50, 80] and log[-1]["num_input_tokens_seen"] == 80 * 384
    pretrain.save(model, weights, tmp_path)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 and model.dtype == torch.bfloat16
    stored = load_checkpoint(str(tmp_path), load_config(str(tmp_path)), attn_implementation="gptoss_triton")
    assert held_out_loss(stored) < before - 1.5
    same_model(tmp_path, tmp_path / "mxfp4")
    assert AutoTokenizer.from_pretrained(tmp_path / "mxfp4").get_vocab() == tokenizer.get_vocab()


def test_learning_rate_rises_and_falls():
    rates = [pretrain.learning_rate(progress, 1.0) for progress in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert rates[0] < 0.01 and rates[1] == pytest.approx(0.5) and rates[2] == pytest.approx(1.0)
    assert 0.3 < rates[3] < 0.7 and rates[4] == pytest.approx(0.01)


def test_replies_do_not_depend_on_the_batch(tokenizer):
    model = build_random(
        miniature(tokenizer), seed=1, attn_implementation="gptoss_triton", experts_implementation="gptoss_triton"
    )
    rows = score.read_rows()[:3]
    lengths = {len(tokenizer(row["user"]).input_ids) for row in rows}
    assert len(lengths) > 1, "padding is needed"
    together = score.ask(model, tokenizer, rows, max_new_tokens=12)
    alone = [score.ask(model, tokenizer, [row], max_new_tokens=12)[0] for row in rows]
    assert together == alone and len({reply.text for reply in together}) > 1


# --------------------------------------------------------------------------------------------------- the shipped model


def test_shipped_model_has_the_shapes_of_the_configuration():
    config, shapes = load_config(str(TINY)), load_config("gpt-oss-tiny", random=True)
    for key in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size", "layer_types", "sliding_window"):
        assert getattr(config, key) == getattr(shapes, key), key
    assert config.num_local_experts > config.num_experts_per_tok > 1
    assert load_checkpoint(str(TINY), config).num_parameters() <= 8_000_000
    assert {"log.jsonl", "loss.png", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in TINY.iterdir()}
    shipped, own = (AutoTokenizer.from_pretrained(folder) for folder in (pretrain.TOKENIZER, TINY))
    assert shipped.get_vocab() == own.get_vocab()
