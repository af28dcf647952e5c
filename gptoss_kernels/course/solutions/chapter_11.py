"""Chapter 11, full finetuning: 8-bit blocks, stochastic rounding, steps in the backward pass, reduce-scatter."""

from collections.abc import Callable, Iterable, Sequence

import torch

from ..check import Mistake

# ---------------------------------------------------------------------------------------------- quantize_blocks


def quantize_blocks(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n,) fp32, n a multiple of size -> codes (n,) int8, scales (n / size,) fp32; x is near codes * its scale."""
    blocks = x.view(-1, size)
    scales = blocks.abs().amax(1) / 127
    codes = torch.round(blocks / scales.clamp(min=1e-38)[:, None])
    return codes.to(torch.int8).view(-1), scales


def check_quantize_blocks(function: Callable) -> None:
    size = 32
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 1e-4, 30.0, 1e-6, 1.0, 1.0])[:, None]
    x[4] = -x[4].abs()
    x[4, 3] = -9.0  # the largest in size is negative
    _check_quantized(function, x, size)
    x[5] = 0.0
    _check_quantized(function, x, size)


def _check_quantized(function: Callable, x: torch.Tensor, size: int) -> None:
    given = x.flatten().clone()
    got = function(given, size)
    if not torch.equal(given, x.flatten()):
        raise Mistake("x has changed: leave what was handed in as it is")
    if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, torch.Tensor) for part in got):
        raise Mistake(f"expected two tensors, codes and scales, got {type(got).__name__}")
    codes, scales = got
    if codes.dtype != torch.int8:
        raise Mistake(f"codes: expected torch.int8, got {codes.dtype}")
    if codes.shape != given.shape:
        raise Mistake(f"codes: expected the shape of x, {tuple(given.shape)}, got {tuple(codes.shape)}")
    if scales.numel() == 1:
        raise Mistake("there is one scale for all of x: each block has its own")
    if scales.numel() == size != len(x):
        raise Mistake("there is a scale for each place in a block: take the maximum over a block, not over blocks")
    if scales.numel() != len(x):
        raise Mistake(f"scales: expected one a block, {len(x)}, got {scales.numel()}")
    if scales.shape != (len(x),):
        raise Mistake(f"scales: expected the shape ({len(x)},), got {tuple(scales.shape)}")
    scales = scales.float()
    largest = x.abs().amax(1)
    if not scales.isfinite().all():
        raise Mistake("a scale is not a finite number")
    known = {
        "a scale is the largest magnitude of its block: the largest value may be a small one, or negative": (
            x.amax(1) / 127
        ),
        "divide by 127: with 128 the largest number gets a code that int8 does not have": largest / 128,
        "int8 goes from -127 to 127, with a sign: that is a scale for 256 steps without one": largest / 255,
        "that scale maps the largest number to 1: it should get the code 127": largest,
        "the scale is upside down: a number is code * scale": 127 / largest,
    }
    if not torch.allclose(scales, largest / 127, rtol=1e-5, atol=0):
        for message, wrong in known.items():
            if torch.allclose(scales, wrong, rtol=1e-5, atol=0):
                raise Mistake(message)
        block = (~torch.isclose(scales, largest / 127, rtol=1e-5, atol=0)).nonzero()[0].item()
        raise Mistake(f"scales: block {block} expected {largest[block] / 127:.4g}, got {scales[block]:.4g}")
    error = (codes.view_as(x) * scales[:, None] - x).abs()
    empty = largest == 0
    if (codes.view_as(x)[empty] != 0).any():
        raise Mistake("a block of zeros: dividing by its scale, zero, is not a number; its codes should be 0")
    worst = (error[~empty] / scales[~empty, None]).max().item()
    if worst > 0.501:
        kind = "that cuts off the fraction: round to the nearest code" if worst < 1.001 else "the codes are wrong"
        raise Mistake(f"codes * scales differs from x by up to {worst:.2f} scales; half is right; {kind}")


# ----------------------------------------------------------------------------------------- round_stochastically


def round_stochastically(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """x fp32, random int32 from 0 to 65535 of the same shape -> bf16, up or down so that x is kept on average."""
    bits = x.view(torch.int32) + random
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def check_round_stochastically(function: Callable) -> None:
    outcomes = []  # value, share of results away from zero, share that keeps the value
    every = torch.arange(65536, dtype=torch.int32)[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for value in (1.0, 1.001, -0.73, 3.9999, -1e-5, 0.0):
        number = torch.tensor(value)
        x, random = number.expand(65536).contiguous(), every.clone()
        got = function(x, random)
        if not (torch.equal(x, number.expand(65536)) and torch.equal(random, every)):
            raise Mistake("what was handed in has changed: make a new tensor")
        if not isinstance(got, torch.Tensor) or got.shape != x.shape:
            raise Mistake("expected a tensor of the shape of x")
        if got.dtype != torch.bfloat16:
            raise Mistake(f"expected torch.bfloat16, got {got.dtype}")
        if not torch.equal(got, function(x.clone(), random.clone())):
            raise Mistake("two calls with the same random numbers differ: use `random`, and no other source")
        low = (number.view(torch.int32) & -65536).view(torch.float32).item()  # the neighbour nearer to zero
        high = ((number.view(torch.int32) & -65536) + 65536).view(torch.float32).item()
        exact = number.item() == low
        found = got.double()
        if exact and (found != low).any():
            raise Mistake(f"{value} is a bf16 number and must stay as it is")
        if not ((found == low) | (found == high)).all():
            raise Mistake(f"{value} lies between {low:.6g} and {high:.6g}, and must become one of the two")
        if exact:
            continue
        outcomes.append((value, (found == high).double().mean().item(), (number.item() - low) / (high - low)))
    wrong = [outcome for outcome in outcomes if abs(outcome[1] - outcome[2]) > 2 / 65536]
    if not wrong:
        return
    known = {
        "that rounds to nearest: the random numbers change nothing": lambda right: round(right),
        "that cuts off: always toward zero": lambda right: 0,
        "that is always away from zero": lambda right: 1,
        "up or down by even chances: it should depend on how near the two are": lambda right: 0.5,
        "the chances are exchanged: the nearer neighbour is the likelier one": lambda right: 1 - right,
    }
    for message, mistake in known.items():
        if all(abs(share - mistake(right)) <= 2 / 65536 for _, share, right in outcomes):
            raise Mistake(message)
    value, share, right = wrong[0]
    raise Mistake(
        f"{value} goes away from zero in {share:.1%} of all cases; on average it stays with {right:.1%}. Are the low "
        "16 bits cut off before the conversion to bf16, which rounds, too?"
    )


# --------------------------------------------------------------------------------------------- step_in_backward


def step_in_backward(parameters: Iterable[torch.Tensor], step: Callable[[torch.Tensor], None]) -> list:
    """From now on each backward pass calls step(p) as soon as p.grad is complete, and frees it -> the handles."""

    def hook(p):
        step(p)
        p.grad = None

    return [p.register_post_accumulate_grad_hook(hook) for p in parameters if p.requires_grad]


def check_step_in_backward(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    frozen = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def loss():
        y = (x @ weights[0]).tanh() @ frozen
        return ((y @ weights[1]).tanh() @ weights[1] @ weights[2]).square().sum()  # weights[1] is used twice

    right = torch.autograd.grad(loss(), weights)
    steps = []

    def step(p):
        place = next((i for i, w in enumerate(weights) if w is p), None)
        if place is None:
            raise Mistake("step was called with something that is none of the parameters: call step(p)")
        if p.grad is None and any(place == earlier for earlier, _, _ in steps):
            raise Mistake(
                "a parameter was stepped again when its gradient was gone: a lambda in a loop sees the loop's last "
                "value; the hook gets its own parameter as its argument"
            )
        if p.grad is None:
            raise Mistake(
                "step was called when p.grad was not there (yet): take register_post_accumulate_grad_hook, and free "
                "the gradient after the step"
            )
        alive = [i for i, w in enumerate(weights) if w.grad is not None]
        steps.append((place, p.grad.clone(), alive))
        with torch.no_grad():
            p -= 0.1 * p.grad  # what a step does: later gradients must not depend on it

    handles = function(iter([weights[0], frozen, weights[1], weights[2]]), step)
    if steps:
        raise Mistake("step was called before any backward pass: hand over a function that calls it")
    loss().backward()
    places = [place for place, _, _ in steps]
    if not steps:
        raise Mistake("a backward pass ran, and step was not called")
    if len(places) > 1 and set(places) == {2}:
        raise Mistake(
            "every hook stepped the last parameter: a lambda in a loop sees the loop's last value; the hook gets its "
            "own parameter as its argument"
        )
    if sorted(places) != [0, 1, 2]:
        raise Mistake(f"expected one step of each of the three trained parameters, got steps of {places}")
    if not all(torch.allclose(grad, right[place]) for place, grad, _ in steps):
        raise Mistake("a step saw a gradient that was not complete, or not the parameter's own")
    left = [place for place in range(3) if weights[place].grad is not None]
    if left and all(not weights[place].grad.any() for place in left):
        raise Mistake("the gradients are zeroed, and still take their memory: set p.grad to None")
    if left or max(len(alive) for _, _, alive in steps) > 1:
        raise Mistake("gradients are still there after their step: set p.grad to None in the hook")
    if not isinstance(handles, (list, tuple)) or len(handles) != 3 or not all(hasattr(h, "remove") for h in handles):
        raise Mistake("return the list of the handles that registering gave, one a trained parameter")
    for handle in handles:
        handle.remove()
    loss().backward()
    if len(steps) != 3:
        raise Mistake("after the handles were removed, a backward pass still stepped")


# ----------------------------------------------------------------------------------------------- reduce_scatter


def reduce_scatter(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A gradient (n,) of each of N processes -> for each the part (ceil(n / N),) of their mean that it owns.

    The last part is filled up with zeros.
    """
    processes = len(gradients)
    mean = torch.stack(list(gradients)).mean(0)
    mean = torch.nn.functional.pad(mean, (0, -len(mean) % processes))
    return list(mean.chunk(processes))


