"""AdamW8bit: in the backward pass or after it, with accumulation, schedules, groups and resumption the same steps."""

import copy
import io
import random

import pytest
import torch

from gptoss_kernels.finetune.host_moments import HostMoments
from gptoss_kernels.finetune.optimizer import AdamW8bit


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Tanh(),
                                torch.nn.Linear(64, 50)).to(dtype)  # fmt: skip
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others}]
    return model, AdamW8bit(groups, **(dict(lr=1e-2, min_size=1000, seed=4) | options))


def loss_of(model, number):
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(number))
    return torch.nn.functional.cross_entropy(model(ids).float(), (7 * ids + 3) % 50)


def steps(model, optimizer, numbers, micro=1, scheduler=None):
    losses = []
    for number in numbers:
        for part in range(micro):
            optimizer.accumulating = part < micro - 1
            loss = loss_of(model, number * 10 + part) / micro
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_backward_pass_as_after_it(dtype, micro):
    (a, kept), (b, early) = make(dtype), make(dtype, in_backward=True)
    assert steps(a, kept, range(8), micro) == steps(b, early, range(8), micro)
    assert same(a, b)


def test_a_gradient_is_gone_before_the_next_is_there():
    model, optimizer = make(in_backward=True)
    alive = []
    for p in model.parameters():
        hook = lambda p: alive.append(sum(q.grad is not None and q.numel() >= 1000 for q in model.parameters()))  # noqa: E731
        p.register_post_accumulate_grad_hook(hook)
    loss_of(model, 0).backward()
    assert alive == [0] * 5
    assert [p.grad is None for p in model.parameters()] == [p.numel() >= 1000 for p in model.parameters()]


def test_the_gradients_norm_is_known_though_they_are_gone():
    model, optimizer = make(in_backward=True)
    other, kept = make()
    for each in (model, other):
        loss_of(each, 0).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    torch.testing.assert_close(optimizer.grad_norm(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.grad_norm(), want, rtol=1e-6, atol=0)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0


def test_it_trains_as_adamw_does():
    """Small tensors to rounding, large ones closely; weight decay by group; learning rates by a schedule."""
    (mine, optimizer), (theirs, _) = make(in_backward=True), make()
    exact = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=1e-2
    )  # fmt: skip
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 10) for o in (optimizer, exact)]
    start = copy.deepcopy(mine)
    losses = []
    for model, each, schedule in ((mine, optimizer, schedules[0]), (theirs, exact, schedules[1])):
        losses.append(steps(model, each, range(30), scheduler=schedule))
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.03)
    for p, q, s in zip(mine.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.1 * (q - s).norm()


def test_small_tensors_are_trained_in_fp32():
    """A bf16 bias moves by less than its resolution, step by step, and arrives."""
    p = torch.nn.Parameter(torch.full((8,), 1.0, dtype=torch.bfloat16))
    optimizer = AdamW8bit([p], lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["weight"].tolist() == pytest.approx([0.99] * 8, abs=1e-5)
    assert torch.equal(p.detach(), optimizer.state[p]["weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_from_a_file_it_goes_on_bitwise(dtype):
    model, optimizer = make(dtype, in_backward=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
    steps(model, optimizer, range(4), scheduler=schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    steps(model, optimizer, range(4, 8), scheduler=schedule)

    again, other = make(dtype, seed=1, in_backward=True)
    other_schedule = torch.optim.lr_scheduler.LinearLR(other, 0.1, 1.0, 10)
    file.seek(0)
    for what, state in zip((again, other, other_schedule), torch.load(file, weights_only=True), strict=True):
        what.load_state_dict(state)
    assert {str(v.dtype) for s in other.state.values() for v in s.values() if isinstance(v, torch.Tensor)} == {
        "torch.uint8", "torch.float32"
    }  # fmt: skip
    steps(again, other, range(4, 8), scheduler=other_schedule)
    assert same(model, again)


def test_another_seed_rounds_otherwise():
    models = [make(torch.bfloat16, seed=0)[0] for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        steps(model, AdamW8bit(model.parameters(), lr=1e-3, min_size=1000, seed=seed), range(2))
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_a_step_with_two_backward_passes_must_be_told():
    model, optimizer = make(in_backward=True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="backward\\(\\) ran again before step"):
        loss_of(model, 1).backward()


def test_what_is_refused():
    with pytest.raises(TypeError, match="params: expected torch.float32 or torch.bfloat16 .*, got .*float16"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))])
    model, optimizer = make()
    steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: expected groups of \[6\] parameters, got \[3, 2\]"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(1)) for _ in range(6)]).load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict: expected moments for 1600 elements with min_size 5000, got 1600"):
        make(min_size=5000)[1].load_state_dict(state)


def test_weights_are_made_contiguous():
    p = torch.nn.Parameter(torch.randn(40, 50).T)
    optimizer = AdamW8bit([p], lr=0.1, min_size=1)
    before = p.detach().clone()
    (p * before.sign()).sum().backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.1 * before.sign())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_moments_on_the_host_give_the_same_steps(share):
    (a, kept), (b, early) = (
        make(torch.bfloat16, in_backward=True),
        make(torch.bfloat16, in_backward=True, on_host=share),
    )
    large = [p for p in b.parameters() if p.numel() >= 1000]
    assert len(early._on_host) == (len(large) if share == 1 else 1)
    assert steps(a, kept, range(5)) == steps(b, early, range(5)) and same(a, b)

    c, resumed = make(torch.bfloat16, in_backward=True, on_host=share)
    c.load_state_dict(b.state_dict())
    resumed.load_state_dict(copy.deepcopy(early.state_dict()))
    assert steps(a, kept, range(5, 8)) == steps(c, resumed, range(5, 8)) and same(a, c)


def test_parts_of_the_ring_wait_for_the_copies_out_that_they_overlap():
    host, live, waited = HostMoments(torch.device("cpu"), 1000), [], 0
    for number, size in enumerate([1000, 10, 10, 10, 1000] + [random.Random(n).randint(1, 1000) for n in range(200)]):
        start, end, waits = host._take(size)
        assert start % host.ALIGN == 0 and start + size <= end <= len(host._ring[0])
        assert waits == [other for a, b, other in live if a < end and start < b]
        assert number >= 5 or not waits, "small tensors do not hold a large one's place"
        live = [part for part in live if part[2] not in waits] + [(start, end, number)]
        host._parts.append(live[-1])
        waited += len(waits)
    assert waited > 100


def test_a_share_on_the_host_needs_the_backward_pass():
    for options in (dict(on_host=0.5), dict(on_host=1.5, in_backward=True)):
        with pytest.raises(ValueError, match="on_host: expected a share from 0 to 1, above 0 with in_backward only"):
            make(**options)
