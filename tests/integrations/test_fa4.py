"""`attn_implementation="gptoss_fa4"`: what reaches `flash_attention` and what is refused; its numbers, on a GPU.

On the CPU a stand-in answers backend="fa4" with the PyTorch reference; what is behind it is tested with the backend.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptoss_kernels import flash_attention, patch_gpt_oss, unpatch_gpt_oss
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss, relative_error

from .conftest import assert_close, assert_gradients_close, logits, loss_and_gradients

LENGTHS = (1, 40, 29)
PADDING = 'attention_mask: attn_implementation="gptoss_fa4" expected None or all ones, got padding'


@pytest.fixture
def calls(reference, monkeypatch):
    """Arguments of the calls with backend="fa4", which the reference answers."""
    calls = []

    def attend(*tensors, backend, **keywords):
        calls.append(keywords | {"backend": backend})
        return flash_attention(*tensors, **keywords, backend="reference")

    monkeypatch.setattr(integration, "flash_attention", attend)
    return calls


@pytest.fixture
def fa4_model(model):
    model.set_attn_implementation("gptoss_fa4")
    yield model
    model.set_attn_implementation("eager")


def packed_row(tokens):
    ids = tokens(1, sum(LENGTHS))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def test_registered():
    assert ALL_ATTENTION_FUNCTIONS["gptoss_fa4"] is integration.fa4_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["gptoss_fa4"] is integration.padding_mask


def test_logits_and_gradients(calls, model, tokens):
    ids, labels = tokens(2, 50), tokens(2, 50)
    want, gradients = loss_and_gradients(model, ids, labels)
    model.set_attn_implementation("gptoss_fa4")
    try:
        got, found = loss_and_gradients(model, ids, labels, attention_mask=torch.ones_like(ids))
    finally:
        model.set_attn_implementation("eager")
    assert_close(got, want, 1e-5)
    assert_gradients_close(found, gradients)
    assert [call["backend"] for call in calls] == ["fa4"] * 4
    assert [call["sliding_window"] for call in calls] == [32, None, 32, None]
    assert all(call["key_padding_mask"] is None and call["cu_seqlens"] is None for call in calls)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("said_by", ["position_ids", "cu_seq_lens"])
def test_packed_documents(calls, fa4_model, tokens, said_by, masked):
    ids, position_ids = packed_row(tokens)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    said = {"position_ids": position_ids}
    if said_by == "cu_seq_lens":
        said |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone()}
    alone = torch.cat([logits(fa4_model, part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    calls.clear()
    got = logits(fa4_model, ids, attention_mask=torch.ones_like(ids) if masked else None, **said)
    assert_close(got, alone, 1e-5)
    assert len(calls) == 4 and all(call["cu_seqlens"].tolist() == ends.tolist() for call in calls)


def test_padding_is_refused(calls, fa4_model, tokens):
    with pytest.raises(ValueError, match=f"{PADDING}.*pack the rows.*gptoss_triton"):
        logits(fa4_model, tokens(2, 20), attention_mask=padded(2, 20))
    ids, position_ids = packed_row(tokens)
    with pytest.raises(ValueError, match=PADDING):
        logits(fa4_model, ids, position_ids=position_ids, attention_mask=padded(1, sum(LENGTHS)))
    assert not calls


def test_generation(calls, model, tokens):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 40)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.set_attn_implementation("gptoss_fa4")
    try:
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), want)
        assert len(calls) == 4 * 12 and not any(call["key_padding_mask"] is not None for call in calls)
        calls.clear()
        with pytest.raises(ValueError, match=f"{PADDING}.*one prompt at a time"):
            model.generate(ids, attention_mask=padded(2, 40), **options)
        assert not calls
    finally:
        model.set_attn_implementation("eager")


def test_padding_that_appears_while_decoding_is_refused(calls, fa4_model, tokens):
    """One query a row: the other implementation hands the mask on unread, this one must look."""
    with torch.no_grad():
        cache = fa4_model(tokens(2, 10), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=PADDING):
            fa4_model(tokens(2, 1), past_key_values=cache, attention_mask=padded(2, 11))


def test_a_mask_is_read_once_a_forward_and_layer_kind(calls, fa4_model, tokens, monkeypatch):
    readings = []
    read = integration._read_padding
    monkeypatch.setattr(integration, "_read_padding", lambda *x: readings.append(1) or read(*x))
    ids = tokens(1, 50)
    logits(fa4_model, ids, attention_mask=torch.ones_like(ids))
    assert len(readings) <= 2 and len(calls) == 4


def test_padding_under_torch_compile_is_asserted(calls, fa4_model):
    layer = fa4_model.model.layers[0].self_attn
    q, kv = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16)
    attend = torch.compile(integration.fa4_attention_forward, backend="eager")
    plain = integration.fa4_attention_forward(layer, q, kv, kv, None)[0]
    assert torch.equal(attend(layer, q, kv, kv, torch.ones(2, 20).bool())[0], plain)
    with pytest.raises(RuntimeError, match="expected None or all ones, got padding"):
        attend(layer, q, kv, kv, padded(2, 20).bool())


def test_mask_overlays_name_the_implementation():
    config = random_gpt_oss(attn_implementation="gptoss_fa4", num_hidden_layers=2).config
    inputs = dict(config=config, inputs_embeds=torch.zeros(1, 20, 64), attention_mask=None, past_key_values=None)
    assert create_causal_mask(**inputs) is None
    with pytest.raises(ValueError, match='attn_implementation="gptoss_fa4": expected causal'):
        create_causal_mask(**inputs, and_mask_function=lambda batch, head, query, key: key % 2 == 0)


def test_is_not_silently_another_backend(model, tokens):
    """On this CPU the true backend has neither a GPU nor, most likely, the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "flash_attention", flash_attention)
        model.set_attn_implementation("gptoss_fa4")
        try:
            with pytest.raises(RuntimeError, match='backend="fa4": '):
                logits(model, tokens(1, 5))
        finally:
            model.set_attn_implementation("eager")