def check_reduce_scatter(function: Callable) -> None:
    for processes, count in ((2, 6), (3, 9), (2, 7), (4, 9), (1, 5)):
        gradients = torch.randn(processes, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
        given = [gradient.clone() for gradient in gradients]
        got = function(given)
        where = f"{processes} processes, {count} numbers"
        if not all(map(torch.equal, given, gradients)):
            raise Mistake(f"{where}: the gradients have changed; make new tensors")
        if isinstance(got, torch.Tensor):
            got = list(got)
        if not isinstance(got, (list, tuple)) or not all(isinstance(part, torch.Tensor) for part in got):
            raise Mistake(f"{where}: expected a list with a tensor for each process, got {type(got).__name__}")
        if len(got) != processes:
            raise Mistake(f"{where}: expected {processes} parts, got {len(got)}")
        right = reduce_scatter(list(gradients))
        sizes = {tuple(part.shape) for part in got}
        size = len(right[0])
        if sizes == {(count,)} and processes > 1:
            raise Mistake(f"{where}: each process got everything, which is an all-reduce: it keeps its own part only")
        if sizes != {(size,)}:
            raise Mistake(
                f"{where}: expected {size} numbers for each process (the last part filled up with zeros), got shapes "
                f"{[tuple(part.shape) for part in got]}"
            )
        pad = torch.nn.functional.pad(gradients, (0, processes * size - count))
        own = [pad[rank, rank * size :][:size] for rank in range(processes)]
        known = {
            "that is the sum: the processes' gradients are averaged": [processes * part for part in right],
            "each part comes from one process alone: average over the processes first": own,
            "the parts are in the wrong order: process 0 has the first": right[::-1],
            "the numbers are dealt out like cards: each process owns neighbours": list(
                pad.mean(0).view(size, processes).T
            ),
            "the mean was divided by the number of processes again": [part / processes for part in right],
        }
        if all(torch.allclose(a, b) for a, b in zip(got, right, strict=True)):
            continue
        for message, wrong in known.items():
            if all(torch.allclose(a, b) for a, b in zip(got, wrong, strict=True)):
                raise Mistake(f"{where}: {message}")
        rank = next(r for r in range(processes) if not torch.allclose(got[r], right[r]))
        if count % processes and torch.allclose(got[rank][: count - rank * size], right[rank][: count - rank * size]):
            raise Mistake(f"{where}: what fills the last part up should be zeros")
        raise Mistake(
            f"{where}: process {rank} expected {right[rank][:2].tolist()}, …, got {got[rank][:2].tolist()}, …"
        )
