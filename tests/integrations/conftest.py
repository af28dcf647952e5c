"""One small random gpt-oss, and the three ways of giving it this package's attention.

Most of what is tested here is what the integration hands to `flash_attention`, so it runs on the PyTorch reference,
whatever TRITON_INTERPRET says; tests that ask for the `kernels` fixture run through the kernels.
"""

import contextlib
import functools

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss_kernels import flash_attention, patch_flash_attention, triton_flash_attention, unpatch_flash_attention
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.lane import interpreting
from gptoss_kernels.testing import random_gpt_oss

ROUTES = ("registered", "patched", "assigned")


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Two threads take fifty times as long as one on operations this small, when other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setattr(integration, "flash_attention", functools.partial(flash_attention, backend="reference"))


@pytest.fixture
def kernels(reference, monkeypatch):
    if not interpreting():
        pytest.skip("needs TRITON_INTERPRET=1: this process runs kernels on the GPU, and the model is on the CPU")
    monkeypatch.setattr(integration, "flash_attention", functools.partial(flash_attention, backend="triton"))


@contextlib.contextmanager
def through(route: str, model):
    """The model with eager attention on entry, with this package's attention inside the block."""
    eager = modeling_gpt_oss.eager_attention_forward
    try:
        if route == "registered":
            model.set_attn_implementation("gptoss_triton")
        elif route == "patched":
            patch_flash_attention(model)
        else:
            modeling_gpt_oss.eager_attention_forward = triton_flash_attention
        yield model
    finally:
        model.set_attn_implementation("eager")
        unpatch_flash_attention()
        modeling_gpt_oss.eager_attention_forward = eager


@pytest.fixture(params=ROUTES)
def route(request):
    return request.param


@pytest.fixture(params=("registered", "patched"))
def maskless(request):
    """The routes on which Transformers builds no dense mask."""
    return request.param


@pytest.fixture(scope="session")
def model():
    return random_gpt_oss(seed=1)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: torch.randint(0, 256, shape, generator=generator)


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, use_cache=kwargs.pop("use_cache", False), **kwargs).logits


def loss_and_gradients(model, input_ids, labels, **kwargs):
    """(logits, {parameter: gradient}) of the mean cross-entropy over `labels` other than -100, not shifted."""
    model.zero_grad()
    out = model(input_ids, use_cache=False, **kwargs).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return out.detach(), gradients


def assert_close(got, want, limit):
    error = (got - want).abs().max().item()
    assert error <= limit, f"largest difference {error:.2e} > {limit:.0e}"


def assert_gradients_close(got, want, limit=1e-4):
    assert got.keys() == want.keys()
    for name in want:
        norm = want[name].norm().item()
        assert norm > 0, f"{name} has no gradient to compare"
        error = (got[name] - want[name]).norm().item() / norm
        assert error <= limit, f"gradient of {name}: relative error {error:.2e} > {limit:.0e}"
