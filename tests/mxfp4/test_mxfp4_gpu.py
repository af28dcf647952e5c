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


def layer(rank: int = 0):
    """gpt-oss-20b's experts: (run, dense, packed); run(weights) gives y, the input's gradient and the adapters'."""
    from gptoss_kernels import ExpertsLoRA, PackedExperts, fused_experts

    generator = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    packed = [PackedExperts(*random_packed(32, rows, 2880)) for rows in (5760, 2880)]
    dense = [torch.empty(w.shape, device="cuda", dtype=torch.bfloat16) for w in packed]
    for weight, out in zip(packed, dense, strict=True):
        from gptoss_kernels.mxfp4.dequantize import launch_dequantize

        launch_dequantize(weight.blocks, weight.scales, out)
    # The pre-activation's standard deviation is 7 times x's: it is to be mostly within the clamp at 7, since rounding
    # that crosses the clamp changes a gradient from all to nothing.
    x, grad = (size * draw(1000, 2880).bfloat16() for size in (0.1, 1.0))
    biases = draw(32, 5760).bfloat16(), draw(32, 2880).bfloat16()
    indices = torch.rand(1000, 32, device="cuda", generator=generator).argsort(1)[:, :4].contiguous()
    weights = draw(1000, 4).softmax(-1).bfloat16()
    factors = [draw(32, rank, 2880), draw(32, 5760, rank), draw(32, rank, 2880), draw(32, 2880, rank)] if rank else []
    factors = [0.02 * t for t in factors]

    def run(w1, w2, dtype=torch.bfloat16, backend="triton"):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, weights)]
        leaves += [t.clone().requires_grad_() for t in factors]
        loras = {}
        if rank:
            loras = {"gate_up_lora": ExpertsLoRA(*leaves[2:4], 2.0), "down_lora": ExpertsLoRA(*leaves[4:], 2.0)}
        y = fused_experts(leaves[0], w1, biases[0], w2, biases[1], indices, leaves[1], backend=backend, **loras)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    return run, dense, packed


@pytest.mark.parametrize("rank", [0, 8, 3])
def test_layer_over_packed_weights_is_bitwise_that_over_dense_ones(rank):
    run, dense, packed = layer(rank)
    for got, want in zip(run(*packed), run(*dense), strict=True):
        assert torch.equal(got, want)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rank", [8, 3])
def test_adapters_in_bfloat16_against_fp32(rank):
    from gptoss_kernels.testing import relative_error

    run, dense, packed = layer(rank)
    want = run(*(w.float() for w in dense), dtype=torch.float32, backend="reference")
    errors = [relative_error(a, b) for a, b in zip(run(*packed), want, strict=True)]
    print("\n" + "  ".join(f"{error:.1e}" for error in errors), end="")
    assert max(errors) <= 1.2e-2


def test_nothing_of_the_weights_size_is_allocated():
    run, _, packed = layer(8)
    run(*packed)  # the buffer is there from now on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*packed)
    extra = torch.cuda.max_memory_allocated() - before
    print(
        f"\n{extra / 2**20:.0f} MiB beside {sum(w.numel() for w in packed) * 2 / 2**20:.0f} MiB of dense weights",
        end="",
    )
    assert extra < 32 * 2880 * 2880 * 2, "not even the smaller of the two weights"


def test_offsets_beyond_int32():
    from gptoss_kernels.mxfp4.dequantize import launch_dequantize
    from gptoss_kernels.mxfp4.reference import dequantize

    blocks, scales = random_packed(130, 5760, 2880)  # 2.16e9 weights
    out = torch.empty(130, 2880, 5760, dtype=torch.bfloat16, device="cuda")
    launch_dequantize(blocks, scales, out)
    assert torch.equal(out[-1:].view(torch.int16), dequantize(blocks[-1:], scales[-1:]).view(torch.int16))
