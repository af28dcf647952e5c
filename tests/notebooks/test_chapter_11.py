"""What notebook 11 writes by hand against the package and torch; it defines no kernel."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")
pytest.importorskip("trl", reason="chapter 11 needs the training extra")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.adamw import api, reference
from gptoss_kernels.finetune.model import count_parameters
from gptoss_kernels.plan.memory import Settings, predict


@pytest.fixture(scope="module")
def chapter():
    return extract.load("11_full_finetuning")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_the_packages(chapter):
    x, random = draw(4096), torch.arange(0, 65536, 16, dtype=torch.int32)
    assert torch.equal(chapter.round_stochastically(x, random), reference.round_stochastically(x, random))


def test_blocks_come_back(chapter):
    x = draw(1024)
    again = chapter.read_blocks(*chapter.quantize_blocks(x, 256))
    largest = x.view(-1, 256).abs().amax(1).repeat_interleave(256)
    assert ((again - x).abs() <= 0.501 * largest / 127).all()


def test_the_float_map_is_that_of_the_optimizers_states(chapter):
    for name in ("exp_avg", "exp_avg_sq"):
        x = draw(512).abs() if name == "exp_avg_sq" else draw(512)
        once = chapter.through_float8(x, name)
        assert torch.equal(chapter.through_float8(once, name), once)
        assert ((once - x).abs() <= x.abs() / 16)[x.abs() > 1e-3].all()
    assert sum(t.nbytes for t in api.new_state(draw(512)).values()) == 512 * 2 * chapter.MOMENT


def test_steps_in_the_backward_pass_are_the_optimizers(chapter):
    nets = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in nets[1].parameters()}
    chapter.step_in_backward(nets[1].parameters(), lambda p: optimizers[p].step())
    whole = torch.optim.AdamW(nets[0].parameters(), lr=0.01)
    for step in range(3):
        for net in nets:
            net(draw(5, 4, seed=step)).square().sum().backward()
        whole.step()
        whole.zero_grad()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_gathering_undoes_scattering(chapter, processes):
    x = draw(10)
    assert torch.allclose(chapter.all_gather(chapter.reduce_scatter([x] * processes), 10), x)


def test_the_bill_is_the_planners(chapter):
    config = chapter.load_config("openai/gpt-oss-20b", random=True)
    count = count_parameters(config)
    lean = predict(config, Settings("full", 4096, 141, recomputation="lean", optim="adamw_8bit_sr_in_backward"))
    weights, gradients, first, second, _ = chapter.RECIPES["steps inside the backward pass"]
    assert gradients == 0
    assert lean.weights_dense == pytest.approx(weights * count, rel=1e-3)
    assert lean.optimizer_states == pytest.approx((first + second) * count, rel=1e-2)
    usual = predict(config, Settings("full", 4096, 80, gpus=8, recomputation="lean"))
    assert usual.optimizer_states == pytest.approx(chapter.STATES["optimizer states"] * count / 8, rel=1e-2)
