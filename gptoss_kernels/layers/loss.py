"""Cross-entropy of a frozen LM head whose logits are never all there: chunks of tokens, gradients made on the way.

A chunk's logits are one matrix product; a kernel reads them for the log-sum-exp and overwrites them with their
gradient, and a second product turns that into the gradient of the hidden states. Two products in all, where a
recomputing loss takes three. A token's loss depends on its own hidden state alone, so that whatever weight it has in
the final loss is applied to its row in the backward pass.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..operators import implements, once_differentiable
from .chunks import chunk_size


@triton.jit(do_not_specialize=["stride"])
def cross_entropy_kernel(
    logits,  # (tokens, VOCAB), overwritten with the loss's gradient if NEED_GRAD
    labels,  # (tokens,) int64, each a word
    losses,  # (tokens,) fp32
    entropies,  # (tokens,) fp32
    top1,  # (tokens,) bool: no word has a larger logit than the label
    stride,
    VOCAB: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    running_max = tl.full([BLOCK], -1.0e30, dtype=tl.float32)
    running_sum = tl.zeros([BLOCK], dtype=tl.float32)
    running_dot = tl.zeros([BLOCK], dtype=tl.float32)  # sum of exp(z - max) z
    for start in range(0, VOCAB, BLOCK):  # a maximum and two sums a lane: one reduction at the end
        column = start + tl.arange(0, BLOCK)
        mask = column < VOCAB
        z = tl.load(logits + column, mask=mask, other=-1.0e30).to(tl.float32)
        new_max = tl.maximum(running_max, z)
        rescale = tl.exp(running_max - new_max)
        p = tl.where(mask, tl.exp(z - new_max), 0.0)
        running_sum = running_sum * rescale + p
        running_dot = running_dot * rescale + p * z
        running_max = new_max
    maximum = tl.max(running_max, 0)
    rescale = tl.exp(running_max - maximum)
    total = tl.sum(running_sum * rescale, 0)
    lse = maximum + tl.log(total)
    own = tl.load(logits + label).to(tl.float32)
    tl.store(losses + row, lse - own)
    tl.store(entropies + row, lse - tl.sum(running_dot * rescale, 0) / total)
    tl.store(top1 + row, own >= maximum)
    if NEED_GRAD:
        tl.debug_barrier()  # every lane has read the label's logit before any is overwritten
        for start in range(0, VOCAB, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < VOCAB
            z = tl.load(logits + column, mask=mask, other=-1.0e30).to(tl.float32)
            grad = tl.exp(z - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=mask)


torch.library.define(
    "gptoss_kernels::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, bool need_grad)"
    " -> (Tensor losses, Tensor entropies, Tensor top1, Tensor dhidden)",
)


@implements("gptoss_kernels::linear_cross_entropy")
def _linear_cross_entropy(hidden, weight, labels, need_grad):
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses, entropies = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    top1 = hidden.new_empty(tokens, dtype=torch.bool)
    dhidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0)
    width = triton.cdiv(vocab, 8) * 8  # rows of the buffer start at multiples of 16 bytes
    chunk = chunk_size(tokens)
    buffer = hidden.new_empty(chunk, width)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = buffer[: part.stop - start, :vocab]
        torch.matmul(hidden[part], weight.T, out=logits)
        constants = dict(VOCAB=vocab, NEED_GRAD=need_grad, BLOCK=min(4096, triton.next_power_of_2(vocab)))
        arguments = (logits, labels[part], losses[part], entropies[part], top1[part], width)
        launch(cross_entropy_kernel, (part.stop - start,), arguments, constants, num_warps=8)
        if need_grad:
            torch.matmul(logits, weight, out=dhidden[part])
    return losses, entropies, top1, dhidden


@torch.library.register_fake("gptoss_kernels::linear_cross_entropy")
def _linear_cross_entropy_fake(hidden, weight, labels, need_grad):
    row = lambda dtype: hidden.new_empty(hidden.shape[0], dtype=dtype)  # noqa: E731
    dhidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0)
    return row(torch.float32), row(torch.float32), row(torch.bool), dhidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        losses, entropies, top1, dhidden = torch.ops.gptoss_kernels.linear_cross_entropy(
            hidden, weight, labels, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(dhidden)
        ctx.mark_non_differentiable(entropies, top1)
        return losses, entropies, top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (dhidden,) = ctx.saved_tensors
        return dhidden * grad[:, None].to(dhidden.dtype), None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-log softmax(hidden weight^T)[label] of each token, without the logits of all tokens.

    Args:
        hidden: (tokens, hidden), fp16, bf16 or fp32.
        weight: (vocab, hidden) of the LM head, hidden's dtype; frozen.
        labels: (tokens,) int64, 0 … vocab - 1. Leave masked tokens out: they would cost what the others do.

    Returns:
        losses (tokens,) fp32, differentiable once, in hidden; and without gradient entropies (tokens,) fp32 of the
        predictions, and top1 (tokens,) bool, whether no word is likelier than the label. Bitwise reproducible.

    Raises:
        ValueError: weight requires a gradient, which is not computed here.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen LM head, got one that requires a gradient")
    if hidden.shape[0] == 0:
        nothing = hidden.sum(dim=-1).float()
        return nothing, nothing.detach(), nothing.bool()
    return _LinearCrossEntropy.apply(hidden.contiguous(), weight.contiguous(), labels.contiguous())
