"""RMSNorm, rotary embedding, LoRA linear and the loss against fp64, in the interpreter or, on a GPU, compiled."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from gptoss_kernels.layers import chunks
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
    monkeypatch.setattr(chunks, "CHUNK", 4)  # several chunks, the last one short
    hidden, weight = draw(9, 24), draw(vocab, 24, seed=1, grad=False)
    labels = torch.arange(9, device=DEVICE) * (vocab // 9)
    token_weights = draw(9, seed=2, grad=False).abs()
    losses, entropies, top1 = linear_cross_entropy(hidden, weight, labels)
    (exact,) = doubles(hidden)
    logits = exact @ weight.double().T
    want = F.cross_entropy(logits, labels, reduction="none")
    (grad,) = torch.autograd.grad((losses * token_weights).sum(), hidden)
    (want_grad,) = torch.autograd.grad((want * token_weights.double()).sum(), exact)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    compare([losses, grad, entropies], [want, want_grad, entropy], torch.float32)
    assert torch.equal(top1, logits.argmax(-1) == labels) or vocab == 7
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels)[0], losses)


def test_loss_of_the_likeliest_word():
    hidden = torch.eye(3, 24, device=DEVICE)
    weight = torch.eye(5, 24, device=DEVICE)
    labels = torch.tensor([0, 1, 4], device=DEVICE)
    assert linear_cross_entropy(hidden, weight, labels)[2].tolist() == [True, True, False]


def test_loss_survives_large_logits_and_no_labels():
    hidden, weight = 300 * draw(4, 24), draw(50, 24, seed=1, grad=False)
    labels = torch.tensor([0, 1, 2, 3], device=DEVICE)
    want = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels)[0].double(), want, rtol=1e-5, atol=1e-3)
    losses, _, _ = linear_cross_entropy(hidden[:0], weight, labels[:0])
    losses.sum().backward()  # every process of a distributed run takes the same part in the backward pass
    with pytest.raises(ValueError, match="weight: expected a frozen LM head"):
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)


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
    labels = torch.tensor([1, 2, 3, 4, 5], device=DEVICE)
    for need_grad in (True, False):
        arguments = (x, draw(40, 24, grad=False), labels, need_grad)
        torch.library.opcheck(ops.linear_cross_entropy.default, arguments)
