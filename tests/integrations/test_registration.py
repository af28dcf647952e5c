"""`import gptoss_kernels` registers, stays light, and works without Triton; patches come off without a trace."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss

import gptoss_kernels
from gptoss_kernels import patch_flash_attention, unpatch_flash_attention
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.integrations.register import after_import
from gptoss_kernels.testing import SHAPES, random_gpt_oss

from .conftest import assert_close, logits, through

ROOT = Path(__file__).parents[2]
PATCHED = ("eager_attention_forward", "create_causal_mask", "create_sliding_window_causal_mask")


def _run(code, **environment):
    """Standard output of Python code in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_kernel_no_triton_and_no_modeling_code():
    _run(
        """
        import sys
        import gptoss_kernels

        heavy = [m for m in sys.modules if m.split(".")[0] in ("triton", "transformers")]
        assert not heavy, heavy
        kernels = {"forward", "backward", "autograd", "tiles", "masks"} & {m.rpartition(".")[2] for m in sys.modules
                   if m.startswith("gptoss_kernels.attention")}
        assert not kernels, kernels

        from transformers import GptOssForCausalLM
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert "gptoss_triton" in ALL_ATTENTION_FUNCTIONS and "gptoss_triton" in ALL_MASK_ATTENTION_FUNCTIONS
        assert "gptoss_kernels.attention.forward" not in sys.modules
        assert not [f for f in sys.meta_path if type(f).__module__.startswith("gptoss_kernels")]
        """
    )


def test_a_model_runs_where_triton_cannot_be_imported():
    _run(
        """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocked())

        import torch
        import gptoss_kernels
        from gptoss_kernels.testing import random_gpt_oss

        eager, ours = (random_gpt_oss(attn_implementation=a) for a in ("eager", "gptoss_triton"))
        ids = torch.arange(50)[None]
        losses = [m(ids, labels=ids, use_cache=False).loss for m in (eager, ours)]
        losses[1].backward()
        assert (losses[0] - losses[1]).abs() < 1e-5, losses
        assert ours.model.layers[0].self_attn.sinks.grad.abs().min() > 0
        assert not any(m.split(".")[0] == "triton" for m in sys.modules)
        q = torch.randn(1, 1, 4, 16)
        try:
            gptoss_kernels.flash_attention(q, q, q, backend="triton")
        except RuntimeError as error:
            assert "Triton is not installed" in str(error)
        else:
            raise AssertionError("backend='triton' worked without Triton")
        """,
        TRITON_INTERPRET="1",
    )


def test_registered_with_both_interfaces():
    assert ALL_ATTENTION_FUNCTIONS["gptoss_triton"] is integration.attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["gptoss_triton"] is integration.padding_mask
    assert set(gptoss_kernels.__all__) >= {"patch_flash_attention", "triton_flash_attention", "unpatch_flash_attention"}


def test_after_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "imported_late.py"
    module.write_text("raise OSError('not yet')\n")
    calls, before = [], list(sys.meta_path)
    after_import("imported_late", lambda: calls.append("first"))
    with pytest.raises(OSError, match="not yet"):
        __import__("imported_late")
    assert calls == []  # an import that failed does not count
    module.write_text("value = 1  # loads now\n")
    assert __import__("imported_late").value == 1
    assert calls == ["first"] and sys.meta_path == before
    after_import("imported_late", lambda: calls.append("loaded already"))
    assert calls == ["first", "loaded already"] and sys.meta_path == before
    monkeypatch.delitem(sys.modules, "imported_late")


def test_from_pretrained_and_set_attn_implementation(tmp_path, model, tokens):
    ids = tokens(1, 60)
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gptoss_triton")
    assert loaded.config._attn_implementation == "gptoss_triton"
    assert_close(logits(loaded, ids), want, 1e-5)

    with pytest.MonkeyPatch.context() as patch:
        calls = []
        attend = integration.flash_attention
        patch.setattr(integration, "flash_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
        loaded.set_attn_implementation("eager")
        assert torch.equal(logits(loaded, ids), want) and not calls
        loaded.set_attn_implementation("gptoss_triton")
        assert_close(logits(loaded, ids), want, 1e-5)
        assert len(calls) == model.config.num_hidden_layers


def test_unpatching_restores_the_original(model, tokens):
    originals = [getattr(modeling_gpt_oss, name) for name in PATCHED]
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    want = logits(model, ids, attention_mask=mask)
    unpatch_flash_attention()  # without a patch: nothing
    patch_flash_attention(model)
    try:
        patched = [getattr(modeling_gpt_oss, name) for name in PATCHED]
        assert not any(a is b for a, b in zip(originals, patched, strict=True))
        patch_flash_attention()  # again: nothing
        assert [getattr(modeling_gpt_oss, name) for name in PATCHED] == patched
        got = logits(model, ids, attention_mask=mask)
        assert not torch.equal(got, want)
        assert_close(got[mask.bool()], want[mask.bool()], 1e-5)
    finally:
        unpatch_flash_attention()
    assert all(getattr(modeling_gpt_oss, n) is f for n, f in zip(PATCHED, originals, strict=True))
    assert torch.equal(logits(model, ids, attention_mask=mask), want)
    unpatch_flash_attention()
    assert all(getattr(modeling_gpt_oss, n) is f for n, f in zip(PATCHED, originals, strict=True))


def test_the_patch_leaves_other_implementations_alone(tokens):
    ids = tokens(1, 40)
    ours = random_gpt_oss(num_hidden_layers=2, attn_implementation="gptoss_triton")
    want = logits(ours, ids)
    config = random_gpt_oss(num_hidden_layers=1).config
    config._attn_implementation_internal = "sdpa"
    inputs = (config, torch.zeros(1, 40, 64), (torch.arange(40) > 3)[None], None)
    dense = modeling_gpt_oss.create_causal_mask(*inputs)
    assert dense.shape == (1, 1, 40, 40)
    with through("patched", random_gpt_oss(num_hidden_layers=2)):
        assert torch.equal(modeling_gpt_oss.create_causal_mask(*inputs), dense)
        assert torch.equal(logits(ours, ids), want)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_random_gpt_oss_has_the_real_shapes(name):
    shipped = json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text())
    assert {key: shipped[key] for key in SHAPES[name]} == SHAPES[name]
    model = random_gpt_oss(name, device="meta", dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e9, 1) == {"gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8}[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for key in ("layer_types", "rope_parameters", "rms_norm_eps", "attention_bias"):
        assert getattr(model.config, key) == shipped[key], key


def test_random_gpt_oss_is_seeded_and_has_no_idle_weight():
    first, second, third = (dict(random_gpt_oss(seed=s).named_parameters()) for s in (0, 0, 1))
    for name, p in first.items():
        assert torch.equal(p, second[name]) and not torch.equal(p, third[name]), name
        assert p.std() > 0.01, name
    with pytest.raises(ValueError, match="shapes: expected one of 'small', 'gpt-oss-20b', 'gpt-oss-120b', got '20b'"):
        random_gpt_oss("20b")