def test_from_pretrained(calls, tmp_path, model, tokens):
    ids = tokens(1, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gptoss_fa4")
    assert_close(logits(loaded, ids), logits(model, ids), 1e-5)
    assert len(calls) == 4


def test_patch_gpt_oss(calls, model, tokens):
    ids = tokens(1, 30)
    want = logits(model, ids)
    patch_gpt_oss(model, attention="gptoss_fa4", experts=False, rms_norm=False, rope=False, lora=False)
    try:
        assert model.config._attn_implementation == "gptoss_fa4"
        assert_close(logits(model, ids), want, 1e-5)
        assert len(calls) == 4
        with pytest.raises(
            ValueError, match="attention: expected True, False, 'gptoss_triton' or 'gptoss_fa4', got 'fa4'"
        ):
            patch_gpt_oss(model, attention="fa4")
        assert model.config._attn_implementation == "gptoss_fa4"  # a refusal changes nothing
    finally:
        unpatch_gpt_oss(model)
    assert model.config._attn_implementation == "eager"


SETTINGS = [
    ("packing: true\nmax_length: 64\n", "is not installed"),
    ("padding_free: true\n", "is not installed"),
    ("per_device_train_batch_size: 1\n", "is not installed"),
    ("per_device_train_batch_size: 2\n", "rows would be padded"),
    ("per_device_train_batch_size: 1\npad_to_multiple_of: 8\n", "rows would be padded"),
    ("per_device_train_batch_size: 1\neval_strategy: epoch\n", "rows would be padded"),
    ("per_device_train_batch_size: 1\nper_device_eval_batch_size: 1\neval_strategy: epoch\n", "is not installed"),
]


@pytest.mark.parametrize(("lines", "said"), SETTINGS, ids=[lines for lines, _ in SETTINGS])
def test_settings_of_a_run(tmp_path, monkeypatch, lines, said):
    pytest.importorskip("trl")
    from gptoss_kernels.finetune import preflight
    from gptoss_kernels.finetune.config import parse
    from gptoss_kernels.finetune.errors import SetupError

    def missing():
        raise RuntimeError('backend="fa4": FlashAttention-4 is not installed')

    path = tmp_path / "run.yaml"
    keys = "model_name_or_path: somewhere\nattn_implementation: gptoss_fa4\nbf16: false\nreport_to: none\n"
    path.write_text(f"output_dir: {tmp_path}/out\n{keys}{lines}")
    arguments = parse(["--config", str(path)])
    monkeypatch.setattr(preflight, "load_fa4", missing)
    with pytest.raises(SetupError, match=f"attn_implementation: 'gptoss_fa4'.*{said}"):
        preflight.check_settings(arguments)
    monkeypatch.setattr(preflight, "load_fa4", lambda: None)
    if said == "is not installed":
        preflight.check_settings(arguments)


# ------------------------------------------------------------------------------------------------------------- on a GPU

# FlashAttention-4 takes no head_dim 16. With all experts chosen, rounding cannot choose others.
SHAPES = dict(head_dim=32, num_local_experts=4, num_experts_per_tok=4)


def installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not installed(), reason="flash-attn-4 is not installed")(test))


