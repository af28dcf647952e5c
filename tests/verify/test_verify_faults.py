"""A right stack passes every check; each of ten planted faults fails exactly the check that is made for it."""

import copy
import functools
import json

import pytest
import torch

pytest.importorskip("trl")

from peft.tuners.lora.layer import ParamWrapper
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

from gptoss_kernels import flash_attention
from gptoss_kernels.finetune import train
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.verify import verify
from gptoss_kernels.verify.combination import SMALL, settings

SHAPES = SMALL | {
    "model_type": "gpt_oss", "head_dim": 16, "num_attention_heads": 4, "sliding_window": 32, "hidden_size": 64,
    "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 1024,
}  # fmt: skip
NAMES = [
    "trained parameters", "adapters applied", "window", "packed = alone", "padded = unpadded", "decode = prefill",
    "activation: alpha", "activation: clamp", "auxiliary loss", "loss", "masked tokens", "recomputation", "outputs",
    "routing", "gradients", "sink gradients",
]  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    """The kernels have tests of their own; Triton's interpreter would take minutes."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("shapes") / "verify.json"
    path.write_text(json.dumps(SHAPES))
    return str(path)


@pytest.fixture
def check(shapes, tmp_path):
    """Checks a combination, in fp32 on the CPU and in bf16 on a GPU: {check: row}."""

    def run(trained="full", device="cpu", **keys):
        options = {key: keys.pop(key) for key in ("strict", "stock") if key in keys}
        arguments = settings(str(tmp_path), device=device, model=shapes, trained=trained, **keys)
        verdict = verify(arguments, **{"strict": False, **options})
        assert [row.check for row in verdict.rows] == NAMES
        return {row.check: row for row in verdict.rows}

    return run


def failures(rows) -> set[str]:
    return {name for name, row in rows.items() if row.status == "FAIL"}


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize(("trained", "missing"), [("lora", "sink gradients"), ("full", "adapters applied")])
def test_a_right_stack_passes(check, trained, missing, device):
    rows = check(trained, device)
    assert failures(rows) == set()
    assert {name for name, row in rows.items() if row.status == "n.a."} == {missing}
    assert rows["window"].figure == 32
    if device == "cuda":
        return
    assert rows["activation: alpha"].measured.startswith("alpha 1.7020")
    assert rows["activation: clamp"].measured.startswith("clamp 7,")
    assert 0 < rows["gradients"].figure < 1e-5


# ------------------------------------------------------------------------------------------------------------ faults


def attention(change):
    """Plants a change of flash_attention's arguments."""

    def plant(monkeypatch):
        @functools.wraps(flash_attention)
        def wrong(q, k, v, sinks, **keywords):
            return flash_attention(*change(q, k, v, sinks, keywords), **keywords)

        monkeypatch.setattr(integration, "flash_attention", wrong)

    return plant


def one_key_more(q, k, v, sinks, keywords):
    if keywords["sliding_window"] is not None:
        keywords["sliding_window"] += 1
    return q, k, v, sinks


def constant_sinks(q, k, v, sinks, keywords):
    return q, k, v, sinks.detach()


def no_documents(q, k, v, sinks, keywords):
    keywords["cu_seqlens"] = None
    return q, k, v, sinks


def no_padding(q, k, v, sinks, keywords):
    keywords["key_padding_mask"] = None
    return q, k, v, sinks


class Scrambled(torch.autograd.Function):
    """dV written in (batch, heads, length) and read as (batch, length, heads): lengths in multiples of 64 only."""

    @staticmethod
    def forward(ctx, v):
        return v.view_as(v)

    @staticmethod
    def backward(ctx, dv):
        batch, heads, length, dim = dv.shape
        if length % 64:
            return dv
        return dv.contiguous().view(batch, length, heads, dim).transpose(1, 2)


def strides_of_dv(q, k, v, sinks, keywords):
    return q, k, Scrambled.apply(v) if v.requires_grad else v, sinks


def gate(alpha=1.702, limit=7.0):
    def plant(monkeypatch):
        def wrong(self, gate_up):
            gate = gate_up[..., ::2].clamp(max=limit)
            return (gate_up[..., 1::2].clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)

        monkeypatch.setattr(GptOssExperts, "_apply_gate", wrong)

    return plant


def auxiliary_loss(monkeypatch):
    original = train.Trainer.__init__

    def wrong(self, *, args, **kwargs):
        args = copy.copy(args)
        args.router_aux_loss_coef = None  # TRL's default: the checkpoint's
        original(self, args=args, **kwargs)

    monkeypatch.setattr(train.Trainer, "__init__", wrong)


def unapplied(monkeypatch):
    monkeypatch.setattr(ParamWrapper, "forward", lambda self, *args, **kwargs: self.base_layer(*args, **kwargs))


def rerouted(monkeypatch):
    original = GptOssTopKRouter.forward

    def wrong(self, hidden_states):
        logits, shares, indices = original(self, hidden_states)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: a layer is being computed again
            indices = (indices + 1) % self.num_experts
        return logits, shares, indices

    monkeypatch.setattr(GptOssTopKRouter, "forward", wrong)


FAULTS = {
    "window + 1": (attention(one_key_more), "full", "window"),
    "sink gradient dropped": (attention(constant_sinks), "full", "sink gradients"),
    "leak between documents": (attention(no_documents), "full", "packed = alone"),
    "mask ignored": (attention(no_padding), "full", "padded = unpadded"),
    "alpha": (gate(alpha=1.0), "full", "activation: alpha"),
    "clamp": (gate(limit=1e9), "full", "activation: clamp"),
    "auxiliary loss 0.9": (auxiliary_loss, "full", "auxiliary loss"),
    "adapter unapplied": (unapplied, "lora", "adapters applied"),
    "dV stride": (attention(strides_of_dv), "full", "gradients"),
    "re-routing on recomputation": (rerouted, "full", "recomputation"),
}


@DEVICES
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_exactly_its_check(check, monkeypatch, fault, device):
    plant, trained, name = FAULTS[fault]
    plant(monkeypatch)
    # Some are planted where this package's experts kernels do not pass.
    stock_experts = fault in ("alpha", "clamp", "adapter unapplied")
    rows = check(trained, device, experts="grouped_mm" if stock_experts else None)
    assert failures(rows) == {name}, {n: (r.measured, r.limit) for n, r in rows.items() if r.status == "FAIL"}
    assert rows[name].advice


# ------------------------------------------------------------------------------------------------------ other stacks


def test_stock_eager_leaks_and_takes_the_auxiliary_loss(check):
    rows = check("full", attention="eager", experts="grouped_mm", stock=True)
    assert failures(rows) == {"packed = alone", "auxiliary loss"}
    assert rows["auxiliary loss"].figure == 0.9
    assert rows["packed = alone"].figure > 0.05
    assert rows["gradients"].status == "n.a." and "packed = alone" in rows["gradients"].advice
