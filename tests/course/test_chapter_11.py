"""Wrong attempts at chapter 11's exercises get the message that names them; other ways to be right are accepted."""

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_11


def rejected(function, name, message):
    def attempt(*given):
        return function(*given)

    attempt.__name__ = name
    with pytest.raises(check.Mistake, match=message):
        check.attempt(attempt, chapter=11, strict=True)


def accepted(function, name):
    function.__name__ = name
    assert check.attempt(function, chapter=11, strict=True) is function


@pytest.mark.parametrize("name", ["quantize_blocks", "round_stochastically", "step_in_backward", "reduce_scatter"])
def test_the_solution_is_accepted(name):
    accepted(getattr(chapter_11, name), name)


# ---------------------------------------------------------------------------------------------- quantize_blocks


def blocks_of(x, size):
    return x.view(-1, size)


def quantized(x, size, scales, shape=(-1, 1), rounding=torch.round):
    codes = rounding(blocks_of(x, size) / scales.clamp(min=1e-38).view(shape))
    return codes.to(torch.int8).view(-1), scales


def test_quantize_blocks_in_a_loop():
    def attempt(x, size):
        codes, scales = [], []
        for block in x.split(size):
            scale = max(block.max().item(), -block.min().item()) / 127
            scales.append(scale)
            codes.append((block / scale).round() if scale else torch.zeros_like(block))
        return torch.cat(codes).to(torch.int8), torch.tensor(scales)

    accepted(attempt, "quantize_blocks")


def in_place(x, size):
    result = chapter_11.quantize_blocks(x, size)
    x /= 2
    return result


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, n: quantized(x, n, x.abs().max()[None] / 127), "one scale for all"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(0) / 127, (1, -1)), "over a block, not over blocks"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).amax(1) / 127), "largest magnitude"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1) / 128), "with 128"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1) / 255), "256 steps without"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1)), "maps the largest number to 1"),
        (lambda x, n: (chapter_11.quantize_blocks(x, n)[0], 127 / blocks_of(x, n).abs().amax(1)), "upside down|finite"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1) / 127, rounding=torch.trunc), "cuts off"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1) / 127, rounding=torch.abs), "codes are wrong"),
        (lambda x, n: (chapter_11.quantize_blocks(x, n)[0].float(), chapter_11.quantize_blocks(x, n)[1]), "torch.int8"),
        (lambda x, n: chapter_11.quantize_blocks(x, n)[0], "expected two tensors"),
        (lambda x, n: chapter_11.quantize_blocks(x, n // 2), "expected one a block"),
        (lambda x, n: quantized(x, n, blocks_of(x, n).abs().amax(1, keepdim=True) / 127), r"the shape \(6,\)"),
        (in_place, "has changed"),
    ],
)
def test_quantize_blocks(wrong, message):
    rejected(wrong, "quantize_blocks", message)


def test_quantize_blocks_of_zeros():
    def attempt(x, size):
        codes, scales = chapter_11.quantize_blocks(x, size)
        return codes.view(-1, size).masked_fill((scales == 0)[:, None], 1).view(-1), scales

    rejected(attempt, "quantize_blocks", "a block of zeros")


# ----------------------------------------------------------------------------------------- round_stochastically


def neighbours(x):
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    return low, ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)


def test_round_stochastically_by_comparison():
    def attempt(x, random):
        low, high = neighbours(x)
        up = random < (x - low) / (high - low) * 65536
        return torch.where(up, high, low).to(torch.bfloat16)

    accepted(attempt, "round_stochastically")


def chances(probability):
    def attempt(x, random):
        low, high = neighbours(x)
        return torch.where(random < probability(x, low, high) * 65536, high, low).to(torch.bfloat16)

    return attempt


def no_generator(x, random):
    return chapter_11.round_stochastically(x, torch.randint(0, 65536, x.shape, dtype=torch.int32))


def overwrites(x, random):
    random += x.view(torch.int32)
    return (random & -65536).view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, r: x.to(torch.bfloat16), "rounds to nearest"),
        (lambda x, r: neighbours(x)[0].to(torch.bfloat16), "toward zero"),
        (lambda x, r: neighbours(x)[1].to(torch.bfloat16), "must stay as it is"),
        (chances(lambda x, low, high: torch.where(x == low, 0.0, 1.0)), "away from zero"),
        (chances(lambda x, low, high: torch.where(x == low, 0.0, 0.5)), "even chances"),
        (chances(lambda x, low, high: torch.where(x == low, 0.0, (high - x) / (high - low))), "exchanged"),
        (chances(lambda x, low, high: ((x - low) / (high - low)) ** 2), "on average it stays with"),
        (lambda x, r: (x.view(torch.int32) + r).view(torch.float32).to(torch.bfloat16), "must stay|one of the two"),
        (lambda x, r: ((x.view(torch.int32) + r) & -65536).view(torch.float32), "expected torch.bfloat16"),
        (lambda x, r: (x + r / 65536).to(torch.bfloat16), "must stay|one of the two"),
        (lambda x, r: ((x.view(torch.int32) + r) & -65536).float().to(torch.bfloat16), "must stay|one of the two"),
        (no_generator, "no other source"),
        (overwrites, "has changed"),
    ],
)
def test_round_stochastically(wrong, message):
    rejected(wrong, "round_stochastically", message)


