"""Export: adapters merged as PEFT does, nothing dropped, the rest bit for bit, loadable, and compared."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptoss_kernels.finetune import export as module
from gptoss_kernels.finetune.compare import compare, held_out
from gptoss_kernels.finetune.config import LORA_TARGETS
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.export import Adapter, Base, export, main
from gptoss_kernels.finetune.model import load_checkpoint, load_config, load_packed
from gptoss_kernels.mxfp4.reference import dequantize

BF16, MXFP4 = "data/tiny-gpt-oss", "data/tiny-gpt-oss/mxfp4"
ALL = LORA_TARGETS["experts"] + LORA_TARGETS["router"]


def load(name, dtype=torch.float32):
    return load_checkpoint(str(name), load_config(str(name)), dtype=dtype, attn_implementation="eager")


def make_adapter(folder: Path, base: str = BF16, **keys) -> Path:
    """An adapter with a B that is not 0, on all parts unless keys say otherwise."""
    torch.manual_seed(0)
    targets = {"target_modules": LORA_TARGETS["attention"], "target_parameters": ALL}
    model = get_peft_model(load(base), LoraConfig(**({"r": 4, "lora_alpha": 6} | targets | keys)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
            elif "modules_to_save" in name:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def changed(adapter, tmp_path):
    """A copy of the adapter, its configuration and its tensors changed by a function."""

    def change(config=lambda c: None, tensors=lambda t: None) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / "changed"))
        path = folder / "adapter_config.json"
        settings, stored = json.loads(path.read_text()), load_file(folder / "adapter_model.safetensors")
        config(settings)
        tensors(stored)
        path.write_text(json.dumps(settings))
        save_file(stored, folder / "adapter_model.safetensors")
        return folder

    return change


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: x for file in sorted(Path(folder).glob("model*.safetensors")) for k, x in load_file(file).items()}


def merged(base, adapter) -> dict[str, torch.Tensor]:
    """What PEFT makes of it, in fp32."""
    return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()


def assert_rounded(got: dict, want: dict) -> None:
    """bf16 of the fp32 numbers: half of a last bit, and what fp32 may add in another order."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(
            x.float(), want[name], rtol=2**-8 * 1.001, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_rslora": True},
        {"target_modules": None, "target_parameters": ["layers.1.mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": None, "modules_to_save": ["lm_head"]},
    ],
    ids=["all", "rslora", "one projection", "head"],
)
def test_merged_as_peft_merges(tmp_path, keys):
    folder = make_adapter(tmp_path / "adapter", **keys)
    report = export(folder, "bf16", tmp_path / "out")
    got, before = tensors(tmp_path / "out"), tensors(BF16)
    assert_rounded(got, merged(BF16, folder))
    moved = {name for name, x in got.items() if not torch.equal(x, before[name])}
    assert len(moved) == sum(report.merged.values()) and report.copied == len(got) - len(moved)
    assert report.adapter_tensors == len(load_file(folder / "adapter_model.safetensors"))
    if not keys:
        assert report.merged == {"attention": 16, "experts": 8, "router": 4}
        assert "attention 16, experts 8, router 4 weights, with all 56 tensors" in str(report)


def test_mxfp4_that_nothing_changes_is_copied_bit_for_bit(tmp_path):
    targets = {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}
    folder = make_adapter(tmp_path / "adapter", base=MXFP4, **targets)
    report = export(folder, "mxfp4", tmp_path / "out")
    got, before = tensors(tmp_path / "out"), tensors(MXFP4)
    assert got.keys() == before.keys()
    changed = {name for name, x in got.items() if not torch.equal(x, before[name])}
    blocks, scales = (f"model.layers.1.mlp.experts.gate_up_proj_{part}" for part in ("blocks", "scales"))
    assert blocks in changed and {name for name in changed if "experts" in name} <= {blocks, scales}
    assert report.quantized == 1 and report.merged == {"attention": 16, "experts": 1}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weight = dequantize(got[f"{name}_blocks"], got[f"{name}_scales"], torch.float32)
    want = merged(MXFP4, folder)[name]
    error = ((weight - want).norm() / want.norm()).item()
    assert error == pytest.approx(report.quantization_error, rel=1e-4) and 0.01 < error < 0.15


def test_from_each_format_to_each(tmp_path):
    # The shipped model's experts are MXFP4 numbers already, so that all four are one model.
    for source in (BF16, MXFP4):
        for to in ("bf16", "mxfp4"):
            out = tmp_path / f"{Path(source).name}-{to}"
            report = export(source, to, out)
            got, want = tensors(out), tensors(BF16 if to == "bf16" else MXFP4)
            same = source == (BF16 if to == "bf16" else MXFP4)
            assert got.keys() == want.keys()
            for name, x in got.items():
                if same or not name.endswith(("_blocks", "_scales")):
                    assert torch.equal(x, want[name]), name
            assert (report.copied, report.dequantized, report.quantized) == (
                (71, 0, 0) if same else (63, 8, 0) if to == "bf16" else (63, 0, 8)
            )
            assert report.quantization_error == 0
            config = json.loads((out / "config.json").read_text())
            assert ("quantization_config" in config) == (to == "mxfp4") and config["dtype"] == "bfloat16"


