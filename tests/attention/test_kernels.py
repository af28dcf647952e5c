"""The Triton kernels against fp64, in the interpreter or, where there is a GPU, compiled."""

import pytest
import torch
from torch.autograd import forward_ad

from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_concat
from gptoss_kernels.testing import (
    AttentionCase,
    assert_within_budget,
    delta_rounding,
    exact_attention,
    fenced,
    relative_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
DOCUMENTS = (1, 10, 33, 1, 25)

# Lengths just past a tile's edge, every head_dim and dtype, each mask alone and with a window, decoding.
CASES = [
    AttentionCase(q_len=1),
    AttentionCase(q_len=1, sinks=False),
    AttentionCase(q_len=64),
    AttentionCase(q_len=70, sinks=False, batch=2),
    AttentionCase(q_len=33, head_dim=32, q_heads=8, kv_heads=1),
    AttentionCase(q_len=33, head_dim=64, q_heads=2, kv_heads=2, window=8),
    AttentionCase(q_len=33, head_dim=96, q_heads=3, kv_heads=1),
    AttentionCase(q_len=33, head_dim=128, q_heads=2, kv_heads=1, window=16),
    AttentionCase(window=1),
    AttentionCase(window=33),
    AttentionCase(window=1000),
    AttentionCase(documents=DOCUMENTS),
    AttentionCase(documents=DOCUMENTS, window=9),
    AttentionCase(documents=DOCUMENTS, window=600, sinks=False),
    AttentionCase(documents=(40,), q_len=40),
    AttentionCase(documents=(1,) * 12, q_len=12),
    AttentionCase(batch=2, padding="left"),
    AttentionCase(batch=2, padding="left", sinks=False, window=20),
    AttentionCase(batch=2, padding="right", window=20),
    AttentionCase(q_len=1, kv_len=71, batch=2),
    AttentionCase(q_len=1, kv_len=71, window=20, batch=2, padding="left"),
    AttentionCase(q_len=37, kv_len=71),
    AttentionCase(q_len=5, kv_len=71, window=20),
    AttentionCase(dtype=torch.float16),
    AttentionCase(dtype=torch.float16, documents=DOCUMENTS, window=9),
    AttentionCase(dtype=torch.float16, head_dim=96, q_len=33),
]


def run(case, inputs, keywords, grads, function=flash_attention, **options):
    """[out, lse, gradients] of flash_attention or a definition. Rows that see nothing get no gradient of lse."""
    if function is flash_attention:
        options |= {"return_lse": True, "backend": "triton"}
    out, lse = function(*inputs, **keywords, **options)
    grad_lse = torch.where(lse.detach() > float("-inf"), grads[1], 0.0).to(lse.dtype)
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (grads[0].to(out.dtype), grad_lse))]


def grads_of(case, device=DEVICE):
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.batch, case.q_len, case.q_heads, case.head_dim)
    grad_out = torch.randn(shape, device=device, generator=generator).to(case.dtype).transpose(1, 2)
    return grad_out, torch.randn(grad_out.shape[:3], device=device, generator=generator)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_error_budget(case):
    inputs, keywords = case.inputs(DEVICE)
    grads = grads_of(case)
    actual = run(case, inputs, keywords, grads)
    eager = run(case, inputs, keywords, grads, attention_concat, compute_dtype=case.dtype)
    exact = exact_attention(inputs, *grads, **keywords)
    beside = delta_rounding(inputs, grads[0], **keywords)
    for name, a, e, x in zip(NAMES, actual, eager, exact, strict=False):
        if name == "dsinks":
            assert relative_error(a, x) <= (1e-4 if case.dtype == torch.float32 else 1e-2)
        else:
            assert_within_budget(name, a, e, x, beside.get(name, 0.0))


def test_budget_notices_a_wrong_window():
    # The check above has teeth: a window that keeps one key more is far over the budget.
    case = AttentionCase(window=20)
    inputs, keywords = case.inputs(DEVICE)
    grads = grads_of(case)
    exact = exact_attention(inputs, *grads, **keywords)
    wrong = run(case, inputs, {"sliding_window": 21}, grads)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget("out", wrong[0], exact[0].to(case.dtype), exact[0])


