"""Random calls of the kernels and their check against the definitions in fp64: for the tests, and a GPU for a long run.

Everything is drawn from a `random.Random`, so that hypothesis can draw, and shrink, in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from . import flash_attention, fused_experts
from .attention.reference import attention_concat, attention_reference
from .experts.reference import experts_reference
from .testing import AttentionCase, ExpertsCase, fenced

# (q_heads, kv_heads, head_dim, dtype): of a GPU, and of the interpreter, which cannot do bf16 and takes its time.
GPU_SHAPES = [
    (16, 2, 64, torch.bfloat16),
    (4, 4, 64, torch.bfloat16),
    (8, 2, 64, torch.float16),
    (4, 2, 128, torch.bfloat16),
    (8, 1, 96, torch.bfloat16),
    (2, 1, 16, torch.float16),
    (8, 2, 32, torch.bfloat16),
    (4, 1, 64, torch.float32),
    (2, 2, 128, torch.float32),
]
INTERPRETER_SHAPES = [
    (q_heads, kv_heads, head_dim, dtype)
    for q_heads, kv_heads in ((1, 1), (2, 1), (2, 2))
    for head_dim in (16, 32, 64, 96, 128)
    for dtype in (torch.float32, torch.float16)
]
ATTENTION = ("out", "lse", "dq", "dk", "dv", "dsinks")
EXPERTS = ("y", "dx", "dgate_up_proj", "dgate_up_proj_bias", "ddown_proj", "ddown_proj_bias", "drouting_weights")
LAYOUTS = ("heads last", "heads first", "fused", "fenced", "last stride 2")
SINKS = ("normal", "normal", "none", "huge", "minus infinity")
EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class AttentionCall:
    """A case, and what is odd about its tensors."""

    case: AttentionCase
    sinks: str = "normal"  # of SINKS; huge: 1e4 or -1e4, each head one of them
    sinks_dtype: torch.dtype = torch.float32
    layouts: tuple[str, str, str, str] = ("heads last",) * 4  # of q, k, v and the gradient; of LAYOUTS
    holes: int = 0  # keys that are padding wherever they stand, of each row of the batch
    no_keys: bool = False  # a row of the batch has no key at all
    size: float = 1.0  # of q and k
    infinity: float = 0.0  # inf or -inf: all scores of the key in the middle; forward alone
    seed: int = 0

    def __str__(self) -> str:
        odd = {name: value for name, value in vars(self).items() if value != getattr(AttentionCall(self.case), name)}
        return f"AttentionCall({self.case}; {', '.join(f'{name}={value}' for name, value in odd.items())})"


def draw_attention(random: Random, longest: int, shapes: Sequence[tuple]) -> AttentionCall:
    """A call of flash_attention.

    Args:
        random: whatever it draws is all that differs.
        longest: tokens of queries and keys.
        shapes: (q_heads, kv_heads, head_dim, dtype), to choose from; each is compiled anew on a GPU.
    """
    length = lambda: random.choice([1, 2, random.randint(1, longest), random.randint(1, longest), longest])  # noqa: E731
    mask = random.choice(["none", "none", "documents", "padding", "padding", "decoding"])
    q_len = length()
    kv_len = q_len + random.randint(0, longest - q_len) if mask in ("decoding", "padding") else q_len
    documents = None
    if mask == "documents":
        cuts = sorted(random.sample(range(1, q_len), min(q_len - 1, random.randint(0, 6)))) if q_len > 1 else []
        documents = tuple(b - a for a, b in zip([0, *cuts], [*cuts, q_len], strict=True))
    q_heads, kv_heads, head_dim, dtype = random.choice(shapes)
    padding = random.choice(["left", "right", "holes"]) if mask == "padding" else None
    window = random.choice([None, None, 1, random.randint(1, longest), random.randint(1, 2 * longest)])
    sinks = random.choice(SINKS)
    case = AttentionCase(
        q_len=q_len,
        kv_len=kv_len,
        batch=1 if documents else random.choice([1, 1, 2]),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        sinks=sinks != "none",
        window=window,
        documents=documents,
        padding=None if padding == "holes" else padding,
    )
    return AttentionCall(
        case,
        sinks=sinks,
        sinks_dtype=random.choice([torch.float32, dtype]),
        layouts=tuple(random.choice(LAYOUTS) for _ in range(4)),
        holes=random.randint(1, kv_len) if padding == "holes" else 0,
        no_keys=padding is not None and random.random() < 0.3,
        size=random.choice([1.0, 1.0, 1.0, 5.0]),
        infinity=random.choice([float("inf"), float("-inf")]) if random.random() < 0.1 else 0.0,
        seed=random.randint(0, 2**31 - 1),
    )


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (batch, heads, length, head_dim) numbers with other strides; what lies between them is NaN."""
    if layout == "heads first":
        return x.contiguous()
    if layout == "fenced":
        return fenced(x)
    if layout == "last stride 2":
        view = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)[..., ::2]
    else:
        batch, heads, length, dim = x.shape
        room = 2 * heads if layout == "fused" else heads
        view = torch.full((batch, length, room, dim), float("nan"), dtype=x.dtype, device=x.device)
        view = view[:, :, room - heads :].transpose(1, 2)
    return view.copy_(x)


