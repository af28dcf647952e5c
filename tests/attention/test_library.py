"""The operators as torch.library and torch.compile see them."""

import pytest
import torch

from gptoss_kernels import flash_attention
from gptoss_kernels.testing import AttentionCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    AttentionCase(q_len=20),
    AttentionCase(q_len=20, sinks=False, window=7),
    AttentionCase(q_len=20, documents=(1, 12, 7)),
    AttentionCase(q_len=20, batch=2, padding="left"),
]


@pytest.fixture(autouse=True)
def _loaded():
    import gptoss_kernels.attention.autograd  # noqa: F401  defines the operators


def _arguments(case):
    inputs, keywords = case.inputs(DEVICE)
    q, k, v = (x.detach() for x in inputs[:3])
    sinks = inputs[3].detach() if case.sinks else None
    rest = (sinks, case.head_dim**-0.5, case.window, keywords.get("cu_seqlens"), keywords.get("key_padding_mask"))
    return q, k, v, rest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    q, k, v, rest = _arguments(case)
    torch.library.opcheck(torch.ops.gptoss_kernels.attention_forward.default, (q, k, v, *rest))
    out, lse = torch.ops.gptoss_kernels.attention_forward(q, k, v, *rest)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, *rest)
        torch.library.opcheck(torch.ops.gptoss_kernels.attention_backward.default, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_fullgraph_gives_the_same_numbers(case):
    inputs, keywords = case.inputs(DEVICE)

    def loss(*inputs):
        out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
        return (out * torch.arange(case.q_len, device=out.device)[:, None]).sum() + lse.clamp_min(-9.0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    value, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_an_error():
    inputs, _ = AttentionCase(q_len=5).inputs(DEVICE)
    (dq,) = torch.autograd.grad(flash_attention(*inputs, backend="triton").square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
