"""Cross-entropy of an LM head whose logits are never all there: chunks of tokens, gradients made on the way.

A chunk's logits are one matrix product; a kernel reads them for the log-sum-exp and overwrites them with their
gradient, and a second product turns that into the gradient of the hidden states. Two products in all, where a
recomputing loss takes three.
"""

import torch
import triton
import triton.language as tl

CHUNK = 4096  # tokens; at 201,088 words 1.6 GB of logits in bf16, and products at full speed


@triton.jit(do_not_specialize=["stride"])
def cross_entropy_kernel(
    logits,  # (tokens, VOCAB), overwritten with the loss's gradient
    labels,  # (tokens,) int64, each a word
    token_weights,  # (tokens,) fp32
    losses,  # (tokens,) fp32, weighted
    stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    weight = tl.load(token_weights + row)
    running_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, VOCAB, BLOCK):  # a maximum and a sum a lane: one reduction at the end
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < VOCAB, other=-1.0e30).to(tl.float32)
        new_max = tl.maximum(running_max, z)
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.exp(z - new_max)
        running_max = new_max
    maximum = tl.max(running_max, 0)
    lse = maximum + tl.log(tl.sum(running_sum * tl.exp(running_max - maximum), 0))
    tl.store(losses + row, weight * (lse - tl.load(logits + label).to(tl.float32)))
    tl.debug_barrier()  # every lane has read the label's logit before any is overwritten
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < VOCAB
        z = tl.load(logits + column, mask=mask, other=-1.0e30).to(tl.float32)
        grad = weight * (tl.exp(z - lse) - tl.where(column == label, 1.0, 0.0))
        tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=mask)


torch.library.define(
    "gptoss_kernels::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor token_weights, bool need_hidden, bool need_weight)"
    " -> (Tensor losses, Tensor dhidden, Tensor dweight)",
)


@torch.library.impl("gptoss_kernels::linear_cross_entropy", "default")
def _linear_cross_entropy(hidden, weight, labels, token_weights, need_hidden, need_weight):
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else hidden.new_empty(0)
    width = triton.cdiv(vocab, 8) * 8  # rows of the buffer start at multiples of 16 bytes
    buffer = hidden.new_empty(min(tokens, CHUNK), width)
    for start in range(0, tokens, CHUNK):
        part = slice(start, min(start + CHUNK, tokens))
        logits = buffer[: part.stop - start, :vocab]
        torch.matmul(hidden[part], weight.T, out=logits)
        with torch.cuda.device_of(hidden):
            cross_entropy_kernel[(part.stop - start,)](
                logits, labels[part], token_weights[part], losses[part], width,
                VOCAB=vocab, BLOCK=min(4096, triton.next_power_of_2(vocab)), num_warps=8,
            )  # fmt: skip
        if need_hidden:
            torch.matmul(logits, weight, out=dhidden[part])
        if need_weight:
            dweight += logits.T @ hidden[part]
    return losses, dhidden, dweight.to(weight.dtype)


@torch.library.register_fake("gptoss_kernels::linear_cross_entropy")
def _linear_cross_entropy_fake(hidden, weight, labels, token_weights, need_hidden, need_weight):
    dhidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    dweight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights):
        losses, dhidden, dweight = torch.ops.gptoss_kernels.linear_cross_entropy(
            hidden, weight, labels, token_weights, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(dhidden, dweight)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        dhidden, dweight = ctx.saved_tensors
        return (*(d * grad.to(d.dtype) if need else None
                for d, need in zip((dhidden, dweight), ctx.needs_input_grad, strict=False)), None, None)  # fmt: skip


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over tokens of token_weight * -log softmax(hidden weight^T)[label], without the logits of all tokens.

    Args:
        hidden: (tokens, hidden), fp16, bf16 or fp32.
        weight: (vocab, hidden) of the LM head, hidden's dtype.
        labels: (tokens,) int64; a negative one (-100) is masked: its token is not computed at all.
        token_weights: (tokens,), default 1. For a mean, divide by their sum here: what comes back is a sum, and the
            gradient is rounded to hidden's dtype after the weight is in it.

    Returns:
        A scalar, fp32. Differentiable in hidden and weight, once. Masked tokens are found with one host sync.
    """
    kept = (labels >= 0).nonzero().flatten()
    if token_weights is None:
        token_weights = hidden.new_ones(labels.shape, dtype=torch.float32)
    if kept.numel() == 0:
        return (hidden * 0).sum().float() + (weight[:1] * 0).sum().float()
    if kept.numel() < labels.numel():
        hidden, labels, token_weights = hidden[kept], labels[kept], token_weights[kept]
    return _LinearCrossEntropy.apply(
        hidden.contiguous(), weight.contiguous(), labels.contiguous(), token_weights.float().contiguous()
    )