def test_a_checkpoint_in_fp32_is_rounded(tmp_path):
    model = load(BF16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(BF16).save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", "bf16", tmp_path / "out")
    assert (report.rounded, report.copied, dict(report.merged)) == (71, 0, {})
    assert_rounded(tensors(tmp_path / "out"), model.state_dict())


def test_it_loads_and_is_the_trained_model(adapter, tmp_path):
    trained = PeftModel.from_pretrained(load(BF16), str(adapter))
    ids = torch.randint(0, 1024, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = trained(ids).logits.log_softmax(-1)
        apart = (load(BF16)(ids).logits.log_softmax(-1) - want).abs().mean()
        for to, share in (("bf16", 0.1), ("mxfp4", 0.8)):
            out = tmp_path / to
            export(adapter, to, out)
            model, info = AutoModelForCausalLM.from_pretrained(
                out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            assert not any(info.values()), info
            got = model.float()(ids).logits.log_softmax(-1)
            assert (got - want).abs().mean() < share * apart
            if to == "mxfp4":
                packed = load_packed(str(out), load_config(str(out)), dtype=torch.float32, attn_implementation="eager")
                torch.testing.assert_close(packed(ids).logits.log_softmax(-1), got, rtol=1e-4, atol=1e-4)
            assert model.generation_config.eos_token_id == 1528
    text = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|start|>user<|message|>Hi<|end|>" in text


def test_shards(adapter, tmp_path):
    export(adapter, "bf16", tmp_path / "one")
    report = export(adapter, "bf16", tmp_path / "many", shard_bytes=500_000)
    assert report.files > 4 and not (tmp_path / "many" / "model.safetensors").exists()
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(x, many[name]) for name, x in one.items())
    state = load(tmp_path / "many", torch.bfloat16).state_dict()
    assert all(torch.equal(x, state[name]) for name, x in one.items())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("source, to", [(BF16, "mxfp4"), (MXFP4, "bf16"), ("adapter", "mxfp4"), ("adapter", "bf16")])
def test_one_expert_at_a_time(adapter, tmp_path, source, to):
    with Largest() as largest:
        export(adapter if source == "adapter" else source, to, tmp_path / "out")
    stored = max(x.nbytes for x in tensors(BF16).values())
    one_expert = 8 * 128 * 192  # 64-bit codes of one expert's largest projection
    assert 0 < largest.nbytes <= max(stored, one_expert) < 4 * 8 * 128 * 192


# ---------------------------------------------------------------------------------------------------------- refusals


def remove(key):
    return lambda stored: stored.pop(key)


def put(key, *shape):
    return lambda stored: stored.update({key: torch.ones(shape)})


EXPERT = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "config, change, message",
    [
        ({}, remove(f"{EXPERT}.base_layer.lora_B.weight"), "holds .*layers.0.mlp.experts.base_layer.lora_A.weight"),
        ({}, put(f"{EXPERT}.lora_B.weight", 192, 32), r"holds .*lora_A.weight \(32, 96\), .*lora_B.weight \(192, 32\)"),
        ({}, put(f"{EXPERT}.base_layer.base_layer.lora_A.weight", 32, 128), "base_layer.base_layer.lora_A"),
        ({}, put("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", 4, 128), "layers.9"),
        ({}, put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 1536), "lora_embedding_A"),
        ({}, lambda stored: stored.clear(), "holds nothing"),
        ({"use_dora": True}, None, "expected plain LoRA, got use_dora: True"),
        ({"alpha_pattern": {"q_proj": 8}}, None, "alpha_pattern"),
        ({"some_new_method": 1}, None, "some_new_method: 1"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights: pissa"),
        ({"peft_type": "IA3"}, None, "peft_type: IA3"),
        ({"base_model_name_or_path": None}, None, "names none, and none was given"),
    ],
    ids=[
        "no B",
        "shape",
        "a third",
        "layer",
        "embedding",
        "empty",
        "dora",
        "pattern",
        "new",
        "pissa",
        "ia3",
        "no base",
    ],
)
def test_adapters_that_would_not_be_merged_whole(changed, tmp_path, config, change, message):
    folder = changed(lambda settings: settings.update(config), change or (lambda stored: None))
    with pytest.raises(SetupError, match=message):
        export(folder, "bf16", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_an_adapter_that_was_not_applied_cannot_pass(adapter, tmp_path, monkeypatch):
    apply = Adapter.apply
    forget = "model.layers.2.mlp.experts.down_proj"
    monkeypatch.setattr(Adapter, "apply", lambda self, name, w: w if name == forget else apply(self, name, w))
    with pytest.raises(SetupError, match="2 of its tensors were not merged .*layers.2.mlp.experts.lora_A"):
        export(adapter, "bf16", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_folders(adapter, fresh, tmp_path):
    out = tmp_path / "out"

    def refused(message, source=adapter, to="bf16", out=out, **keys):
        with pytest.raises(SetupError, match=message):
            export(source, to, out, **keys)

    refused("to: expected one of bf16, mxfp4, got 'fp8'", to="fp8")
    refused("out: expected a folder that is not there or is empty", out=adapter)
    refused("out: expected a folder", out=adapter / "adapter_config.json")
    refused("source: expected a folder with adapter_config.json or config.json", source=tmp_path)
    refused("base: expected with an adapter", source=BF16, base=BF16)
    refused("base: neither a folder", base="no/such")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(adapter / "adapter_config.json", pickled)
    torch.save({}, pickled / "adapter_model.bin")
    refused("adapter: cannot read .*adapter_model.safetensors", source=pickled)
    copy = fresh(BF16)
    stored = load_file(copy / "model.safetensors")
    broken = dict(stored)
    del broken["model.norm.weight"]
    save_file(broken, copy / "model.safetensors")
    refused("does not fit its config.json: 1 tensors .*model.norm.weight missing", source=copy)
    stored["model.norm.weight"][3] = float("inf")
    save_file({name: x.float() for name, x in stored.items()}, copy / "model.safetensors")
    refused("expected finite numbers, model.norm.weight holds others", source=copy)
    (copy / "tokenizer.json").unlink()
    refused("source: expected tokenizer.json", source=copy)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["copy", "pickled"]
    out.mkdir()
    export(BF16, "bf16", out)
    refused("holds something", source=BF16)
    assert torch.equal(tensors(out)["model.norm.weight"], tensors(BF16)["model.norm.weight"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")
def test_killed_midway_it_leaves_nothing_under_its_name(tmp_path):
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        stored = Base.stored
        calls = []

        def killing(self, name):
            calls.append(name)
            if len(calls) == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            return stored(self, name)

        Base.stored = killing
        try:
            export(BF16, "bf16", out)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out_unfinished"], "it was killed while it wrote"
    export(BF16, "bf16", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(tensors(out)) == 71


def test_interrupted_it_cleans_up(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(BF16, "bf16", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- comparison


def test_divergence_of_the_exported_from_the_trained_model(adapter, tmp_path, capsys):
    line = [str(adapter), "--to", "bf16", "--out", str(tmp_path / "good"), "--tokens", "300", "--max-kl", "1e-3"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "merged: attention 16" in said and "compared on 300 tokens (data/reasoning, float32 on cpu)" in said
    export(BF16, "bf16", tmp_path / "bare")
    bare = compare(adapter, BF16, tmp_path / "bare", tokens=300)
    assert bare.kl > 0.01 and bare.top1 < 0.99, "without the adapter it is another model"
    line = [str(adapter), "--to", "bf16", "--out", str(tmp_path / "bare"), "--check", "only", "--max-kl", "1e-3"]
    assert main([*line, "--tokens", "300"]) == 1
    assert compare(BF16, BF16, tmp_path / "bare", tokens=300).kl == 0
    with torch.no_grad():  # by hand, of the whole first document
        ids = torch.tensor(held_out(None, AutoTokenizer.from_pretrained(BF16), 300)[:1])[:, :-1]
        want, got = (
            model(ids).logits[0].double().log_softmax(-1)
            for model in (PeftModel.from_pretrained(load(BF16), str(adapter)), load(tmp_path / "bare"))
        )
        first = compare(adapter, BF16, tmp_path / "bare", tokens=ids.shape[1])
        assert first.tokens == ids.shape[1]
        assert first.kl == pytest.approx((want.exp() * (want - got)).sum(-1).mean().item(), rel=1e-3)


def test_texts(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "some.txt"
    path.write_text("One two three. " * 500, encoding="utf-8")
    monkeypatch.setattr("gptoss_kernels.finetune.compare.LENGTH", 100)
    ids = tokenizer(path.read_text()).input_ids
    pieces = held_out(str(path), tokenizer, 250)
    assert [len(piece) for piece in pieces] == [100, 100, 53]
    assert [*pieces[0], *pieces[1][1:], *pieces[2][1:]] == ids[:251]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "Hello"}) + "\n")
    assert tokenizer.decode(held_out(str(rows), tokenizer, 250)[0]) == "Hello<|return|>"
    path.write_text("")
    with pytest.raises(SetupError, match="text: expected at least two tokens"):
        held_out(str(path), tokenizer, 250)
    with pytest.raises(SetupError, match="there is no file or folder"):
        held_out("nowhere.jsonl", tokenizer, 250)


def test_too_large_models_are_not_compared(monkeypatch, tmp_path):
    monkeypatch.setattr("gptoss_kernels.finetune.compare.LARGEST_ON_CPU", 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    export(BF16, "bf16", tmp_path / "out")
    result = compare(BF16, BF16, tmp_path / "out")
    assert result.kl is None and "--check only" in str(result) and str(tmp_path / "out") in str(result)
