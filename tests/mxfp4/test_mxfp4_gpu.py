"""What only a GPU shows of MXFP4: gpt-oss's shapes, and how close to the memory's speed.

Prints what it measured with `pytest -m gpu -s`.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu


def random_packed(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda low, high, *shape: torch.randint(  # noqa: E731
        low, high, shape, dtype=torch.uint8, device="cuda", generator=generator
    )
    return draw(0, 256, experts, rows, columns // 32, 16), draw(115, 125, experts, rows, columns // 32)


@pytest.mark.parametrize("rows", [5760, 2880])
def test_exact_and_near_the_memorys_speed(rows):
    from triton.testing import do_bench

    from gptoss_kernels.mxfp4.dequantize import launch_dequantize
    from gptoss_kernels.mxfp4.reference import dequantize

    blocks, scales = random_packed(32, rows, 2880)
    out = torch.empty(32, 2880, rows, dtype=torch.bfloat16, device="cuda")
    launch_dequantize(blocks, scales, out)
    assert torch.equal(out.view(torch.int16), dequantize(blocks, scales).view(torch.int16))
    moved = sum(x.nbytes for x in (blocks, scales, out))
    rate = moved / do_bench(lambda: launch_dequantize(blocks, scales, out), return_mode="median")
    source = torch.empty_like(out)
    copy = 2 * out.nbytes / do_bench(lambda: out.copy_(source), return_mode="median")
    print(f"\n{rows} rows: {rate / 1e9:.2f} TB/s, a copy {copy / 1e9:.2f} TB/s", end="")
    assert rate >= 0.8 * copy


def test_offsets_beyond_int32():
    from gptoss_kernels.mxfp4.dequantize import launch_dequantize
    from gptoss_kernels.mxfp4.reference import dequantize

    blocks, scales = random_packed(130, 5760, 2880)  # 2.16e9 weights
    out = torch.empty(130, 2880, 5760, dtype=torch.bfloat16, device="cuda")
    launch_dequantize(blocks, scales, out)
    assert torch.equal(out[-1:].view(torch.int16), dequantize(blocks[-1:], scales[-1:]).view(torch.int16))
