"""Adapters on the experts against fp64 and against W + BA, over dense and packed weights."""

import pytest
import torch

from gptoss_kernels import fused_experts
from gptoss_kernels.experts.reference import ExpertsLoRA
from gptoss_kernels.mxfp4.packed import PackedExperts
from gptoss_kernels.mxfp4.reference import dequantize, quantize
from gptoss_kernels.testing import ExpertsCase, relative_error

from .test_experts import DEVICE, LIMITS, gradient_of

DTYPES = [torch.float32] + [torch.bfloat16] * torch.cuda.is_available()
NAMES = ("y", "dx", "drouting_weights", "da1", "db1", "da2", "db2")


def draw(case: ExpertsCase, rank: int, dtype: torch.dtype = torch.float32):
    """(inputs, indices, factors): the layer's, with MXFP4 numbers for weights, and the adapters' a1, b1, a2, b2."""
    inputs, indices = case.inputs(DEVICE)
    inputs = [x.detach() for x in inputs]
    for i in (1, 3):
        inputs[i] = dequantize(*quantize(inputs[i]), case.dtype)
    generator = torch.Generator(DEVICE).manual_seed(2)
    shapes = [(rank, case.hidden), (2 * case.intermediate, rank), (rank, case.intermediate), (case.hidden, rank)]
    factors = [
        torch.randn(case.experts, *shape, device=DEVICE, generator=generator).div_(shape[1] ** 0.5).to(dtype)
        for shape in shapes
    ]
    return inputs, indices, factors


def run(inputs, indices, factors, grad, backend="triton", which=(True, True)):
    """[y, gradients of x, the routing weights and the factors]; 0 for a factor that is not used."""
    x, *parameters, weights = inputs
    leaves = [t.clone().requires_grad_() for t in (x, weights, *factors)]
    x, weights, a1, b1, a2, b2 = leaves
    loras = ExpertsLoRA(a1, b1, 0.7), ExpertsLoRA(a2, b2, 1.3)
    given = {n: lora for n, lora, use in zip(("gate_up_lora", "down_lora"), loras, which, strict=True) if use}
    y = fused_experts(x, *parameters, indices, weights, backend=backend, **given)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "routing", "which"),
    [
        (8, "random", (True, True)),
        (3, "sentinel", (True, True)),
        (16, "one", (True, False)),
        (1, "random", (False, True)),
    ],
)
def test_against_fp64(rank, routing, which, dtype):
    case = ExpertsCase(tokens=11, hidden=32, intermediate=64, experts=3, routing=routing, dtype=dtype)
    inputs, indices, factors = draw(case, rank)
    grad = gradient_of(case)
    got = run(inputs, indices, factors, grad, which=which)
    doubles = [t.double() for t in inputs], [t.double() for t in factors]
    want = run(doubles[0], indices, doubles[1], grad.double(), "reference", which)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape
        if b.norm() == 0:
            assert (a == 0).all(), name
        else:
            assert relative_error(a, b) <= LIMITS[dtype], name


def test_reference_is_the_weight_plus_its_change():
    case = ExpertsCase(tokens=5, hidden=32, intermediate=32, experts=3)
    inputs, indices, (a1, b1, a2, b2) = draw(case, 4)
    x, w1, c1, w2, c2, weights = (t.double() for t in inputs)
    a1, b1, a2, b2 = (t.double() for t in (a1, b1, a2, b2))
    got = fused_experts(
        x, w1, c1, w2, c2, indices, weights,
        gate_up_lora=ExpertsLoRA(a1, b1, 0.7), down_lora=ExpertsLoRA(a2, b2, 1.3), backend="reference",
    )  # fmt: skip
    changed = w1 + 0.7 * (b1 @ a1).mT, c1, w2 + 1.3 * (b2 @ a2).mT, c2
    torch.testing.assert_close(got, fused_experts(x, *changed, indices, weights, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_bitwise(dtype):
    case = ExpertsCase(tokens=7, hidden=32, intermediate=32, experts=3, dtype=dtype)
    inputs, indices, factors = draw(case, 4)
    packed = [PackedExperts(*quantize(x)) if i in (1, 3) else x for i, x in enumerate(inputs)]
    grad = gradient_of(case)
    for got, want in zip(run(packed, indices, factors, grad), run(inputs, indices, factors, grad), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_up_lora": 3}, TypeError, r"gate_up_lora: expected ExpertsLoRA\(a, b, scaling\), got int"),
        (
            {"down_lora": ExpertsLoRA(torch.ones(5, 4, 24), torch.ones(5, 24, 4), 1.0)},
            ValueError,
            r"down_lora: expected a \(5, rank, 40\) and b \(5, 24, rank\), got \(5, 4, 24\) and \(5, 24, 4\)",
        ),
        (
            {"down_lora": ExpertsLoRA(torch.ones(5, 0, 40), torch.ones(5, 24, 0), 1.0)},
            ValueError,
            r"down_lora: expected a \(5, rank, 40\)",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    inputs, indices = ExpertsCase().inputs()
    x, *parameters, weights = (t.detach() for t in inputs)
    with pytest.raises(error, match=message):
        fused_experts(x, *parameters, indices, weights, **change)


def test_trained_weights_beside_adapters_are_refused():
    inputs, indices = ExpertsCase().inputs()
    *leading, weights = inputs
    lora = ExpertsLoRA(torch.ones(5, 4, 40), torch.ones(5, 24, 4), 1.0)
    with pytest.raises(ValueError, match="gate_up_proj: expected frozen parameters"):
        fused_experts(*leading, indices, weights, down_lora=lora)


@pytest.mark.parametrize("adapted", [True, False])
def test_many_tokens_pass_in_parts(monkeypatch, adapted):
    from gptoss_kernels.experts import api, routing

    case = ExpertsCase(tokens=11, hidden=32, intermediate=64, experts=3, routing="sentinel")
    inputs, indices, factors = draw(case, 8)
    which, grad = (adapted, adapted), gradient_of(case)
    whole = run(inputs, indices, factors, grad, which=which)
    sizes = []
    product = routing.grouped_product
    for name in ("lora", "autograd"):
        monkeypatch.setattr(
            f"gptoss_kernels.experts.{name}.grouped_product",
            lambda rows, *rest: sizes.append(len(rows)) or product(rows, *rest),
        )
    monkeypatch.setattr(api, "CHUNK", 4)
    parts = run(inputs, indices, factors, grad, which=which)
    assert set(sizes) == {4 * case.top_k, 3 * case.top_k}
    for name, got, want in zip(NAMES, parts, whole, strict=True):
        assert not want.any() or relative_error(got, want) <= 1e-6, name

    sizes.clear()  # gradients of trained weights are as large as the weights: one pass, one gradient
    x, w1, *rest, weights = inputs
    fused_experts(x, w1.clone().requires_grad_(), *rest, indices, weights).sum().backward()
    assert set(sizes) == {11 * case.top_k}
