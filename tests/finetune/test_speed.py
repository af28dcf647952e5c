"""The fused loss is TRL's, and a layer that keeps results instead of computing them again gives the same gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from gptoss_kernels.finetune.loss import fuse_loss
from gptoss_kernels.finetune.recompute import ATTENTION, EXPERTS, ROUTING, Recomputation, bytes_kept, keep
from gptoss_kernels.lane import triton_mode
from gptoss_kernels.testing import random_gpt_oss

FIELDS = ("log_probs", "entropy", "is_top1")


@pytest.fixture(scope="module")
def model():
    kernels = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    return random_gpt_oss(num_hidden_layers=2, seed=7, **kernels)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 256, (1, 24), generator=generator)
    labels = input_ids.clone()
    labels[:, 5:9] = -100
    return {"input_ids": input_ids, "labels": labels}


def prepared(model, frozen=True):
    model = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=FIELDS)
    model.lm_head.weight.requires_grad_(not frozen)
    return model


@pytest.fixture
def kernels(monkeypatch):
    if triton_mode() == "compiler":
        pytest.skip("this process runs kernels on the GPU, and the model is on the CPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_loss_is_trls(kernels, model, batch):
    trl, ours = prepared(model), prepared(model)
    fuse_loss(ours)
    got, want = (m(**batch, fused_lm_head=True) for m in (ours, trl))
    for name in (*FIELDS, "loss"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.label_mask, want.label_mask)
    weights = torch.rand(got.log_probs.shape, generator=torch.Generator().manual_seed(1))  # as the trainer weighs them
    (got.log_probs * weights).sum().backward()
    (want.log_probs * weights).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), trl.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert ours(**batch).logits.shape == (1, 24, 256)  # calls without the flag are the model's own


def test_a_batch_without_labels(kernels, model, batch):
    ours = prepared(model)
    fuse_loss(ours)
    out = ours(input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], -100), fused_lm_head=True)
    assert out.loss == 0
    out.loss.backward()


def test_a_trained_head_goes_to_trl(model, batch, monkeypatch):
    ours = prepared(model, frozen=False)
    fuse_loss(ours)
    monkeypatch.setattr("gptoss_kernels.layers.loss.linear_cross_entropy", None)
    ours(**batch, fused_lm_head=True).loss.backward()
    assert ours.lm_head.weight.grad.norm() > 0


def run(model, batch, calls):
    """Gradients of one step, and how often attention and the experts ran."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[function.name()] = calls.get(function.name(), 0) + 1
            return function(*args, **(kwargs or {}))

    model.zero_grad()
    with Count():
        model(**batch, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("operators", "attention", "experts"),
    [(frozenset(), 4, 4), (ROUTING, 4, 4), (ROUTING | ATTENTION, 2, 4), (ROUTING | ATTENTION | EXPERTS, 2, 2)],
)
def test_what_is_kept_is_not_computed_again(kernels, model, batch, operators, attention, experts):
    model = copy.deepcopy(model)
    want = run(model, batch, {})
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        keep(layer, operators)
    calls = {}
    got = run(model, batch, calls)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert calls["gptoss_kernels::attention_forward"] == attention
    assert calls["gptoss_kernels::experts_forward"] == experts
    assert calls["gptoss_kernels::route"] == (2 if operators else 4)


def test_dropout_draws_the_same_again():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8)).train()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.manual_seed(1)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    keep(layer, ROUTING)
    torch.manual_seed(1)
    out = layer._gradient_checkpointing_func(layer, x)
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], want)
    keep(layer[0], ROUTING)
    assert layer[0]._gradient_checkpointing_func.keywords["preserve_rng_state"] is False  # nothing to draw


def test_a_kept_result_that_is_changed_in_place_is_noticed():
    from gptoss_kernels.keep import contexts, kept

    recording, replaying = contexts(ATTENTION)
    with recording:
        (result,) = kept("attention", lambda: (torch.zeros(3),))
        kept("experts", lambda: (torch.zeros(3),))  # not one that is kept
    with replaying:
        assert torch.equal(kept("attention", lambda: 1 / 0)[0], torch.zeros(3))
    recording, replaying = contexts(ATTENTION)
    with recording:
        (result,) = kept("attention", lambda: (torch.zeros(3),))
    result.add_(1)
    with replaying, pytest.raises(RuntimeError, match="attention: a result that was kept"):
        kept("attention", lambda: 1 / 0)


def test_what_fits(model):
    chooser = Recomputation(model, "auto", tokens=100)
    attention, experts, rest = bytes_kept(model.config, 100, 4)
    assert attention == 100 * 4 * (16 * 4 + 4)  # out and lse of four heads of 16
    assert chooser.fit(0) == chooser.fit(-5) == (0, 0)
    assert chooser.fit(attention) == (1, 0)
    assert chooser.fit(2 * attention + experts) == (2, 1)
    assert chooser.fit(10**9) == (2, 2)
    assert rest == 100 * 4 * ((4 + 2 * 2) * 16 + 4 * model.config.hidden_size + 4 * model.config.num_local_experts)


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_whole_layers_are_not_computed_again(kernels, model, batch, whole):
    model = copy.deepcopy(model)
    want = run(model, batch, {})
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chooser = Recomputation(model, "auto", tokens=24)
    chooser.apply(0, 0, whole)
    calls = {}
    got = run(model, batch, calls)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert calls["gptoss_kernels::attention_forward"] == 4 - whole
    chooser.apply(0, 0)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize(
    "free, kept",
    [  # bytes that the first step leaves free, and the second: layers that keep attention, experts, all
        ((0, 10**9), (0, 0, 0)),
        ((10**9, 0), (2, 2, 0)),
        ((10**9, 1.6), (2, 2, 1)),
        ((10**9, 10**9), (2, 2, 2)),
    ],
)
def test_what_two_steps_leave_free_is_used(model, monkeypatch, free, kept):
    chooser = Recomputation(copy.deepcopy(model), "auto", tokens=100, reserve=0.0)
    rest = bytes_kept(model.config, 100, 4)[2]
    total = 10**12
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for bytes_free in (*free, 0):
        bytes_free = int(bytes_free * rest) if bytes_free == 1.6 else bytes_free
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, free=bytes_free: total - free)
        chooser.use_free_memory(torch.device("cuda"))
    assert (chooser.attention, chooser.experts, chooser.whole) == kept


def test_processes_choose_what_fits_the_fullest_gpu(model, monkeypatch):
    chooser = Recomputation(copy.deepcopy(model), "auto", tokens=100, reserve=0.0)
    attention = bytes_kept(model.config, 100, 4)[0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**12))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda free, op: free.fill_(attention))  # of another process
    chooser.use_free_memory(torch.device("cpu"))
    assert (chooser.attention, chooser.experts, chooser.whole) == (1, 0, 0)
