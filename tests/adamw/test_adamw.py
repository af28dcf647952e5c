"""The 8-bit AdamW step: its numbers come back on average, the kernel is the reference, and it trains as AdamW does."""

import pytest
import torch

from gptoss_kernels.adamw import reference
from gptoss_kernels.adamw.api import STATE, adamw_step, decode_moment, new_state
from gptoss_kernels.adamw.reference import BLOCK, decode, encode, keys, random_words, round_stochastically
from gptoss_kernels.lane import triton_mode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if DEVICE == "cuda" else "reference"  # the interpreter is slow, and has a test of its own


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_random_words_are_uniform_and_unrelated():
    count = 1 << 18
    words = random_words(count, keys(1, 2, 3)).long() & 0xFFFFFFFF
    for shift in (0, 12, 16, 24):
        seen = torch.bincount((words >> shift) & 0xFF, minlength=256).double()
        chi2 = ((seen - count / 256) ** 2 / (count / 256)).sum()
        assert 170 < chi2 < 360, shift  # 255 degrees of freedom: +- 4 standard deviations
    x = words.double() / 2**32 - 0.5
    others = [random_words(count, keys(*other)).long() & 0xFFFFFFFF for other in ((1, 2, 4), (1, 3, 3), (2, 2, 3))]
    for other in [*(o.double() / 2**32 - 0.5 for o in others), x.roll(1), x.roll(BLOCK)]:
        assert ((x * other).mean() * 12).abs() < 5 * count**-0.5
    assert all(0 <= key < 2**31 for seed in (0, -1, 2**63) for key in keys(seed, 10**6, 200))


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_moments_come_back_on_average(name):
    """Also where they are the fewest: just above the range's end, and, for the first moment, below it."""
    if name == "exp_avg":
        x = draw(BLOCK).cpu() * torch.logspace(-4.6, 0, BLOCK)
    else:
        x = (0.5 + 0.5 * draw(BLOCK).cpu().sigmoid()) * torch.logspace(-9, 0, BLOCK)
    rounds = 20000
    words = random_words(rounds * BLOCK, keys(0, 1, 0)).view(rounds, BLOCK)
    random = reference._shift(reference._times(words, reference.FIRST), 12)
    back = decode(*encode(x.expand(rounds, BLOCK).contiguous(), random, name), name)
    assert back.unique(dim=0).shape[0] > 1000
    error = (back.double().mean(0) - x).abs()
    assert (error <= 5 * back.double().std(0) / rounds**0.5 + 1e-6 * x.abs()).all()
    assert ((back - x).abs() <= x.abs() / 8 + 2.0**-14 * x.abs().max()).all()


def test_a_second_moment_is_never_rounded_to_zero():
    x = torch.logspace(-30, 0, BLOCK)[None]
    x[0, 7] = 0
    back = decode(*encode(x, torch.zeros(1, BLOCK, dtype=torch.int32), "exp_avg_sq"), "exp_avg_sq")
    assert ((back > 0) == (x > 0)).all() and (back >= x * (7 / 8)).all()


def test_what_is_on_the_grid_stays_there_whatever_its_block_does():
    """Else a block's growing maximum would round all of its moments again in every step."""
    random = torch.full((1, BLOCK), 2**20 - 1, dtype=torch.int32)
    for name in ("exp_avg", "exp_avg_sq"):
        x = draw(1, BLOCK).cpu().abs() + 0.05  # in the range until the end
        x = decode(*encode(x, random, name), name)
        for factor in (1.37, 5.0, 20.0):
            x[0, 0] = x.max() * factor
            back = decode(*encode(x, random, name), name)
            assert torch.equal(back[0, 1:], x[0, 1:])


