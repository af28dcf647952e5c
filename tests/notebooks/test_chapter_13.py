"""Chapter 13's kernels, functions and budget, as the notebook shows them, against the package."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib", reason="matplotlib is an extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.mxfp4.reference import MAGNITUDES, dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 64, 3), (1, 1, 1), (2, 70, 2), (3, 130, 1)]  # experts, rows, groups
KERNELS = {"decode_kernel": [1, 16, 70], "dequantize_kernel": SHAPES}
_PACKED = {"blocks": torch.uint8, "scales": torch.uint8, "ROWS": 5760, "GROUPS": 90, "BLOCK": 64}
OFFLINE = {
    "decode_kernel": [{"codes": torch.uint8, "out": torch.float32, "numel": "i32", "BLOCK": 16}],
    "dequantize_kernel": [_PACKED | {"out": dtype} for dtype in (torch.bfloat16, torch.float32)],
}


@pytest.fixture(scope="module")
def chapter():
    return extract.load("13_mxfp4_and_long_context")


def draw(experts, rows, groups, low=100, high=140):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator)
    scales = torch.randint(low, high, (experts, rows, groups), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


@pytest.mark.parametrize("numel", KERNELS["decode_kernel"])
def test_decode(chapter, numel):
    codes = torch.arange(numel, device=DEVICE).remainder(16).to(torch.uint8)
    out = torch.full((numel + 8,), -777.0, device=DEVICE)
    chapter.decode_kernel[(-(-numel // 16),)](codes, out, numel, BLOCK=16)
    table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])
    assert chapter.same_bits(out[:numel], table[codes.cpu().long()]) and (out[numel:] == -777.0).all()


@pytest.mark.parametrize("shape", KERNELS["dequantize_kernel"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantize(chapter, shape, dtype):
    blocks, scales = draw(*shape) if dtype == torch.float32 else draw(*shape, 118, 135)
    got = chapter.launch_dequantize(blocks.to(DEVICE), scales.to(DEVICE), dtype, block=64).cpu()
    wanted = dequantize(blocks, scales, dtype)
    assert got.shape == wanted.shape and torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_in_pytorch(chapter, shape):
    blocks, scales = draw(*shape)
    right = chapter.decode(blocks, scales)
    assert chapter.same_bits(right, dequantize(blocks, scales, torch.float32))
    assert not torch.equal(right, chapter.decode(blocks, scales, low_first=False))


def test_rounding_to_a_scale_is_quantize(chapter):
    weight = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1))
    blocks, scales = quantize(weight)
    groups = weight.mT.unflatten(-1, (-1, 32))
    got = chapter.with_exponent(groups, scales.float()[..., None] - 127)
    torch.testing.assert_close(got.flatten(-2).mT, dequantize(blocks, scales, torch.float32))


def test_a_packed_product_and_its_gradient(chapter):
    blocks, scales = draw(1, 24, 2, 120, 130)
    weight = dequantize(blocks, scales, torch.float64)[0]
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    y = chapter.PackedProduct.apply(x, blocks, scales)
    torch.testing.assert_close(y, x @ weight)
    torch.testing.assert_close(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.ones_like(y) @ weight.T)


def test_offloading_changes_no_gradient(chapter):
    layer = torch.nn.Linear(6, 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    wanted = [x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    apply = chapter.OffloadedCheckpoint.apply
    apply(apply(x, layer), layer).square().sum().backward()
    torch.testing.assert_close([x.grad, layer.weight.grad], wanted)


def test_the_budget_of_a_layer_is_what_the_package_keeps(chapter):
    """The pre-activation is what `fused_experts` keeps a token, beside its input and the routing."""
    from gptoss_kernels.course.ledger import kept_bytes
    from gptoss_kernels.testing import ExpertsCase

    hidden = 64
    leaves, indices = ExpertsCase(tokens=8, hidden=hidden, intermediate=hidden, experts=4, top_k=4).inputs(DEVICE)
    leaves = [leaf.detach().requires_grad_(place in (0, 5)) for place, leaf in enumerate(leaves)]
    size = kept_bytes(lambda: chapter.fused_experts(*leaves[:5], indices, leaves[5]), ignore=leaves)
    scaled = chapter.KEPT * hidden // chapter.HIDDEN * 2  # fp32 here
    rows = 8 * 4
    assert 0 <= size - 8 * scaled <= 40 * rows


def test_weights_are_the_models(chapter):
    from gptoss_kernels.testing import random_gpt_oss

    model = random_gpt_oss("gpt-oss-20b", device="meta", dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    total = sum(chapter.WEIGHTS["gpt-oss-20b", False].values()) * 2**30
    assert abs(total - 2 * parameters) < 1e6  # the rotary buffer
    packed = chapter.WEIGHTS["gpt-oss-20b", True]["experts"] / chapter.WEIGHTS["gpt-oss-20b", False]["experts"]
    assert packed == pytest.approx(17 / 64, rel=0.01)  # and the biases


def test_peak_grows_with_tokens_and_shrinks_with_each_remedy(chapter):
    total = lambda *a, **k: sum(chapter.peak_gib(*a, **k).values())  # noqa: E731
    assert total(4096) < total(32768) < total(131072)
    plain = total(131072, packs=True)
    for remedy in (dict(offload=True), dict(part=8192), dict(part=8192, again=True)):
        assert total(131072, packs=True, **remedy) < plain < total(131072)
