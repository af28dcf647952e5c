"""What only a GPU shows: bf16 at real lengths against fp64, memory, determinism, offsets, no synchronisation.

Prints its error table with `pytest -m gpu -s`.
"""

import pytest
import torch

from gptoss_kernels import flash_attention
from gptoss_kernels.testing import AttentionCase, exact_attention, relative_error

pytestmark = pytest.mark.gpu

Q_HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
LIMITS = {"out": 4e-3, "lse": 1e-5, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3, "dsinks": 6e-3}


def gpt_oss(tokens: int, **changes) -> AttentionCase:
    shapes = dict(q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16)
    return AttentionCase(q_len=tokens, **(shapes | changes))


def uneven(tokens: int) -> tuple[int, ...]:
    """Documents of one token, of a tile's size more or less one, and a long one."""
    short = (1, 127, 129, 1, 64, 300)
    return (*short, tokens - sum(short))


def forward_backward(inputs, keywords, grad_out, grad_lse=None):
    out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
    outputs, grads = ((out,), (grad_out,)) if grad_lse is None else ((out, lse), (grad_out, grad_lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, inputs, grads)]


def gradient_like(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype)


def check(case: AttentionCase, limits: dict = LIMITS) -> None:
    inputs, keywords = case.inputs("cuda")
    grad_out = gradient_like(inputs[0])
    actual = forward_backward(inputs, keywords, grad_out)
    exact = exact_attention(inputs, grad_out, **keywords)
    errors = {name: relative_error(a, x) for name, a, x in zip(NAMES, actual, exact, strict=False)}
    print(f"\n{case}: " + "  ".join(f"{name} {error:.2e}" for name, error in errors.items()), end="")
    over = {name: error for name, error in errors.items() if not error <= limits[name]}
    assert not over, f"relative errors over their limits: {over}"


@pytest.mark.parametrize("mask", ["full", "window", "packed", "packed window"])
@pytest.mark.parametrize("tokens", [2048, 2011, 4096, 16384])
def test_relative_error_in_bfloat16(tokens, mask):
    documents = uneven(tokens) if "packed" in mask else None
    check(gpt_oss(tokens, window=WINDOW if "window" in mask else None, documents=documents))


@pytest.mark.parametrize("mask", ["full", "window", "packed"])
def test_relative_error_of_the_kernels_for_every_architecture(mask, monkeypatch):
    from gptoss_kernels.attention import autograd, tiles

    monkeypatch.setattr(tiles, "hopper_kernels", lambda *tensors: None)
    monkeypatch.setattr(autograd, "_plans", {})  # those made before have chosen already
    check(
        gpt_oss(2011, window=WINDOW if mask == "window" else None, documents=uneven(2011) if mask == "packed" else None)
    )


@pytest.mark.parametrize("window", [65, 129, 200, 511, 600])
def test_relative_error_of_windows(window):
    check(gpt_oss(1311, window=window))
    check(gpt_oss(1311, window=window, documents=uneven(1311)))


@pytest.mark.parametrize(
    "changes", [{"kv_len": 1500}, {"kv_len": 1500, "window": 600}, {"batch": 3}, {"dtype": torch.float16}]
)
def test_relative_error_of_other_shapes(changes):
    check(gpt_oss(1000, **changes))


def test_an_unaligned_view_takes_the_kernels_for_every_architecture():
    inputs, keywords = gpt_oss(300).inputs("cuda")
    grad_out = gradient_like(inputs[0])
    expected = forward_backward(inputs, keywords, grad_out)
    room = torch.zeros(inputs[0].numel() + 1, device="cuda", dtype=inputs[0].dtype)
    shifted = room[1:].view(inputs[0].shape).copy_(inputs[0].detach()).requires_grad_()
    actual = forward_backward([shifted, *inputs[1:]], keywords, grad_out)
    for name, a, x in zip(NAMES, actual, expected, strict=True):
        assert relative_error(a, x) <= LIMITS[name], name


@pytest.mark.parametrize("padding", ["left", "right"])
def test_relative_error_with_padding(padding):
    check(gpt_oss(1000, batch=2, padding=padding))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_every_head_dim_and_dtype(head_dim, dtype):
    limits = {name: 5e-6 for name in NAMES} if dtype == torch.float32 else LIMITS
    check(gpt_oss(515, q_heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, window=200), limits)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_decoding_and_chunked_prefill(window):
    for q_len in (1, 100):
        case = gpt_oss(q_len, kv_len=3001, window=window)
        inputs, keywords = case.inputs("cuda")
        grad_out = gradient_like(inputs[0])
        actual = forward_backward(inputs, keywords, grad_out)
        for name, a, x in zip(NAMES, actual, exact_attention(inputs, grad_out, **keywords), strict=True):
            assert relative_error(a, x) <= LIMITS[name], (q_len, name)


