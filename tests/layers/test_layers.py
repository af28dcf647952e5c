"""RMSNorm, rotary embedding, LoRA linear and the loss against fp64, in the interpreter or, on a GPU, compiled."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from gptoss_kernels.layers import loss as loss_module
from gptoss_kernels.layers.lora import lora_linear
from gptoss_kernels.layers.loss import linear_cross_entropy
from gptoss_kernels.layers.rms_norm import rms_norm
from gptoss_kernels.layers.rope import apply_rope
from gptoss_kernels.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(*shape, dtype=torch.float32, seed=0, grad=True):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(shape, device=DEVICE, generator=generator).to(dtype)
    return x.requires_grad_() if grad else x


def doubles(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def compare(got, want, dtype):
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, index
        error = relative_error(a.detach(), b.detach())
        assert error <= LIMITS[dtype], f"result {index}: {error:.1e}"


@each_dtype
@pytest.mark.parametrize("shape", [(3, 50, 24), (1, 2880), (300, 64)], ids=str)
def test_rms_norm(shape, dtype):
    x, weight, grad = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    y = rms_norm(x, weight, 1e-5)
    exact = doubles(x, weight)
    want = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-5)
    got = [y, *torch.autograd.grad(y, [x, weight], grad)]
    compare(got, [want, *torch.autograd.grad(want, exact, grad.double())], dtype)
    frozen = rms_norm(x, weight.detach(), 1e-5)  # another kernel, which sums nothing for the weight
    assert torch.equal(torch.autograd.grad(frozen, x, grad)[0], got[1]) and torch.equal(frozen, y)


def test_rms_norm_is_transformers_own():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    norm = GptOssRMSNorm(24).to(DEVICE, torch.float16)
    torch.nn.init.normal_(norm.weight)
    x = draw(5, 24, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, norm.weight, norm.variance_epsilon), norm(x))


@each_dtype
@pytest.mark.parametrize("batched_angles", [True, False])
def test_rope(batched_angles, dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    # Views as the projections make them: (batch, length, heads, head_dim) transposed, three heads of k.
    q, k = draw(2, 7, 6, 16, dtype=dtype, grad=False), draw(2, 7, 3, 16, dtype=dtype, seed=1, grad=False)
    q, k = (x.transpose(1, 2).requires_grad_() for x in (q, k))
    cos, sin = (draw(2 if batched_angles else 1, 7, 8, dtype=dtype, seed=seed, grad=False) for seed in (2, 3))
    out = apply_rope(q, k, cos, sin)
    exact = doubles(q, k)
    want = apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    grads = [draw(*x.shape, dtype=dtype, seed=4, grad=False) for x in out]
    got = [*out, *torch.autograd.grad(out, [q, k], grads)]
    compare(got, [*want, *torch.autograd.grad(want, exact, [g.double() for g in grads])], dtype)
    assert out[0].transpose(1, 2).is_contiguous()


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear(bias, dtype):
    x, weight = draw(2, 5, 24, dtype=dtype), draw(16, 24, dtype=dtype, seed=1, grad=False)
    b0 = draw(16, dtype=dtype, seed=2, grad=False) if bias else None
    a, b = draw(3, 24, seed=3), draw(16, 3, seed=4)  # adapters in fp32 whatever the layer is in
    grad = draw(2, 5, 16, dtype=dtype, seed=5, grad=False)
    y = lora_linear(x, weight, b0, a, b, 0.5)
    ex, ea, eb = doubles(x, a, b)
    want = F.linear(ex, weight.double(), None if b0 is None else b0.double()) + 0.5 * (ex @ ea.T) @ eb.T
    got = [y, *torch.autograd.grad(y, [x, a, b], grad)]
    assert y.dtype == dtype and got[2].dtype == got[3].dtype == torch.float32
    compare(got, [want, *torch.autograd.grad(want, [ex, ea, eb], grad.double())], dtype)


@pytest.mark.parametrize("vocab", [7, 301, 5000])
def test_loss(vocab, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4)  # several chunks, the last one short
    hidden, weight = draw(9, 24), draw(vocab, 24, seed=1)
    labels = torch.arange(9, device=DEVICE) * (vocab // 9)
    labels[2] = labels[7] = -100
    token_weights = draw(9, seed=2, grad=False).abs()
    got = linear_cross_entropy(hidden, weight, labels, token_weights)
    exact = doubles(hidden, weight)
    losses = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none", ignore_index=-100)
    want = (losses * token_weights.double()).sum()
    grads = torch.autograd.grad(3 * got, [hidden, weight])
    compare([got, *grads], [want, *torch.autograd.grad(3 * want, exact)], torch.float32)
    assert (grads[0][2] == 0).all(), "a masked token has a gradient"
    (alone,) = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight.detach(), labels, token_weights), hidden)
    assert torch.equal(alone, grads[0])


def test_loss_survives_large_logits_and_no_labels():
    hidden, weight = 300 * draw(4, 24), draw(50, 24, seed=1)
    labels = torch.tensor([0, 1, 2, 3], device=DEVICE)
    want = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels).double(), want, rtol=1e-5, atol=1e-3)
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert nothing == 0
    nothing.backward()  # every process of a distributed run takes the same part in the backward pass


def test_opcheck():
    import gptoss_kernels.layers.rms_norm
    import gptoss_kernels.layers.rope  # noqa: F401  both define operators

    ops, x, weight = torch.ops.gptoss_kernels, draw(5, 24, grad=False), draw(24, seed=1, grad=False)
    torch.library.opcheck(ops.rms_norm_forward.default, (x, weight, 1e-5))
    y, rstd = ops.rms_norm_forward(x, weight, 1e-5)
    for needed in (True, False):
        torch.library.opcheck(ops.rms_norm_backward.default, (y, x, weight, rstd, needed))
    q, k = draw(1, 4, 5, 16, grad=False), draw(1, 2, 5, 16, grad=False)
    cos = draw(1, 5, 8, grad=False)
    torch.library.opcheck(ops.rope.default, (q, k, cos, cos, True))
    labels, token_weights = torch.tensor([1, 2, 3, 4, 5], device=DEVICE), torch.ones(5, device=DEVICE)
    for need_hidden, need_weight in ((True, True), (True, False), (False, False)):
        arguments = (x, draw(40, 24, grad=False), labels, token_weights, need_hidden, need_weight)
        torch.library.opcheck(ops.linear_cross_entropy.default, arguments)