def test_weights_are_rounded_so_that_they_stay_on_average():
    x = torch.tensor([1.0, 1.001, -1.003, 3e-5, -7.77e8, 0.0]).repeat(200_000, 1)
    words = random_words(x.numel(), keys(5, 5, 5)).view_as(x) & 0xFFFF
    y = round_stochastically(x, words).double()
    assert ((y.mean(0) - x[0]).abs() <= 5 * y.std(0) / len(x) ** 0.5 + 1e-12).all()
    assert (y[:, 0] == 1).all() and (y[:, 5] == 0).all() and all(len(y[:, i].unique()) == 2 for i in (1, 2, 3, 4))
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_stochastically(odd, torch.full((3,), 0xFFFF, dtype=torch.int32)).isnan(), odd.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 255, 256, 2049, 5000])
def test_kernel_is_the_reference(count, dtype, monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        if triton_mode() == "compiler":
            pytest.skip("this process compiles kernels, and there is no GPU")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    mine = draw(count, seed=1).to(dtype)
    theirs = mine.clone()
    states = new_state(mine), new_state(theirs)
    scale = torch.logspace(-12, 0, count, device=DEVICE)
    for step in (1, 2, 3):
        grad = (draw(count, seed=step + 5) * scale).to(dtype)
        given = dict(step=step, lr=1e-2, weight_decay=0.1, seed=3, index=7)
        squares = [
            adamw_step(x, grad, state, **given, backend=backend)
            for x, state, backend in zip((mine, theirs), states, ("triton", "reference"), strict=True)
        ]
        torch.testing.assert_close(*squares, rtol=1e-5, atol=0)
        # The same random numbers: what is apart was decided by the last bit of an fp32 number.
        for name in STATE:
            assert (states[0][name] != states[1][name]).float().mean() < 2e-3, name
        apart = (mine.float() - theirs.float()).abs()
        if dtype == torch.float32:
            assert apart.max() < 1e-6 + 0.01 * (apart > 1e-6).float().mean() and (apart > 1e-6).float().mean() < 5e-3
        else:
            assert (apart > 0).float().mean() < 5e-3 and (apart <= mine.float().abs() / 128 + 1e-30).all()
    assert mine.float().isfinite().all() and states[0]["exp_avg"].any()


def test_a_step_is_that_of_adamw():
    """The first step to rounding, where moments are exact; later ones on average over many elements."""
    count = 64 * BLOCK
    start = draw(count, seed=1)
    mine, theirs = start.clone(), start.clone().requires_grad_()
    given = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer, state = torch.optim.AdamW([theirs], **given), new_state(mine)
    for step in range(1, 41):
        grad = draw(count, seed=100 + step) * 1e-3 + 5e-4
        theirs.grad = grad.clone()
        optimizer.step()
        adamw_step(mine, grad, state, step=step, **given, backend=BACKEND)
        if step == 1:
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-6)
    exact = optimizer.state[theirs]
    for name in ("exp_avg", "exp_avg_sq"):
        back = decode_moment(state, name)
        assert (back - exact[name]).norm() / exact[name].norm() < 0.12
        assert ((back - exact[name]).mean() / exact[name].mean()).abs() < 0.01
    moved, wanted = mine - start, theirs.detach() - start
    assert (moved - wanted).norm() / wanted.norm() < 0.05
    assert ((moved - wanted).mean() / wanted.mean()).abs() < 0.01


def test_second_moments_fade():
    """0.1% a step, far less than codes are apart: rounded to nearest they would stay for ever."""
    p = torch.zeros(16 * BLOCK, device=DEVICE)
    state = new_state(p)
    adamw_step(p, torch.ones_like(p), state, step=1, lr=0.0, backend=BACKEND)
    before = decode_moment(state, "exp_avg_sq").mean()
    for step in range(2, 502):
        adamw_step(p, torch.zeros_like(p), state, step=step, lr=0.0, backend=BACKEND)
    assert decode_moment(state, "exp_avg_sq").mean() / before == pytest.approx(0.999**500, rel=0.02)


def test_updates_far_below_bf16s_resolution_add_up():
    results = {}
    for stochastic in (True, False):
        p = torch.ones(64 * BLOCK, dtype=torch.bfloat16, device=DEVICE)
        state = new_state(p)
        for step in range(1, 101):
            grad = torch.ones_like(p)
            given = dict(step=step, lr=1e-5, stochastic_rounding=stochastic, backend=BACKEND)
            adamw_step(p, grad, state, **given)
        results[stochastic] = p.double().mean().item()
    assert results[False] == 1.0
    assert results[True] == pytest.approx(1 - 100 * 1e-5, abs=1e-4)


def test_what_is_refused():
    p = torch.zeros(4, 4)
    for argument, change, message in (
        (TypeError, dict(parameter=p.half()), "parameter: expected torch.bfloat16 or torch.float32, got torch.float16"),
        (TypeError, dict(grad=p.double()), "grad: expected .* got torch.float64"),
        (ValueError, dict(parameter=p[:, :2], grad=p[:, :2]), "parameter: expected a contiguous tensor"),
        (ValueError, dict(grad=p[0]), r"grad: expected the shape \(4, 4\), got \(4,\)"),
        (ValueError, dict(step=0), "step: expected >= 1, got 0"),
        (ValueError, dict(backend="cuda"), "backend: expected"),
    ):
        given = dict(parameter=p, grad=p, state=new_state(p), step=1, lr=0.1) | change
        with pytest.raises(argument, match=message):
            adamw_step(**given)


def test_a_named_backend_is_not_replaced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = torch.zeros(4)
    with pytest.raises(RuntimeError, match='backend="triton": expected Triton and parameter on a CUDA device'):
        adamw_step(p, p, new_state(p), step=1, lr=0.1, backend="triton")


def test_a_graph_that_needs_the_old_weights_notices():
    w = torch.ones(8, 8, requires_grad=True)
    loss = (w * w).sum()
    adamw_step(w, torch.ones(8, 8), new_state(w), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
