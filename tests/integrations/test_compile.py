"""torch.compile takes a patched model in one graph: none of this package's operators breaks it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gptoss_kernels import patch_gpt_oss
from gptoss_kernels.lane import triton_mode
from gptoss_kernels.testing import random_gpt_oss

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_graph_forward_and_backward(backend, monkeypatch):
    if backend == "triton" and triton_mode() == "compiler":
        pytest.skip("this process runs kernels on the GPU: see test_on_a_gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if backend == "triton" else "0")
    _compare("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu(dtype, tolerance):
    _compare("cuda", dtype, tolerance)


def _compare(device, dtype, tolerance):
    """Logits and the adapters' and sinks' gradients, compiled and not."""
    kernels = {"attn_implementation": "gptoss_triton", "experts_implementation": "gptoss_triton"}
    model = random_gpt_oss(num_hidden_layers=2, seed=7, device=device, dtype=dtype, **kernels)
    model = patch_gpt_oss(get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)))
    trained = {name: p for name, p in model.named_parameters() if "lora" in name or "sinks" in name}
    for parameter in trained.values():
        parameter.requires_grad_()
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)

    def results(call):
        logits = call(ids)
        return [logits, *torch.autograd.grad(logits.float().square().mean(), list(trained.values()))]

    torch._dynamo.reset()
    forward = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    want = results(forward)
    got = results(torch.compile(forward, fullgraph=True, backend="aot_eager"))
    for name, a, b in zip(["logits", *trained], got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name
