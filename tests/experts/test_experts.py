"""The fused experts against fp64 and against Transformers' own layer, in the interpreter or, on a GPU, compiled."""

import pytest
import torch

from gptoss_kernels import fused_experts
from gptoss_kernels.experts.reference import experts_reference
from gptoss_kernels.testing import ExpertsCase, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dgate_up_proj", "dgate_up_proj_bias", "ddown_proj", "ddown_proj_bias", "drouting_weights")

CASES = [
    ExpertsCase(),
    ExpertsCase(tokens=1, top_k=1),
    ExpertsCase(tokens=3, experts=8),  # most experts have no token
    ExpertsCase(routing="one", top_k=1),
    ExpertsCase(routing="sentinel"),
    ExpertsCase(tokens=5, experts=32, top_k=8, hidden=16, intermediate=16),
    ExpertsCase(tokens=4, experts=128, top_k=4, hidden=16, intermediate=16),
    ExpertsCase(tokens=3, hidden=2880, intermediate=96, experts=2, top_k=1),
    ExpertsCase(dtype=torch.float16),
    ExpertsCase(dtype=torch.float16, routing="sentinel"),
]
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(inputs, indices, grad, backend="triton", **options):
    """[y, gradients of x, the four parameters and the routing weights]."""
    *leading, weights = inputs
    y = fused_experts(*leading, indices, weights, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def gradient_of(case):
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn(case.tokens, case.hidden, device=DEVICE, generator=generator).to(case.dtype)


def exact(inputs, indices, grad, **options):
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    return run(doubles, indices, grad.double(), "reference", **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case):
    inputs, indices = case.inputs(DEVICE)
    grad = gradient_of(case)
    for name, got, want in zip(NAMES, run(inputs, indices, grad), exact(inputs, indices, grad), strict=True):
        assert got.shape == want.shape and got.dtype == case.dtype
        if want.norm() == 0:
            assert (got == 0).all(), name
        else:
            assert relative_error(got, want) <= LIMITS[case.dtype], name


def test_the_check_has_teeth():
    # Each of these is a mistake that a port of gpt-oss has made; all are far over the limit.
    case = ExpertsCase()
    inputs, indices = case.inputs(DEVICE)
    want = exact(inputs, indices, gradient_of(case))
    for wrong in ({"alpha": 1.0}, {"limit": 1e4}):
        got = run(inputs, indices, gradient_of(case), **wrong)
        assert relative_error(got[0], want[0]) > 1e-3


def test_values_beyond_the_clamp_have_no_gradient():
    x = torch.ones(1, 1, device=DEVICE)
    up_gate = torch.tensor([[[6.5, -7.5]], [[7.5, 7.5]]], device=DEVICE)
    parameters = [up_gate, torch.zeros(2, 2, device=DEVICE), torch.ones(2, 1, 1, device=DEVICE)]
    parameters.append(torch.zeros(2, 1, device=DEVICE))
    inputs = [t.requires_grad_() for t in (x, *parameters, torch.ones(1, 2, device=DEVICE))]
    indices = torch.tensor([[0, 1]], device=DEVICE)
    for got, want in zip(
        run(inputs, indices, torch.ones_like(x)), run(inputs, indices, torch.ones_like(x), "reference"), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needed", range(6))
def test_only_what_is_needed(needed):
    # LoRA trains x and the routing weights, and freezes the experts.
    case = ExpertsCase(tokens=9)
    inputs, indices = case.inputs(DEVICE)
    grad = gradient_of(case)
    full = run(inputs, indices, grad)
    alone = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
    y = fused_experts(*alone[:5], indices, alone[5], backend="triton")
    (got,) = torch.autograd.grad(y, [alone[needed]], grad)
    assert torch.equal(got, full[1 + needed])


def test_bitwise_the_same_again():
    case = ExpertsCase(routing="sentinel")
    inputs, indices = case.inputs(DEVICE)
    first, again = (run(inputs, indices, gradient_of(case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_token_does_not_depend_on_its_neighbours():
    case = ExpertsCase(tokens=12)
    inputs, indices = case.inputs(DEVICE)
    with torch.no_grad():
        x, *parameters, weights = inputs
        together = fused_experts(x, *parameters, indices, weights, backend="triton")
        others = torch.randn_like(x)
        others[5] = x[5]
        beside_others = fused_experts(others, *parameters, indices, weights, backend="triton")
        alone = fused_experts(x[5:6], *parameters, indices[5:6], weights[5:6], backend="triton")
        by_definition = experts_reference(*(y.double() for y in (x, *parameters)), indices, weights.double())
    assert torch.equal(beside_others[5], together[5]) and not torch.equal(beside_others[4], together[4])
    # A single row is multiplied by another routine of the BLAS library, which sums in another order.
    assert relative_error(alone[0], by_definition[5]) <= LIMITS[case.dtype]


def test_grouped_products_get_aligned_operands(monkeypatch):
    from gptoss_kernels.experts import routing

    a, b, ends = torch.randn(6, 8), torch.randn(3 * 8 * 16 + 1)[1:].view(3, 8, 16), torch.tensor([1, 1, 6])
    wanted = routing.grouped_product(a, b, ends), routing.grouped_outer(a, a[:, :3], ends)
    seen = []

    def grouped_mm(x, y, offs):
        seen.extend(z.data_ptr() % 16 for z in (x, y))
        rows = zip([0, *offs[:-1].tolist()], offs.tolist(), strict=True)
        if y.dim() == 2:
            return torch.stack([x[:, i:j] @ y[i:j] for i, j in rows])
        return torch.cat([x[i:j] @ z for (i, j), z in zip(rows, y, strict=True)])

    monkeypatch.setattr(routing, "_has_grouped_mm", lambda a: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm, raising=False)
    assert b.data_ptr() % 16
    got = routing.grouped_product(a, b, ends), routing.grouped_outer(a, a[:, :3], ends)
    assert seen == [0, 0, 0, 0]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_the_sentinel_are_never_read():
    from gptoss_kernels.experts.backward import launch_activation_backward
    from gptoss_kernels.experts.forward import launch_activation, launch_combine
    from gptoss_kernels.experts.routing import route

    case = ExpertsCase(routing="sentinel")
    inputs, indices = case.inputs(DEVICE)
    _, _, b1, _, b2, weights = (x.detach() for x in inputs)
    routing = route(indices, case.experts)
    skipped = routing.expert >= case.experts
    assert skipped.any() and skipped[int(routing.ends[-1]) :].all()
    # Rows of the sentinel are what the grouped product leaves undefined.
    rows = case.tokens * case.top_k
    hidden = torch.randn(rows, 2 * case.intermediate, device=DEVICE).masked_fill(skipped[:, None], float("nan"))
    down = torch.randn(rows, case.hidden, device=DEVICE).masked_fill(skipped[:, None], float("nan"))
    act = torch.zeros(rows, case.intermediate, device=DEVICE)
    launch_activation(hidden, b1, routing.expert, act, 1.702, 7.0)
    y = torch.full((case.tokens, case.hidden), float("nan"), device=DEVICE)
    launch_combine(down, b2, weights, routing.row, indices, y, case.experts)
    dhidden, dweight = torch.zeros_like(hidden), torch.full((rows,), float("nan"), device=DEVICE)
    dact = torch.randn(rows, case.intermediate, device=DEVICE).masked_fill(skipped[:, None], float("nan"))
    launch_activation_backward(
        hidden, b1, routing.expert, routing.slot, weights, dact, dhidden, None, dweight, 1.702, 7.0
    )
    for result in (act, y, dhidden, dweight):
        assert torch.isfinite(result).all()


def test_opcheck_and_fullgraph():
    case = ExpertsCase(tokens=6, experts=3)
    inputs, indices = case.inputs(DEVICE)
    grad = gradient_of(case)
    x, *parameters, weights = (t.detach() for t in inputs)
    import gptoss_kernels.experts.autograd  # noqa: F401  defines the operators

    torch.library.opcheck(torch.ops.gptoss_kernels.route.default, (indices, case.experts))
    token, slot, expert, row, ends = routing = torch.ops.gptoss_kernels.route(indices, case.experts)
    arguments = (x, *parameters, indices, weights, token, expert, row, ends, 1.702, 7.0)
    torch.library.opcheck(torch.ops.gptoss_kernels.experts_forward.default, arguments)
    _, hidden = torch.ops.gptoss_kernels.experts_forward(*arguments)
    for needed in ([True] * 6, [True, False, False, False, False, True], [False] * 4 + [True, False]):
        backward = (grad, x, hidden, *parameters, indices, weights, *routing, 1.702, 7.0, needed)
        torch.library.opcheck(torch.ops.gptoss_kernels.experts_backward.default, backward)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: fused_experts(*inputs[:5], indices, inputs[5], backend="triton").square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    y = fused_experts(*inputs[:5], indices, inputs[5], backend="triton").square().sum()
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(y, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(3, 4, 5)}, ValueError, r"x: expected \(tokens, hidden\), got \(3, 4, 5\)"),
        ({"x": torch.zeros(37, 24).double()}, TypeError, "x: expected one of torch.float16"),
        ({"gate_up_proj": torch.zeros(5, 24, 81)}, ValueError, r"gate_up_proj: expected \(experts, hidden=24, 2 \*"),
        ({"gate_up_proj": torch.zeros(5, 24, 80).half()}, TypeError, "gate_up_proj: expected x's dtype torch.float32"),
        (
            {"down_proj": torch.zeros(5, 24, 40)},
            ValueError,
            r"down_proj: expected shape \(5, 40, 24\), got \(5, 24, 40\)",
        ),
        ({"down_proj_bias": torch.zeros(24)}, ValueError, r"down_proj_bias: expected shape \(5, 24\), got \(24,\)"),
        ({"router_indices": torch.zeros(37, 2)}, TypeError, "router_indices: expected torch.int32 or torch.int64"),
        ({"router_indices": torch.zeros(36, 2).long()}, ValueError, r"router_indices: expected \(tokens=37, top_k\)"),
        (
            {"routing_weights": torch.zeros(37, 3)},
            ValueError,
            r"routing_weights: expected router_indices' shape \(37, 2\)",
        ),
        ({"limit": -1.0}, ValueError, "limit: expected a finite number > 0, got -1.0"),
        ({"alpha": "1"}, TypeError, "alpha: expected a float, got str"),
        ({"backend": "cutlass"}, ValueError, "backend: expected one of 'auto', 'triton', 'reference', got 'cutlass'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    inputs, indices = ExpertsCase().inputs()
    names = ("x", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias", "routing_weights")
    arguments = dict(zip(names, inputs, strict=True)) | {"router_indices": indices} | change
    with pytest.raises(error, match=message):
        fused_experts(**arguments)
