"""MXFP4 to plain weights: every code and scale, against Transformers, in the interpreter or, on a GPU, compiled."""

import pytest
import torch

from gptoss_kernels.mxfp4.reference import GROUP, dequantize, quantize

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def draw(experts: int, rows: int, groups: int, low: int = 0, high: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales; the scales from low to high - 1."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, groups, GROUP // 2), generator=generator).to(torch.uint8)
    return blocks, torch.randint(low, high, (experts, rows, groups), generator=generator).to(torch.uint8)


def bits(x: torch.Tensor) -> torch.Tensor:
    """What is compared, so that -0 is not 0 and NaN is NaN."""
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def kernel(blocks, scales, dtype):
    from gptoss_kernels.mxfp4.dequantize import launch_dequantize

    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, groups * GROUP, rows, dtype=dtype, device=DEVICE)
    launch_dequantize(blocks.to(DEVICE), scales.to(DEVICE), out)
    return out


@pytest.mark.parametrize("shape", [(3, 64, 2), (2, 5, 3), (1, 96, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_is_transformers_own(shape, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = draw(*shape)
    got, want = dequantize(blocks, scales, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert got.shape == want.shape and got.is_contiguous()
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 8), (3, 70, 3), (1, 1, 1), (2, 130, 9)], ids=str)
def test_kernel_is_the_reference(shape, dtype):
    blocks, scales = draw(*shape) if dtype != torch.float16 else draw(*shape, 100, 140)  # within its range
    assert torch.equal(bits(kernel(blocks, scales, dtype)), bits(dequantize(blocks, scales, dtype)))


def test_every_code_with_every_scale():
    # All 256 bytes with all scales but 255, the standard's NaN: 2 ** -127 and what it makes of 0.5 included.
    blocks = torch.arange(256).view(1, 1, 16, 16).expand(1, 255, 16, 16).to(torch.uint8).contiguous()
    scales = torch.arange(255).view(1, 255, 1).expand(1, 255, 16).to(torch.uint8).contiguous()
    got = kernel(blocks, scales, torch.float32)
    assert torch.equal(bits(got), bits(dequantize(blocks, scales, torch.float32)))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(2).long()  # [1, 255, 512]
    sign = torch.where(codes >= 8, -1.0, 1.0).double()
    want = sign * magnitudes[codes & 7] * 2.0 ** (torch.arange(255).double().view(1, 255, 1) - 127)
    assert torch.equal(got.cpu(), want.mT.float())  # 6 * 2 ** 127 is beyond fp32, and infinite there


def test_a_range_of_experts_into_a_part_of_a_buffer():
    from gptoss_kernels.mxfp4.dequantize import launch_dequantize

    blocks, scales = (x.to(DEVICE) for x in draw(4, 48, 2))
    want = dequantize(blocks, scales, torch.float32)
    buffer = torch.full((4, 64, 48), float("nan"), device=DEVICE)
    launch_dequantize(blocks[1:3], scales[1:3], buffer[1:3])
    assert torch.equal(buffer[1:3], want[1:3])
    assert buffer[0].isnan().all() and buffer[3].isnan().all()


def test_quantized_numbers_come_back():
    blocks, scales = draw(2, 32, 3, 100, 140)
    weight = dequantize(blocks, scales)
    assert torch.equal(dequantize(*quantize(weight)), weight)


def test_ties_go_to_the_even_code():
    # In units of the scale that 4 fixes; the odd codes mean 0.5, 1.5, 3 and 6.
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0])
    weight = torch.cat([ties, -ties, torch.zeros(16)]).view(1, GROUP, 1)
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0])
    got = dequantize(*quantize(weight), torch.float32).flatten()
    assert torch.equal(got, torch.cat([want, -want, torch.zeros(16)]))
    above, below = (dequantize(*quantize(weight * (1 + x)), torch.float32).flatten()[:7] for x in (1e-6, -1e-6))
    assert torch.equal(above, torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]))
    assert torch.equal(below, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]))


def test_the_better_of_two_scales():
    weight = torch.randn(2, 128, 40, generator=torch.Generator().manual_seed(0))

    def errors(w, **keys):
        return (dequantize(*quantize(w, **keys), torch.float32) - w).square().unflatten(1, (-1, GROUP)).sum(2)

    standard, best, doubled = errors(weight), errors(weight, best_scale=True), quantize(weight, best_scale=True)[1]
    assert (best <= standard).all() and (best < standard).any() and (best == standard).any()
    assert set((doubled.int() - quantize(weight)[1].int()).unique().tolist()) == {0, 1}
    weight = dequantize(*draw(2, 32, 3, 100, 140), torch.float32)
    assert torch.equal(dequantize(*quantize(weight, best_scale=True), torch.float32), weight)
