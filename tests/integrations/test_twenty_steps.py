"""Twenty optimizer steps, patched and unpatched: the same losses."""

import functools

import pytest
import torch

from gptoss_kernels import fused_experts, patch_gpt_oss, unpatch_gpt_oss
from gptoss_kernels.integrations import transformers as integration
from gptoss_kernels.testing import random_gpt_oss


def losses(device, dtype, patched, *, tokens, seed=0, **shapes):
    """Twenty losses of AdamW on every parameter, on random tokens."""
    model = random_gpt_oss(device=device, dtype=dtype, seed=seed, **shapes).train()
    if patched:
        patch_gpt_oss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (4, 1, tokens), generator=generator).to(device)
    values = []
    for step in range(20):
        loss = model(input_ids=data[step % 4], labels=data[step % 4], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    unpatch_gpt_oss(model)
    return torch.tensor(values, dtype=torch.float64)


def test_in_float32(kernels, monkeypatch):
    monkeypatch.setattr(integration, "fused_experts", functools.partial(fused_experts, backend="triton"))
    run = functools.partial(losses, "cpu", torch.float32, tokens=10, num_hidden_layers=2, sliding_window=4)
    want, got = run(False), run(True)
    assert want[-4:].mean() < want[:4].mean() - 0.5, "nothing was learnt: the comparison has no power"
    assert ((got - want).abs() / want).max() <= 1e-5


@pytest.mark.gpu
def test_in_bfloat16(monkeypatch):
    from gptoss_kernels import flash_attention

    monkeypatch.setattr(integration, "flash_attention", flash_attention)
    run = functools.partial(losses, "cuda", torch.bfloat16, tokens=512)
    want, got, other = run(False), run(True), run(False, seed=1)
    difference, spread = (got - want).abs().mean().item(), (other - want).abs().mean().item()
    print(f"\nmean difference of the losses: patched {difference:.1e}, another seed {spread:.1e}", end="")
    assert want[-4:].mean() < want[:4].mean() - 0.1
    assert difference < spread