def attention_inputs(call: AttentionCall, device: torch.device | str) -> tuple[list[torch.Tensor], dict, list]:
    """(q, k, v and sinks if any, keyword arguments, gradients of out and lse)."""
    case = call.case
    inputs, keywords = replace(case, sinks=False).inputs(device, call.seed)
    q, k, v = (x.detach() for x in inputs)
    generator = torch.Generator(device).manual_seed(call.seed + 1)
    q, k = q * call.size, k * call.size
    if call.holes or call.no_keys:
        real = keywords.get("key_padding_mask")
        real = torch.ones(case.batch, case.kv_len, dtype=torch.bool, device=device) if real is None else real.clone()
        for row in real if call.holes else ():
            row[torch.randperm(case.kv_len, device=device, generator=generator)[: call.holes]] = False
        if call.no_keys:
            real[-1] = False
        keywords["key_padding_mask"] = real
    if call.infinity:
        q[..., 0] = q[..., 0].abs() + 0.1
        k[:, :, (case.kv_len or case.q_len) // 2, 0] = call.infinity
    grad = torch.randn(q.shape, device=device, generator=generator).to(case.dtype)
    q, k, v, grad = (_laid_out(x, layout) for x, layout in zip((q, k, v, grad), call.layouts, strict=True))
    grad_lse = torch.randn(q.shape[:3], device=device, generator=generator)
    tensors = [q, k, v]
    if case.sinks:
        sinks = torch.randn(case.q_heads, device=device, generator=generator)
        if call.sinks == "huge":
            sinks = torch.where(sinks > 0, 1e4, -1e4)
        elif call.sinks == "minus infinity":
            sinks[0] = float("-inf")
        tensors.append(sinks.to(call.sinks_dtype))
    return [x.requires_grad_() for x in tensors], keywords, [grad, grad_lse]


def check_attention(call: AttentionCall, device: torch.device | str, **wrong) -> float:
    """Runs a call, forward and backward, and holds it against fp64.

    An error is allowed up to 4 times the largest of plain PyTorch in the call's dtype, 8 eps of the largest number,
    what 8 eps32 of the largest score do to an exponential, and, of gradients, what rounding the output and summing
    head_dim products do to delta; the sinks' gradient is a sum that cancels, and is measured by its terms' magnitudes.
    -inf and NaN must stand where the definition has them, and nowhere else.

    Args:
        call: from `draw_attention`.
        device: where the kernels run.
        wrong: keywords that the kernel gets in the place of the call's: to see whether they are noticed.

    Returns:
        The largest of the errors, as a share of what is allowed: 0 to 1.

    Raises:
        AssertionError: one is beyond it, with the call.
    """
    inputs, keywords, (grad, grad_lse) = attention_inputs(call, device)
    case = call.case
    out, lse = flash_attention(*inputs, **(keywords | wrong), return_lse=True, backend="triton")
    eager = list(attention_concat(*inputs, **keywords, compute_dtype=case.dtype))
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = list(attention_reference(*doubles, **keywords))
    actual = [out, lse]
    eps = torch.finfo(case.dtype).eps
    top = lambda x: x.detach().double().nan_to_num(0, 0, 0).abs().max().item()  # noqa: E731
    # An exponential of a score s is off by a share of eps32 |s|; half precision rounds more than that elsewhere.
    share = 8 * eps + 8 * EPS32 * max(top(exact[1]), 1.0)
    allowed = [share * top(exact[0]), 8 * EPS32 * max(top(exact[1]), 1.0)]
    if not call.infinity:
        grad_lse = torch.where(exact[1] > float("-inf"), grad_lse.double(), 0.0)
        for results, leaves in ((actual, inputs), (eager, inputs), (exact, doubles)):
            gradients = grad.to(results[0].dtype), grad_lse.to(results[1].dtype)
            results += torch.autograd.grad(results[:2], leaves, gradients)
        # What delta may be off by: rounding of the output, and a sum of head_dim products in fp32.
        off = (3 * eps + EPS32 * case.head_dim**0.5) * top((grad.double() * exact[0]).square().sum(-1).sqrt())
        scale, group = case.head_dim**-0.5, case.q_heads // case.kv_heads
        many = (group * case.q_len) ** 0.5
        allowed += [
            share * top(exact[2]) + scale * off * top(inputs[1]),
            share * top(exact[3]) + scale * off * top(inputs[0]) * many,
            share * top(exact[4]),
        ]
        if case.sinks:
            weight = (doubles[3].detach()[:, None] - exact[1].detach()).exp().nan_to_num(0, 0, 0)
            terms = (grad.double() * exact[0]).abs().sum(-1).detach() + grad_lse.abs()
            own = torch.finfo(inputs[3].dtype).eps
            allowed.append((share + own) * (weight * terms).sum((0, 2)).max().item())
    shares = [
        _judge(f"{name} of {call}", *results)
        for name, *results in zip(ATTENTION, actual, exact, eager, allowed, strict=False)
    ]
    return max(shares)


def _judge(name: str, actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, allowed: float) -> float:
    """The largest error over what is allowed beyond 4 times eager's; AssertionError if that is over 1."""
    actual, exact, eager = (x.detach().double() for x in (actual, exact, eager))
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    assert (finite | same).all(), f"{name}: expected {exact[~(finite | same)][:3].tolist()}, got another number"
    # Eager has no answer for a row with neither key nor sink, and overflows where the kernel need not.
    error = torch.where(finite, actual - exact, 0.0).abs()
    of_eager = torch.where(finite, eager - exact, 0.0).abs().nan_to_num(0, 0, 0).max().item()
    limit = 4 * of_eager + allowed
    worst = error.max().item() if not error.isnan().any() else float("inf")
    assert worst <= limit, f"{name}: error {worst:.3e}, allowed {limit:.3e}"
    return worst / limit if limit else 0.0


# --------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True)
class ExpertsCall:
    """A case, and what else of it is drawn."""

    case: ExpertsCase
    strided: bool = False  # x is a slice of a wider buffer of NaN, and so is the gradient
    weights_dtype: torch.dtype = torch.float32
    limit: float = 7.0  # 1000: nothing is clamped
    seed: int = 0


def draw_experts(random: Random, tokens: int, dtypes: list[torch.dtype]) -> ExpertsCall:
    """A call of fused_experts; see `draw_attention`. Sizes are multiples of 8, as grouped products want them."""
    experts = random.randint(1, 8)
    case = ExpertsCase(
        tokens=random.choice([1, 2, random.randint(1, tokens), random.randint(1, tokens)]),
        hidden=8 * random.randint(1, 8),
        intermediate=8 * random.randint(1, 8),
        experts=experts,
        top_k=random.randint(1, min(experts, 4)),
        dtype=random.choice(dtypes),
        size=random.choice([0.5, 3.0, 10.0]),
        routing=random.choice(["random", "random", "one", "sentinel"]),
    )
    return ExpertsCall(
        case,
        strided=random.random() < 0.5,
        weights_dtype=random.choice([torch.float32, case.dtype]),
        limit=random.choice([7.0, 1000.0]),
        seed=random.randint(0, 2**31 - 1),
    )


def check_experts(call: ExpertsCall, device: torch.device | str, **wrong) -> float:
    """As `check_attention`, for fused_experts. Allowed are 4 times the largest error of plain PyTorch in the call's
    dtype and 16 eps of the largest number, and of the routing weights' gradient, an inner product that cancels, 4 eps
    of the product of its factors' norms. Gradients jump at the clamp: where a number is too near for the dtype to
    tell on which side it is, the output alone is compared."""
    case = call.case
    inputs, indices = case.inputs(device, call.seed)
    inputs = [x.detach() for x in inputs]
    generator = torch.Generator(device).manual_seed(call.seed + 1)
    grad = torch.randn(case.tokens, case.hidden, device=device, generator=generator).to(case.dtype)
    if call.strided:
        inputs[0], grad = (fenced(x) for x in (inputs[0], grad))
    inputs[5] = inputs[5].to(call.weights_dtype)
    leaves = [x.requires_grad_() for x in inputs]

    eps = torch.finfo(case.dtype).eps
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    with torch.no_grad():
        hidden = torch.einsum("th,ehi->tei", doubles[0], doubles[1]) + doubles[2]
        smooth = ((hidden.abs() - call.limit).abs() > 8 * eps * call.limit).all().item()

    def run(function, leaves, grad, **options):
        y = function(*leaves[:5], indices, leaves[5], **({"limit": call.limit} | options))
        return [y, *(torch.autograd.grad(y, leaves, grad) if smooth else ())]

    actual = run(fused_experts, leaves, grad, backend="triton", **wrong)
    eager = run(experts_reference, [x.detach().to(case.dtype).requires_grad_() for x in inputs], grad)
    exact = run(experts_reference, doubles, grad.double())
    allowed = [16 * eps * x.detach().abs().max().item() for x in exact]
    with torch.no_grad():
        for slot in range(case.top_k) if smooth else ():  # what a choice gives, before its weight
            alone = torch.zeros_like(doubles[5])
            alone[:, slot] = 1
            norms = experts_reference(*doubles[:5], indices, alone, limit=call.limit).norm(dim=-1) * grad.double().norm(
                dim=-1
            )
            allowed[6] = max(allowed[6], 4 * eps * norms.max().item())
    return max(
        _judge(f"{name} of {call}", *results)
        for name, *results in zip(EXPERTS, actual, exact, eager, allowed, strict=False)
    )
