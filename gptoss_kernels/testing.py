"""Helpers of the tests and benchmarks: random models, attention cases, error budgets, fenced buffers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from .attention.reference import attention_reference

if TYPE_CHECKING:
    from transformers import GptOssForCausalLM

# ------------------------------------------------------------------------------------------------------------ models

_REAL = {
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
}
SHAPES = {
    # Both layer kinds twice, grouped heads, and a window that a hundred tokens overrun.
    "small": {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "vocab_size": 256,
        "max_position_embeddings": 131072,
    },
    "gpt-oss-20b": {"num_hidden_layers": 24, "num_local_experts": 32, **_REAL},
    "gpt-oss-120b": {"num_hidden_layers": 36, "num_local_experts": 128, **_REAL},
}


def random_gpt_oss(
    shapes: str = "small",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str = "eager",
    experts_implementation: str = "eager",
    **overrides,
) -> "GptOssForCausalLM":
    """A gpt-oss with random weights, made in place on the device, in eval mode.

    No weight is zero or constant, so that a test sees each of them: matrices are N(0, 1 / fan_in), embeddings and
    sinks N(0, 1), biases N(0, 0.1^2), norms 1 + N(0, 0.1^2). The same seed gives the same weights on one kind of
    device, whichever implementations are chosen.

    Args:
        shapes: "small" (4 layers, window 32), "gpt-oss-20b" or "gpt-oss-120b".
        device, dtype: of every parameter; "meta" for the shapes alone.
        seed: of the weights.
        attn_implementation, experts_implementation: as in `from_pretrained`.
        overrides: fields of GptOssConfig, for instance num_hidden_layers.

    Raises:
        ValueError: shapes is not one of the names.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    if shapes not in SHAPES:
        raise ValueError(f"shapes: expected one of {', '.join(map(repr, SHAPES))}, got {shapes!r}")
    # The auxiliary loss is off: the checkpoints' coefficient would swamp the language-model loss.
    fields = {**SHAPES[shapes], "router_aux_loss_coef": 0.0, "pad_token_id": None, **overrides}
    config = GptOssConfig(
        **fields, attn_implementation=attn_implementation, experts_implementation=experts_implementation
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    # Its frequencies are computed, not drawn, and "meta" computes nothing.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if torch.device(device).type == "meta":
        return model.eval()  # shapes alone
    return draw_weights(model, seed).eval()


def draw_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter of a gpt-oss model the random values that `random_gpt_oss` describes. Returns the model."""
    generator = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if generator is None:
                generator = torch.Generator(parameter.device).manual_seed(seed)
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif name.endswith(("sinks", "embed_tokens.weight")):
                parameter.normal_(0.0, 1.0, generator=generator)
            else:  # (out, in) of a linear layer, (experts, in, out) of the experts
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionCase:
    """One call of flash_attention to be checked: shapes, dtype and what is masked. `inputs` draws its tensors."""

    q_len: int = 70
    kv_len: int | None = None  # default q_len
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    sinks: bool = True
    window: int | None = None
    documents: tuple[int, ...] | None = None  # lengths that sum to q_len
    padding: str | None = None  # "left" or "right"; the first row of the batch is padded most

    def __str__(self) -> str:
        default = AttentionCase()
        shown = [
            (f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)
        ]
        return (
            ",".join(f"{name}={str(value).removeprefix('torch.').replace(' ', '')}" for name, value in shown) or "plain"
        )

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[list[torch.Tensor], dict]:
        """([q, k, v] or [q, k, v, sinks], keyword arguments of flash_attention), N(0, 1) values, leaves with grad.

        q, k and v are transposed views of (batch, length, heads, head_dim), as Transformers passes them."""
        generator = torch.Generator(device).manual_seed(seed)
        kv_len = self.kv_len or self.q_len

        def draw(*shape):
            return torch.randn(shape, device=device, dtype=torch.float32, generator=generator).to(self.dtype)

        tensors = [
            draw(self.batch, self.q_len, self.q_heads, self.head_dim).transpose(1, 2),
            draw(self.batch, kv_len, self.kv_heads, self.head_dim).transpose(1, 2),
            draw(self.batch, kv_len, self.kv_heads, self.head_dim).transpose(1, 2),
        ]
        if self.sinks:
            tensors.append(draw(self.q_heads))
        keywords = {"sliding_window": self.window}
        if self.documents is not None:
            ends = torch.tensor([0, *self.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            keywords["cu_seqlens"] = ends.to(device)
        if self.padding is not None:
            padded = torch.linspace(0.6, 0.0, self.batch) * kv_len  # keys that are padding, by row
            key = torch.arange(kv_len)
            real = key >= padded.long()[:, None] if self.padding == "left" else key < kv_len - padded.long()[:, None]
            keywords["key_padding_mask"] = real.to(device)
        return [x.requires_grad_() for x in tensors], keywords


def exact_attention(
    inputs: list[torch.Tensor], grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None, **keywords
):
    """[out, lse, dq, dk, dv(, dsinks)] in fp64 by `attention_reference`, one kv head at a time to bound the memory.

    Args:
        inputs: [q, k, v] or [q, k, v, sinks]; shapes as in flash_attention.
        grad_out, grad_lse: gradients of out and lse (none for a row without a key and a sink).
        keywords: sliding_window, cu_seqlens, key_padding_mask, scale.
    """
    q, k, v = inputs[:3]
    group = q.shape[1] // k.shape[1]
    parts = []
    for head in range(q.shape[1]):
        kv = slice(head // group, head // group + 1)
        own = slice(head, head + 1)
        pieces = [q[:, own], k[:, kv], v[:, kv], *(s[own] for s in inputs[3:])]
        leaves = [x.detach().double().requires_grad_() for x in pieces]
        out, lse = attention_reference(*leaves, **keywords)
        seen = lse > float("-inf")
        loss = (out * grad_out[:, own].double()).sum()
        if grad_lse is not None:
            loss = loss + (lse * grad_lse[:, own].double())[seen].sum()
        parts.append([out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)])
    out, lse, dq, dk, dv, *dsinks = zip(*parts, strict=True)
    of_group = lambda grads: torch.cat(grads, 1).unflatten(1, (-1, group)).sum(2)  # noqa: E731
    return [torch.cat(out, 1), torch.cat(lse, 1), torch.cat(dq, 1), of_group(dk), of_group(dv), *map(torch.cat, dsinks)]


# --------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True)
class ExpertsCase:
    """One call of fused_experts to be checked. `inputs` draws its tensors."""

    tokens: int = 37
    hidden: int = 24
    intermediate: int = 40
    experts: int = 5
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    size: float = 3.0  # of the pre-activation's spread: the clamp at 7 cuts some values; 0.5: none
    routing: str = "random"  # "one": all tokens on one expert; "sentinel": a third of the slots is skipped

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in fields(self))

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
        """([x, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias, routing_weights], router_indices): leaves
        with grad; indices are distinct within a token."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape, size=1.0):
            return size * torch.randn(shape, device=device, dtype=torch.float32, generator=generator)

        experts, hidden, intermediate = self.experts, self.hidden, self.intermediate
        tensors = [
            draw(self.tokens, hidden),
            draw(experts, hidden, 2 * intermediate, size=self.size * hidden**-0.5),
            draw(experts, 2 * intermediate),
            draw(experts, intermediate, hidden, size=intermediate**-0.5),
            draw(experts, hidden),
            draw(self.tokens, self.top_k).softmax(-1),
        ]
        shuffled = torch.rand(self.tokens, experts, device=device, generator=generator).argsort(dim=1)
        indices = shuffled[:, : self.top_k]
        if self.routing == "one":
            indices = torch.full_like(indices, experts - 1)
        if self.routing == "sentinel":
            skipped = torch.rand(indices.shape, device=device, generator=generator) < 1 / 3
            indices = indices.masked_fill(skipped, experts)
        return [x.to(self.dtype).requires_grad_() for x in tensors], indices.contiguous()


# ----------------------------------------------------------------------------------------------------------- checks


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of (actual - exact) over the norm of exact, in fp64; infinite if any value is not finite."""
    error = (actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else float("inf")


def delta_rounding(inputs: Sequence[torch.Tensor], grad_out: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
    """What the rounding of two fp32 sums, P's gradient and delta, may leave of their difference in "dq" and "dk".

    Flash attention computes delta = rowsum(dO * O) apart from dO V^T. Where a query sees one key the two are equal and
    dS is 0, but for the rounding of two sums of head_dim products, which depends on their order and so on the machine;
    eager attention subtracts a sum over that one key from itself, rounds nothing, and is no measure for it.

    Args:
        inputs: q, k, v and sinks, if any, as `flash_attention` takes them.
        grad_out: gradient of the output.
        keywords: sliding_window, cu_seqlens, key_padding_mask.

    Returns:
        fp64, shapes of q and k: sqrt(head_dim) eps32 |dO * O| of a query's row, through |dS| to dQ and dK.
    """
    q, k, v, *sinks = (x.detach().double() for x in inputs)
    scale = q.shape[-1] ** -0.5
    out, _ = attention_reference(q, k, v, *sinks, **keywords)
    off = torch.finfo(torch.float32).eps * q.shape[-1] ** 0.5 * (out * grad_out).norm(dim=-1, keepdim=True)
    # Sums over P: an output, and the gradient of the values.
    sizes = k.abs().requires_grad_()
    seen, _ = attention_reference(q, k, sizes, *sinks, **keywords)
    (of_keys,) = torch.autograd.grad(seen, sizes, off * q.abs())
    return {"dq": scale * off * seen.detach(), "dk": scale * of_keys}


def assert_within_budget(
    name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, beside: torch.Tensor | float = 0.0
) -> None:
    """Fail unless |actual - exact| <= 2 (max|eager - exact| + eps max|exact|) + beside, eps of actual's dtype.

    Args:
        actual: the kernel's result.
        eager: the same from plain PyTorch in the same dtype.
        exact: the same in fp64. Where it is -inf (lse of a row that sees nothing), actual must be -inf too.
        beside: what else each number may be off by, as from `delta_rounding`.

    Raises:
        AssertionError: with the size of the error, the budget and the first index over it.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    seen = exact > float("-inf")
    assert torch.equal(actual > float("-inf"), seen), f"{name}: -inf or NaN where a number was expected, or the reverse"
    exact = torch.where(seen, exact.double(), 0.0)
    error = torch.where(seen, actual.double() - exact, 0.0).abs()
    of_eager = torch.where(seen, eager.double() - exact, 0.0).abs().nan_to_num(0.0).max()
    budget = 2 * (of_eager + torch.finfo(actual.dtype).eps * exact.abs().max()).item()
    if not (error <= budget + beside).all():  # NaN is over every budget
        index = tuple((~(error <= budget + beside)).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: error {error.max().item():.3e} is over the budget {budget:.3e}; first at {index}: "
            f"{actual[index].item():.6g} instead of {exact[index].item():.6g}"
        )


def fenced(x: torch.Tensor, value: float = float("nan"), margin: int = 3) -> torch.Tensor:
    """x as a view into a larger buffer filled with `value`, its order of strides kept: a read beside it shows."""
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    shape = [x.shape[d] + 2 * margin if x.shape[d] > 1 and d != x.dim() - 1 else x.shape[d] for d in order]
    view = torch.full(shape, value, dtype=x.dtype, device=x.device)
    for position, d in enumerate(order):
        view = view.narrow(position, margin if view.shape[position] != x.shape[d] else 0, x.shape[d])
    view = view.permute([order.index(d) for d in range(x.dim())])
    with torch.no_grad():
        view.copy_(x)
    return view