# --------------------------------------------------------------------------------------------- step_in_backward


def test_step_in_backward_with_a_hook_each():
    def attempt(parameters, step):
        handles = []
        for p in parameters:
            if not p.requires_grad:
                continue

            def hook(own):
                step(own)
                own.grad = None

            handles.append(p.register_post_accumulate_grad_hook(hook))
        return handles

    accepted(attempt, "step_in_backward")


def hooking(hook, register=torch.Tensor.register_post_accumulate_grad_hook, result=lambda handles: handles):
    """An attempt that registers hook(p, step) for each trained parameter."""
    return lambda parameters, step: result(
        [register(p, lambda own: hook(own, step)) for p in parameters if p.requires_grad]
    )


def step_and_free(p, step):
    step(p)
    p.grad = None


def free_first(p, step):
    p.grad = None
    step(p)


def step_and_zero(p, step):
    step(p)
    p.grad.zero_()


def the_loops_last(parameters, step):
    handles = []
    for p in [p for p in parameters if p.requires_grad]:
        handles.append(p.register_post_accumulate_grad_hook(lambda _: step_and_free(p, step)))  # noqa: B023
    return handles


def the_loops_last_and_kept(parameters, step):
    parameters = [p for p in parameters if p.requires_grad]
    return [p.register_post_accumulate_grad_hook(lambda _: step(parameters[-1])) for p in parameters]


def first_alone(parameters, step):
    return hooking(step_and_free)(list(parameters)[:1], step)


def twice(p, step):
    step(p)
    step(p)
    p.grad = None


def forgets_handles(parameters, step):
    hooking(step_and_free)(parameters, step)
    return [torch.nn.Linear(1, 1).weight.register_hook(print) for _ in range(3)]


def at_once(parameters, step):
    for p in parameters:
        p.grad = torch.zeros_like(p)
        step(p)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (hooking(lambda p, step: step(p)), "set p.grad to None"),
        (hooking(step_and_zero), "are zeroed"),
        (hooking(free_first), "was not there"),
        (hooking(step_and_free, torch.Tensor.register_hook), "none of the parameters"),
        (the_loops_last, "a lambda in a loop"),
        (the_loops_last_and_kept, "stepped the last parameter"),
        (first_alone, "expected one step of each"),
        (hooking(twice), "expected one step of each"),
        (hooking(lambda p, step: step(p.grad)), "none of the parameters"),
        (hooking(lambda p, step: setattr(p, "grad", None)), "step was not called"),
        (hooking(step_and_free, result=lambda handles: None), "return the list"),
        (forgets_handles, "still stepped"),
        (at_once, "before any backward|none of the parameters"),
    ],
)
def test_step_in_backward(wrong, message):
    rejected(wrong, "step_in_backward", message)


# ----------------------------------------------------------------------------------------------- reduce_scatter


def test_reduce_scatter_of_parts():
    def attempt(gradients):
        processes, size = len(gradients), -(-len(gradients[0]) // len(gradients))
        parts = []
        for rank in range(processes):
            part = sum(g[rank * size : (rank + 1) * size] for g in gradients) / processes
            parts.append(torch.cat([part, part.new_zeros(size - len(part))]))
        return parts

    accepted(attempt, "reduce_scatter")


def padded(gradients):
    gradients = torch.stack(list(gradients))
    return torch.nn.functional.pad(gradients, (0, -gradients.shape[1] % len(gradients)))


def filled(gradients):
    parts = chapter_11.reduce_scatter(gradients)
    missing = len(gradients) * len(parts[0]) - len(gradients[0])
    parts = [part.clone() for part in parts]
    if missing:
        parts[-1][-missing:] = 9.0
    return parts


def adds_up_in_place(gradients):
    for gradient in gradients[1:]:
        gradients[0] += gradient
    return chapter_11.reduce_scatter([gradients[0] / len(gradients)] * len(gradients))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: list(padded(g).sum(0).chunk(len(g))), "that is the sum"),
        (lambda g: [padded(g).mean(0)] * len(g), "all-reduce|expected"),
        (lambda g: [torch.stack(g).mean(0)] * len(g), "all-reduce"),
        (lambda g: list(torch.stack(g).mean(0).chunk(len(g))), "filled up with zeros"),
        (lambda g: [padded(g)[r].chunk(len(g))[r] for r in range(len(g))], "one process alone"),
        (lambda g: chapter_11.reduce_scatter(g)[::-1], "wrong order"),
        (lambda g: list(padded(g).mean(0).view(-1, len(g)).T), "dealt out like cards"),
        (lambda g: [part / len(g) for part in chapter_11.reduce_scatter(g)], "again"),
        (lambda g: chapter_11.reduce_scatter(g)[0], "parts|a tensor for each"),
        (lambda g: padded(g).mean(0).chunk(len(g))[:1], "expected 2 parts"),
        (filled, "should be zeros"),
        (adds_up_in_place, "have changed"),
    ],
)
def test_reduce_scatter(wrong, message):
    rejected(wrong, "reduce_scatter", message)
