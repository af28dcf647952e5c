"""What only a GPU shows of the experts: bf16 at gpt-oss's shapes against fp64, no synchronisation, memory.

Prints its error table with `pytest -m gpu -s`.
"""

import pytest
import torch

from gptoss_kernels import fused_experts
from gptoss_kernels.experts.reference import experts_reference
from gptoss_kernels.testing import ExpertsCase, relative_error

from .test_experts import NAMES, exact, gradient_of, run

pytestmark = pytest.mark.gpu

GPT_OSS = dict(hidden=2880, intermediate=2880, dtype=torch.bfloat16, top_k=4, size=0.5)


@pytest.mark.parametrize(
    "case",
    [
        ExpertsCase(tokens=512, experts=32, **GPT_OSS),
        # Rounding moves values across the clamp, where the gradient jumps: for eager arithmetic as for ours.
        ExpertsCase(tokens=512, experts=32, **GPT_OSS | {"size": 3.0}),
        ExpertsCase(tokens=257, experts=32, routing="sentinel", **GPT_OSS),
        ExpertsCase(tokens=130, experts=16, routing="one", **GPT_OSS | {"top_k": 1}),
        ExpertsCase(tokens=1, experts=32, **GPT_OSS),
        ExpertsCase(tokens=64, experts=128, **GPT_OSS | {"intermediate": 320}),
    ],
    ids=str,
)
def test_relative_error_in_bfloat16(case):
    inputs, indices = case.inputs("cuda")
    grad = gradient_of(case)
    got, want = run(inputs, indices, grad), exact(inputs, indices, grad)
    errors = {name: relative_error(a, b) for name, a, b in zip(NAMES, got, want, strict=True) if b.norm() > 0}
    print(f"\n{case}: " + "  ".join(f"{name} {error:.2e}" for name, error in errors.items()), end="")
    # No worse than twice what plain PyTorch makes of bf16 parameters in bf16 arithmetic, measured beside it.
    eager = [x.detach().requires_grad_() for x in inputs]
    y = _eager(*eager[:5], indices, eager[5])
    yardstick = [y.detach(), *torch.autograd.grad(y, eager, grad)]
    for name, plain, b in zip(NAMES, yardstick, want, strict=True):
        if b.norm() > 0:
            assert errors[name] <= 2 * relative_error(plain, b) + torch.finfo(torch.bfloat16).eps, name


def _eager(x, w1, b1, w2, b2, indices, weights):
    """experts_reference in the inputs' own dtype, token by token and choice by choice as an eager loop would."""
    out = torch.zeros_like(x)
    for expert in range(w1.shape[0]):
        token, choice = torch.where(indices == expert)
        hidden = x[token] @ w1[expert] + b1[expert]
        gate, up = hidden[:, 0::2].clamp(max=7.0), hidden[:, 1::2].clamp(-7.0, 7.0)
        act = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        out = out.index_add(0, token, (act @ w2[expert] + b2[expert]) * weights[token, choice, None])
    return out


def test_no_synchronisation_and_bitwise_the_same():
    case = ExpertsCase(tokens=300, experts=32, **GPT_OSS | {"intermediate": 640})
    inputs, indices = case.inputs("cuda")
    grad = gradient_of(case)
    first = run(inputs, indices, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(inputs, indices, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_offsets_beyond_int32():
    # 65,536 tokens * 8 choices * 2 * 2,880 columns = 3.0e9 elements of the pre-activation; one expert, forward only.
    tokens, hidden, intermediate = 65_536, 16, 2880
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator).bfloat16()  # noqa: E731
    parameters = (draw(1, hidden, 2 * intermediate) / 4, draw(1, 2 * intermediate), draw(1, intermediate, hidden) / 54)
    parameters += (draw(1, hidden),)
    x = draw(tokens, hidden)
    indices = torch.zeros(tokens, 8, dtype=torch.int64, device="cuda")
    weights = torch.full((tokens, 8), 1 / 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = fused_experts(x, *parameters, indices, weights, backend="triton")
        want = experts_reference(x[-64:].double(), *(p.double() for p in parameters), indices[-64:], weights[-64:])
    assert relative_error(y[-64:], want) <= 1e-2


def test_weights_that_begin_anywhere():
    """Parameters that ZeRO-3 gathered begin where the one before ended, which TMA cannot read."""
    case = ExpertsCase(tokens=64, experts=8, hidden=128, intermediate=64, dtype=torch.bfloat16)
    inputs, indices = case.inputs("cuda")

    def shifted(x):
        buffer = x.new_empty(x.numel() + 1)
        return buffer[1:].view_as(x).copy_(x.detach()).requires_grad_()

    grad = gradient_of(case)
    moved = [shifted(x) for x in inputs]
    assert all(x.data_ptr() % 16 for x in moved)
    for one, other in zip(run(inputs, indices, grad), run(moved, indices, grad), strict=True):
        assert torch.equal(one, other)
