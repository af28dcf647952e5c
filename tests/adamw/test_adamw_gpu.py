"""What only a GPU shows of the AdamW step: an expert tensor of gpt-oss-20b, its speed, its memory, no synchronisation.

Prints its figures with `pytest -m gpu -s`.
"""

import itertools

import pytest
import torch

from gptoss_kernels.adamw.api import STATE, adamw_step, new_state
from gptoss_kernels.finetune.optimizer import AdamW8bit

pytestmark = pytest.mark.gpu

SHAPE = (32, 2880, 5760)  # gate_up_proj


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator("cuda").manual_seed(0)
    p, g = (torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2))
    return p.mul_(0.02), g.mul_(1e-4)


def test_an_expert_tensor(tensors):
    p, g = tensors[0].clone(), tensors[1]
    state = new_state(p)
    adamw_step(p, g, state, step=1, lr=1e-4)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        events[0].record()
        for step in range(2, 12):
            adamw_step(p, g, state, step=step, lr=1e-4)
        events[1].record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    ms = events[0].elapsed_time(events[1]) / 10
    extra = torch.cuda.max_memory_allocated() - before
    speed = p.numel() * 10 / ms / 1e9  # 10 bytes an element are read and written
    print(f"\n{p.numel() / 1e6:.0f} M elements: {ms:.3f} ms, {speed:.2f} TB/s, extra {extra / 2**20:.1f} MiB")
    assert extra < 8 * 2**20
    assert p.isfinite().all()
    copy, state2 = tensors[0].clone(), new_state(p)
    for step in range(1, 12):
        adamw_step(copy, g, state2, step=step, lr=1e-4)
    assert torch.equal(p, copy) and all(torch.equal(state[name], state2[name]) for name in STATE)


def test_elements_beyond_two_to_the_31():
    """int32 offsets would overflow; 120b's expert tensors come close, and more must not go wrong silently."""
    count = 2**31 + 5000
    p = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
    g = torch.zeros_like(p)
    g[-1000:] = 1
    state = new_state(p)
    adamw_step(p, g, state, step=1, lr=0.5)
    torch.testing.assert_close(p[-1000:].float().mean(), torch.tensor(-0.5, device="cuda"), rtol=1e-3, atol=0)
    assert not p[:-1000].any()


def test_gradients_are_never_together():
    """Eight layers of 64 MiB: the peak has the gradients of about two, not of eight."""
    peaks = {}
    for in_backward in (True, False):
        layers = torch.nn.Sequential(*(torch.nn.Linear(5792, 5792, bias=False) for _ in range(8)))
        layers = layers.to("cuda", torch.bfloat16)
        optimizer = AdamW8bit(layers.parameters(), lr=1e-5, in_backward=in_backward)
        for _ in range(2):  # the second step allocates no moments any more
            loss = layers(torch.randn(16, 5792, device="cuda", dtype=torch.bfloat16)).float().square().sum()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss.backward()
            optimizer.step()
            peaks[in_backward] = (torch.cuda.max_memory_allocated() - before) / layers[0].weight.nbytes
            optimizer.zero_grad()
    print(f"\nextra memory of the backward pass, in gradients of a layer: {peaks}")
    assert peaks[True] < 2.5 and peaks[False] > 7


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_moments_on_the_host_give_the_same_steps(share):
    """Layers of two sizes, so many that all of the ring is used again while copies are under way."""
    results, waiting = {}, {}
    widths = (4096, 4096, 1024, 4096, 4096, 1024, 4096, 4096, 4096, 1024, 4096)
    for on_host in (0.0, share):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
        layers = layers.to("cuda", torch.bfloat16)
        optimizer = AdamW8bit(layers.parameters(), lr=1e-3, in_backward=True, on_host=on_host)
        for step in range(6):
            x = torch.randn(64, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(step)).bfloat16()
            layers(x).float().square().mean().backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        moments = [entry[name].cuda() for entry in state.values() for name in ("exp_avg", "exp_avg_sq")]
        results[on_host] = [*layers.parameters(), *moments]
        codes = [entry["exp_avg"] for entry in state.values()]
        waiting[on_host] = sum(x.numel() for x in codes if not x.is_cuda) / sum(x.numel() for x in codes)
    assert all(torch.equal(a, b) for a, b in zip(results[0.0], results[share], strict=True))
    assert waiting[0.0] == 0 and share - 0.1 < waiting[share] <= share
