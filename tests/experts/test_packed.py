"""Experts over packed MXFP4 weights: bit by bit what they are over the same weights made dense first."""

import pytest
import torch

from gptoss_kernels import fused_experts
from gptoss_kernels.mxfp4.packed import PackedExperts
from gptoss_kernels.mxfp4.reference import dequantize, quantize
from gptoss_kernels.testing import ExpertsCase

from .test_experts import DEVICE, gradient_of

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SMALL = dict(hidden=64, intermediate=32)


def packed_inputs(case: ExpertsCase):
    """(dense, packed, indices): x, gate_up_proj, its bias, down_proj, its bias, routing weights; the same numbers."""
    inputs, indices = case.inputs(DEVICE)
    packed = [x.detach() for x in inputs]
    dense = list(packed)
    for i in (1, 3):
        blocks, scales = quantize(packed[i])
        packed[i], dense[i] = PackedExperts(blocks, scales), dequantize(blocks, scales, case.dtype)
    return dense, packed, indices


def run(inputs, indices, grad, backend="triton"):
    """[y, gradients of x and the routing weights]; the experts' parameters are frozen."""
    x, *parameters, weights = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = fused_experts(x, *parameters, indices, weights, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, (x, weights), grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["random", "one", "sentinel"])
def test_bitwise_the_dense_weights(dtype, routing):
    case = ExpertsCase(tokens=19, dtype=dtype, routing=routing, **SMALL)
    dense, packed, indices = packed_inputs(case)
    grad = gradient_of(case)
    for got, want in zip(run(packed, indices, grad), run(dense, indices, grad), strict=True):
        assert torch.equal(got, want)


def test_the_reference_takes_packed_weights():
    case = ExpertsCase(tokens=5, **SMALL)
    dense, packed, indices = packed_inputs(case)
    grad = gradient_of(case)
    for got, want in zip(run(packed, indices, grad, "reference"), run(dense, indices, grad, "reference"), strict=True):
        assert torch.equal(got, want)


def test_layers_share_one_buffer():
    # Two layers whose weights differ, forward in turn and backward in turn: each has to fill the buffer anew.
    from gptoss_kernels.mxfp4 import buffer

    cases = [ExpertsCase(tokens=7, **SMALL), ExpertsCase(tokens=7, size=1.0, **SMALL)]
    layers = [packed_inputs(case) for case in cases]

    def both(which):
        x = layers[0][0][0].clone().requires_grad_()
        y = x
        for layer in layers:
            _, *parameters, weights = layer[which]
            y = fused_experts(y, *parameters, layer[2], weights, backend="triton")
        return y, *torch.autograd.grad(y.square().sum(), x)

    buffer.release()
    for got, want in zip(both(1), both(0), strict=True):
        assert torch.equal(got, want)
    assert len(buffer._buffers) == 1
    (shared,) = buffer._buffers.values()
    assert shared.numel() == 5 * 64 * 64 * 4, "bytes of one gate_up_proj in fp32, the larger of the two"


def test_opcheck_and_fullgraph():
    case = ExpertsCase(tokens=6, experts=3, **SMALL)
    _, packed, indices = packed_inputs(case)
    x, w1, b1, w2, b2, weights = packed
    import gptoss_kernels.experts.autograd  # noqa: F401  defines the operators

    routing = torch.ops.gptoss_kernels.route(indices, case.experts)
    token, slot, expert, row, ends = routing
    scales = w1.scales, w2.scales
    arguments = (x, w1.blocks, b1, w2.blocks, b2, indices, weights, token, expert, row, ends, 1.702, 7.0, *scales)
    torch.library.opcheck(torch.ops.gptoss_kernels.experts_forward.default, arguments)
    _, hidden = torch.ops.gptoss_kernels.experts_forward(*arguments)
    needed = [True, False, False, False, False, True]
    backward = (x, x, hidden, w1.blocks, b1, w2.blocks, b2, indices, weights, *routing, 1.702, 7.0, needed, *scales)
    torch.library.opcheck(torch.ops.gptoss_kernels.experts_backward.default, backward)
    leaf = x.clone().requires_grad_()

    def loss(x):
        return fused_experts(x, w1, b1, w2, b2, indices, weights, backend="triton").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,), (want,) = torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(got, want)


def test_a_change_in_place_between_the_passes_is_an_error():
    _, packed, indices = packed_inputs(ExpertsCase(tokens=3, **SMALL))
    x, *parameters, weights = packed
    y = fused_experts(x.requires_grad_(), *parameters, indices, weights, backend="triton")
    parameters[0].scales.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors_name_the_argument():
    blocks, scales = torch.zeros(2, 8, 1, 16, dtype=torch.uint8), torch.zeros(2, 8, 1, dtype=torch.uint8)
    for arguments, error, message in (
        ((blocks.int(), scales), TypeError, "blocks: expected a torch.uint8 tensor, got torch.int32"),
        ((blocks, None), TypeError, "scales: expected a torch.uint8 tensor, got NoneType"),
        ((blocks[..., :8], scales), ValueError, r"blocks: expected \(experts, out, in / 32, 16\), got \(2, 8, 1, 8\)"),
        ((blocks, scales[:1]), ValueError, r"scales: expected shape \(2, 8, 1\), got \(1, 8, 1\)"),
    ):
        with pytest.raises(error, match=message):
            PackedExperts(*arguments)
    packed = PackedExperts(blocks, scales)
    assert packed.shape == (2, 32, 8)
    _, inputs, indices = packed_inputs(ExpertsCase(tokens=3, **SMALL))
    x, _, *parameters, weights = inputs
    with pytest.raises(ValueError, match=r"gate_up_proj: expected \(experts, hidden=64, 2 \* .*got \(2, 32, 8\)"):
        fused_experts(x, packed, *parameters, indices, weights)
    with pytest.raises(RuntimeError, match="packed MXFP4 weights are frozen"):
        packed.data += 1