@pytest.mark.parametrize(
    "case",
    [AttentionCase(), AttentionCase(documents=DOCUMENTS, window=9), AttentionCase(batch=2, padding="right")],
    ids=str,
)
def test_reads_nothing_beside_its_inputs(case):
    inputs, keywords = case.inputs(DEVICE)
    grads = grads_of(case)
    plain = run(case, inputs, keywords, grads)
    inputs = [fenced(x).requires_grad_() if x.dim() == 4 else x for x in inputs]
    for a, b in zip(plain, run(case, inputs, keywords, grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [AttentionCase(head_dim=96, q_len=37), AttentionCase(window=9)], ids=str)
def test_writes_nothing_beside_its_outputs_and_leaves_no_gap(case):
    from gptoss_kernels.attention.autograd import INTERPRETED
    from gptoss_kernels.attention.backward import launch_backward
    from gptoss_kernels.attention.forward import launch_forward

    inputs, _ = case.inputs(DEVICE)
    q, k, v, sinks = [x.detach() for x in inputs]
    grad_out, _ = grads_of(case)
    sentinel = -777.0
    out, dq, dk, dv = (fenced(torch.full_like(x, sentinel), sentinel) for x in (q, q, k, v))
    lse = torch.full(q.shape[:3], sentinel, device=DEVICE)
    common = (case.head_dim**-0.5, case.window, None, None, INTERPRETED)
    launch_forward(q, k, v, sinks, out, lse, *common)
    launch_backward(grad_out, None, q, k, v, sinks, out, lse, dq, dk, dv, *common)
    for x in (out, dq, dk, dv):
        assert not (x == sentinel).any(), "an element was not written"
        buffer = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        assert (buffer == sentinel).sum() == buffer.numel() - x.numel(), "an element beside the output was written"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_results_are_the_same(mode):
    case = AttentionCase(q_len=40, window=9)
    inputs, keywords = case.inputs(DEVICE)
    out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
    with mode():
        again = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert out.requires_grad and not again[0].requires_grad and again[0].stride() == out.stride()


def test_forward_mode_is_refused_with_gradients_off_as_well():
    inputs = [x.detach() for x in AttentionCase(q_len=9).inputs(DEVICE)[0]]
    with forward_ad.dual_level(), torch.no_grad():
        inputs[0] = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(NotImplementedError, match="jvp"):
            flash_attention(*inputs, backend="triton")


@pytest.mark.parametrize("mixed", [False, True], ids=["views of one projection", "v contiguous"])
def test_hooks_on_saved_tensors_may_change_their_strides(mixed, monkeypatch):
    from gptoss_kernels.attention import autograd

    # Plans are kept on a GPU alone; here too, so that one made for other strides would be found.
    remembered = autograd.remembered
    monkeypatch.setattr(
        autograd, "remembered", lambda known, key, make, interpreted: remembered(known, key, make, False)
    )
    monkeypatch.setattr(autograd, "_plans", {})
    generator = torch.Generator(DEVICE).manual_seed(0)
    fused = torch.randn(2, 40, 8, 16, device=DEVICE, generator=generator).transpose(1, 2)
    q, k, v = (x.detach().requires_grad_() for x in fused.split([4, 2, 2], dim=1))
    if mixed:
        v = v.detach().contiguous().requires_grad_()
    grad_out = torch.randn(2, 4, 40, 16, device=DEVICE, generator=generator)

    def gradients(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = flash_attention(q, k, v, backend="triton")
        return torch.autograd.grad(out, (q, k, v), grad_out)

    as_they_are = gradients(lambda x: x)
    for pack in (torch.clone, lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x):
        for a, b in zip(gradients(pack), as_they_are, strict=True):
            assert torch.equal(a, b)


def test_strided_inputs_are_read_in_place():
    # One fused (batch, length, q + k + v heads, head_dim) projection, and the same values contiguous.
    fused = torch.randn(2, 40, 8, 16, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).transpose(1, 2)
    q, k, v = fused.split([4, 2, 2], dim=1)
    views = flash_attention(q, k, v, backend="triton")
    copies = flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="triton")
    assert torch.equal(views, copies)
    last_stride_two = torch.randn(1, 2, 40, 32, device=DEVICE)[..., ::2]
    expected = flash_attention(*[last_stride_two.contiguous()] * 3, backend="triton")
    assert torch.equal(flash_attention(*[last_stride_two] * 3, backend="triton"), expected)


@pytest.mark.parametrize("name", ["key_padding_mask", "cu_seqlens", "sinks"])
def test_small_inputs_may_have_any_strides(name):
    # A windowed layer's padding mask, for one, is the end of each row of a longer mask.
    case = AttentionCase(batch=2, padding="left", q_len=33) if name == "key_padding_mask" else AttentionCase()
    if name == "cu_seqlens":
        case = AttentionCase(documents=DOCUMENTS)
    inputs, keywords = case.inputs(DEVICE)
    expected = run(case, inputs, keywords, grads_of(case))
    x = inputs[3].detach() if name == "sinks" else keywords[name]
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 8, device=DEVICE).to(x.dtype)
    strided = wide[..., 8:][..., ::2] if x.dim() == 1 else wide[..., 8 : 8 + x.shape[-1]]
    strided.copy_(x)
    assert not strided.is_contiguous()
    if name == "sinks":
        inputs = [*inputs[:3], strided.requires_grad_()]
    else:
        keywords = keywords | {name: strided}
    for got, want in zip(run(case, inputs, keywords, grads_of(case)), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("length", [64, 70])
def test_layouts_that_differ_between_inputs(length):
    # Inside Transformers k comes contiguous from the rotary embedding, and v as a transposed view.
    inputs, _ = AttentionCase(q_len=length).inputs(DEVICE)
    mixed = [x.detach().contiguous().requires_grad_() if i == 1 else x for i, x in enumerate(inputs)]
    grad = torch.randn(inputs[0].shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    wanted = torch.autograd.grad(flash_attention(*inputs, backend="triton"), inputs, grad)
    for a, b in zip(torch.autograd.grad(flash_attention(*mixed, backend="triton"), mixed, grad), wanted, strict=True):
        assert torch.equal(a, b)


def test_expanded_gradient():
    # .sum() hands back a gradient whose strides are all 0.
    inputs, _ = AttentionCase(q_len=20).inputs(DEVICE)
    expanded = torch.autograd.grad(flash_attention(*inputs, backend="triton").sum(), inputs)
    out = flash_attention(*inputs, backend="triton")
    for a, b in zip(expanded, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


def test_lse_alone_is_differentiable():
    case = AttentionCase(q_len=20)
    inputs, _ = case.inputs(DEVICE)
    grad_lse = grads_of(case)[1]
    _, lse = flash_attention(*inputs, backend="triton", return_lse=True)
    actual = torch.autograd.grad(lse, inputs, grad_lse, materialize_grads=True)
    exact = exact_attention(inputs, torch.zeros_like(inputs[0]), grad_lse)[2:]
    for a, x in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, x.float(), rtol=1e-4, atol=1e-5)


def test_sinks_keep_their_own_dtype():
    inputs, _ = AttentionCase(q_len=20, dtype=torch.float16).inputs(DEVICE)
    sinks = inputs[3].detach().float().requires_grad_()
    out = flash_attention(*inputs[:3], sinks, backend="triton")
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out.float().sum(), sinks)[0].dtype == torch.float32


def test_sink_of_minus_infinity_is_no_sink():
    inputs, _ = AttentionCase(q_len=20, sinks=False).inputs(DEVICE)
    sinks = torch.full((4,), float("-inf"), device=DEVICE, requires_grad=True)
    out = flash_attention(*inputs, sinks, backend="triton")
    assert torch.equal(out, flash_attention(*inputs, backend="triton"))
    assert (torch.autograd.grad(out.sum(), sinks)[0] == 0).all()


def test_large_scores_do_not_overflow():
    case = AttentionCase(q_len=20)
    inputs, keywords = case.inputs(DEVICE)
    inputs = [(x.detach() * scale).requires_grad_() for x, scale in zip(inputs, (100, 100, 1, 100), strict=True)]
    grads = grads_of(case)
    exact = exact_attention(inputs, *grads, **keywords)
    # exp(s - lse) inherits the rounding of an fp32 lse, which here is some 3e4: a relative error of |lse| eps.
    bound = 2 * exact[1].abs().max().item() * torch.finfo(torch.float32).eps
    for name, a, x in zip(NAMES, run(case, inputs, keywords, grads), exact, strict=True):
        assert relative_error(a, x) <= bound, name


@pytest.mark.parametrize("case", [AttentionCase(), AttentionCase(documents=DOCUMENTS, window=9)], ids=str)
def test_two_backward_passes_are_bitwise_equal(case):
    inputs, keywords = case.inputs(DEVICE)
    grads = grads_of(case)
    for a, b in zip(run(case, inputs, keywords, grads), run(case, inputs, keywords, grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [None, 9])
def test_documents_packed_equal_documents_alone(window):
    case = AttentionCase(documents=DOCUMENTS, window=window)
    inputs, keywords = case.inputs(DEVICE)
    packed = flash_attention(*inputs, **keywords, backend="triton")
    q, k, v, sinks = inputs
    start = 0
    for length in DOCUMENTS:
        own = slice(start, start + length)
        alone = flash_attention(
            q[:, :, own], k[:, :, own], v[:, :, own], sinks, sliding_window=window, backend="triton"
        )
        torch.testing.assert_close(packed[:, :, own], alone, rtol=1e-6, atol=1e-6)
        start += length


def test_result_merges_heads_without_a_copy():
    inputs, _ = AttentionCase(batch=2, q_len=20).inputs(DEVICE)
    out = flash_attention(*inputs, backend="triton")
    assert out.transpose(1, 2).reshape(2, 20, -1).data_ptr() == out.data_ptr()