@pytest.fixture(scope="module")
def gpu_model():
    """In fp32, eager: what the others are measured against."""
    return random_gpt_oss(seed=1, device="cuda", **SHAPES)


@pytest.fixture(scope="module")
def half_model(gpu_model):
    half = random_gpt_oss(seed=1, device="cuda", dtype=torch.bfloat16, **SHAPES)
    half.load_state_dict(gpu_model.state_dict())
    return half


@pytest.fixture
def unpatched(reference, monkeypatch):
    monkeypatch.setattr(integration, "flash_attention", flash_attention)


@pytest.fixture
def through_fa4(unpatched, half_model):
    half_model.set_attn_implementation("gptoss_fa4")
    yield half_model
    half_model.set_attn_implementation("eager")


@on_a_gpu
def test_bfloat16_is_as_close_to_fp32_as_eager(gpu_model, through_fa4, tokens):
    ids, labels = tokens(1, 300).cuda(), tokens(1, 300).cuda()
    exact, gradients = loss_and_gradients(gpu_model, ids, labels)
    got, found = loss_and_gradients(through_fa4, ids, labels)
    through_fa4.set_attn_implementation("eager")
    eager, eagers = loss_and_gradients(through_fa4, ids, labels)
    assert relative_error(got, exact) <= 1.2 * relative_error(eager, exact)
    # The few sinks of one layer are off by chance, in eager by a tenth to eight times as much: those of all together.
    sinks = [name for name in gradients if name.endswith("sinks")]
    for names in (*([n] for n in gradients if "self_attn" in n and n not in sinks), sinks):
        joined = [torch.cat([x[n].flatten().double() for n in names]) for x in (found, eagers, gradients)]
        ours, theirs = (relative_error(x, joined[-1]) for x in joined[:2])
        assert ours <= 2 * theirs, f"{names}: {ours:.2e}, eager {theirs:.2e}"


@on_a_gpu
def test_packed_equals_alone(through_fa4, tokens):
    ids, position_ids = (x.cuda() for x in packed_row(tokens))
    alone = torch.cat([logits(through_fa4, part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    apart = logits(through_fa4, ids, position_ids=position_ids)
    leaking = logits(through_fa4, ids)
    assert relative_error(apart, alone) < 0.1 * relative_error(leaking, alone)


@on_a_gpu
def test_decoding_is_the_prompt_as_a_whole(through_fa4, tokens):
    ids = tokens(2, 60).cuda()
    whole = logits(through_fa4, ids)
    with torch.no_grad():
        cache = through_fa4(ids[:, :40], use_cache=True).past_key_values
        steps = [through_fa4(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    other = logits(through_fa4, tokens(2, 60).cuda())
    assert relative_error(torch.cat(steps, 1), whole[:, 40:]) < 0.05 * relative_error(other, whole)


@on_a_gpu
def test_autocast(gpu_model, unpatched, tokens):
    ids = tokens(1, 100).cuda()
    exact = logits(gpu_model, ids)
    errors = {}
    try:
        for name in ("eager", "gptoss_fa4"):
            gpu_model.set_attn_implementation(name)
            with torch.autocast("cuda", torch.bfloat16):
                errors[name] = relative_error(logits(gpu_model, ids), exact)
    finally:
        gpu_model.set_attn_implementation("eager")
    assert errors["gptoss_fa4"] <= 1.5 * errors["eager"]


@on_a_gpu
def test_fp32_is_refused(gpu_model, unpatched, tokens):
    gpu_model.set_attn_implementation("gptoss_fa4")
    try:
        with pytest.raises(TypeError, match='q: backend="fa4" expected one of torch.float16, torch.bfloat16'):
            logits(gpu_model, tokens(1, 9).cuda())
    finally:
        gpu_model.set_attn_implementation("eager")