@pytest.mark.parametrize("documents", [None, uneven(16384)], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_bitwise_deterministic_at_16384(window, documents):
    inputs, keywords = gpt_oss(16384, window=window, documents=documents).inputs("cuda")
    grad_out, grad_lse = gradient_like(inputs[0]), gradient_like(inputs[0][..., 0], 2).float()
    first = forward_backward(inputs, keywords, grad_out, grad_lse)
    for _ in range(3):
        for name, a, b in zip(NAMES, first, forward_backward(inputs, keywords, grad_out, grad_lse), strict=True):
            assert torch.equal(a, b), name


def test_memory_at_16384():
    inputs, _ = gpt_oss(16384).inputs("cuda")
    for x in inputs:
        x.grad = None
    grad_out = gradient_like(inputs[0])
    flash_attention(*inputs, backend="triton").backward(grad_out)  # loads the kernels
    for x in inputs:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attention(*inputs, backend="triton").backward(grad_out)
    added = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"\nforward + backward at 16,384 tokens add {added:.3f} GiB", end="")
    assert added <= 0.35


@pytest.mark.parametrize("window", [None, WINDOW])
def test_131072_tokens(window):
    # Only the last rows have a gradient, so that fp64 needs those rows alone.
    rows = 64
    inputs, keywords = gpt_oss(131072, window=window, q_heads=16, kv_heads=2).inputs("cuda")
    grad_out = gradient_like(inputs[0])
    grad_out[:, :, :-rows] = 0
    actual = forward_backward(inputs, keywords, grad_out)
    last = [inputs[0][:, :, -rows:], *inputs[1:]]
    exact = exact_attention(last, grad_out[:, :, -rows:], **keywords)
    actual[0], actual[1], actual[2] = (x[:, :, -rows:] for x in actual[:3])
    for name, a, x in zip(NAMES, actual, exact, strict=True):
        assert relative_error(a, x) <= LIMITS[name], name


@pytest.mark.parametrize("layout", ["batch", "row"])
def test_offsets_beyond_32_bits(layout):
    # Views of one buffer of more than 2^31 elements; what lies at its end must be read and not what wraps around.
    tokens = 131072
    batch, width = (4, 80 * 64) if layout == "batch" else (1, 320 * 64)
    buffer = torch.empty(batch, tokens, width, device="cuda", dtype=torch.bfloat16).normal_()
    assert buffer.numel() > 2**31
    heads = buffer.unflatten(-1, (-1, 64)).transpose(1, 2)
    q, k, v = heads[:, :8], heads[:, -2:-1], heads[:, -1:]
    out, lse = flash_attention(q, k, v, sliding_window=WINDOW, return_lse=True, backend="triton")
    own = slice(-2 * WINDOW, None)
    alone = flash_attention(*(x[-1:, :, own].contiguous() for x in (q, k, v)), sliding_window=WINDOW, backend="triton")
    assert torch.equal(out[-1:, :, -WINDOW:], alone[:, :, -WINDOW:])
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("window", [None, WINDOW])
def test_no_synchronisation(window):
    inputs, keywords = gpt_oss(512, window=window, documents=(1, 300, 211)).inputs("cuda")
    grad_out = gradient_like(inputs[0])
    forward_backward(inputs, keywords, grad_out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(inputs, keywords, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_lengths_and_documents_compile_nothing_new():
    # Packed rows of a training run differ in both from step to step; a compilation takes seconds.
    from gptoss_kernels.attention import backward, forward

    def step(tokens, documents, window):
        inputs, keywords = gpt_oss(tokens, window=window, documents=documents).inputs("cuda")
        forward_backward(inputs, keywords, gradient_like(inputs[0]))

    def compiled():
        kernels = [forward.forward_kernel, backward.dkdv_kernel, backward.dq_kernel]
        if torch.cuda.get_device_capability() == (9, 0):
            from gptoss_kernels.attention import hopper

            kernels += [hopper.forward_hopper_kernel, hopper.dkdv_hopper_kernel, hopper.dq_hopper_kernel]
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    for tokens in (1024, 1000, 1025):  # each way to launch, with and without a ragged end
        step(tokens, (tokens,), None)
    before = compiled()
    for documents in ((1, 1023), (500, 524), (1,) * 16 + (1009,), (7, 8, 9, 300, 701)):
        step(sum(documents), documents, None)
    assert compiled() == before


def test_wrong_cu_seqlens_are_caught_on_the_device():
    # A device-side assertion ends the process's CUDA context: in a process of its own.
    import os
    import subprocess
    import sys

    code = """
import torch
from gptoss_kernels import flash_attention
q = torch.zeros(1, 1, 6, 16, device="cuda", dtype=torch.float16)
flash_attention(q, q, q, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()
"""
    environment = {**os.environ, "GPTOSS_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode != 0
    assert "cu_seqlens: expected 0 first, strictly increasing, 6 last" in result.stdout + result.stderr
