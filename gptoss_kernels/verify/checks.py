"""The checks: what each measures of a stack, against what limit, and what to do where it fails.

A check that compares with the written-out reference can only be judged where what comes before it is right: `after`
names the checks whose failure explains this one's. All others compare the stack with itself, or look at one part alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..finetune.config import LORA_TARGETS
from ..finetune.errors import SetupError
from ..finetune.model import census
from ..testing import relative_error
from .stack import Stack

PASS, FAIL, NOT_APPLICABLE = "PASS", "FAIL", "n.a."


@dataclass
class Row:
    """One line of the table: figure is the measured number, measured and limit are it and its bound as text."""

    check: str
    status: str
    figure: float | None = None
    measured: str = ""
    limit: str = ""
    advice: str = ""


@dataclass
class Finding:
    """What a check found. wrong: a FAIL. figure None: nothing to judge, `measured` says why."""

    wrong: bool
    figure: float | None
    measured: str
    limit: str = ""


@dataclass
class Check:
    name: str
    measure: Callable[[Stack], Finding]
    advice: str
    after: tuple[str, ...]


CHECKS: list[Check] = []


def check(name: str, advice: str, after: tuple[str, ...] = ()) -> Callable:
    """Decorator: adds the function to the checks, in the order of the file."""

    def decorate(function: Callable[[Stack], Finding]) -> Callable[[Stack], Finding]:
        CHECKS.append(Check(name, function, advice, after))
        return function

    return decorate


def run_checks(stack: Stack, say: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """A row for each check. An exception within a check is its failure.

    Raises:
        SetupError: the GPU's memory does not suffice.
    """
    rows: dict[str, Row] = {}
    for one in CHECKS:
        try:
            found = one.measure(stack)
        except torch.OutOfMemoryError as error:
            raise SetupError(f"verify: {one.name}: the GPU is too small for it, or too full") from error
        except Exception as error:  # whatever a stack raises, it does not do what the check asks of it
            found = Finding(True, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        status = FAIL if found.wrong else PASS if found.figure is not None else NOT_APPLICABLE
        advice = one.advice if found.wrong else ""
        causes = [name for name in one.after if rows[name].status == FAIL]
        if found.wrong and causes:
            status, advice = NOT_APPLICABLE, f"to be judged once this is right: {', '.join(causes)}"
        rows[one.name] = Row(one.name, status, found.figure, found.measured, found.limit, advice)
        say(rows[one.name])
    return list(rows.values())


def nothing(why: str) -> Finding:
    return Finding(False, None, why)


def relative(figure: float, limit: float, what: str = "relative error") -> Finding:
    return Finding(not figure <= limit, figure, f"{what} {figure:.1e}", f"{limit:.1e}")


# ---------------------------------------------------------------------------------------------------- what is trained


@check("trained parameters", "compare lora_targets, use_peft and requires_grad with what was meant to be trained")
def trained_parameters(stack: Stack) -> Finding:
    """The census of trained parameters is what the shapes and lora_targets say."""
    args, config = stack.combination.arguments.model, stack.config
    found, remark = census(stack.model), ""
    if not args.use_peft:
        total = sum(p.numel() for p in stack.model.parameters())
        expected = {"all": total}
        found = {"all": sum(found.values())}
    else:
        targets = args.lora_targets
        if targets is None:
            if args.lora_target_modules not in ("all-linear", ["all-linear"]) or args.lora_target_parameters:
                return nothing("adapters by names of modules and parameters: see the run's own census")
            targets, remark = ["attention"], " (all-linear reaches neither experts nor router)"
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        dim, inner, experts = config.head_dim, config.intermediate_size, config.num_local_experts
        sizes = {  # rank times the sum of both sides, of each matrix
            "attention": 2 * (hidden + heads * dim) + 2 * (hidden + groups * dim),
            "experts": experts * (hidden + 2 * inner + inner + hidden),
            "router": hidden + experts,
        }
        expected = {part: len(stack.layers) * args.lora_r * sizes[part] for part in LORA_TARGETS if part in targets}
    text = ", ".join(f"{part} {count:,}" for part, count in found.items()) or "none"
    wanted = ", ".join(f"{part} {count:,}" for part, count in expected.items())
    wrong = found != expected
    return Finding(wrong, float(sum(found.values())), text + remark, wanted if wrong else "as asked for")


@check(
    "adapters applied",
    "an adapter is trained but not used, or not fully: use experts_implementation grouped_mm with PEFT's own forward, "
    "or gptoss_triton with lora_targets",
)
def adapters_applied(stack: Stack) -> Finding:
    """Each kind of adapter alone moves the output as much as it must."""
    if not stack.adapters():
        return nothing("no adapters")
    ids, routing = stack.ids[0], stack.routing[0]

    def outputs(kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        with stack.only(kind), torch.no_grad():
            found = stack.forward(ids[None], routing=routing, attention_mask=torch.ones_like(ids)[None]).hidden[0]
            return found.double(), stack.exact.hidden(ids, routing)[0].double()

    without, ratios = outputs(None), {}
    for kind in stack.adapters():
        moved, expected = (x - y for x, y in zip(outputs(kind), without, strict=True))
        ratios[kind] = ((moved * expected).sum() / expected.square().sum()).item()
    worst = max(ratios, key=lambda kind: abs(ratios[kind] - 1))
    figure = ratios[worst]
    return Finding(
        not 0.8 <= figure <= 1.25, figure, f"{worst} moves the output {figure:.3f} times what it must", "0.8 to 1.25"
    )


# -------------------------------------------------------------------------------------------------- who sees whom


@check("window", "the layer's sliding_window counts the query's own key: 128 keys, not a radius of 128")
def window(stack: Stack) -> Finding:
    """One key is moved: exactly the window's outputs change in a sliding layer, all later ones in a full layer."""
    ids, at = stack.ids[2], 3
    length, wanted = len(ids), stack.config.sliding_window
    record = stack.forward(ids[None], routing=stack.routing[2], attention_mask=torch.ones_like(ids)[None])
    counts, wrong = {}, False
    for kind, module, call in zip(stack.config.layer_types, stack.attentions, record.attention, strict=True):
        hidden = call["hidden_states"]
        moved = hidden.clone()
        moved[:, at] = 8 * hidden.flip(-1)[:, at]
        with torch.no_grad(), stack.trainer.accelerator.autocast():
            before, after = (module(**{**call, "hidden_states": x})[0] for x in (hidden, moved))
        changed = (before != after).any(-1)[0].nonzero().flatten().tolist()
        last = at + wanted if kind == "sliding_attention" else length
        wrong |= changed != list(range(at, last))
        counts[kind] = len(changed)
    sliding, full = counts["sliding_attention"], counts["full_attention"]
    text = f"a key is seen by {sliding} queries; in full layers by {full} of {length - at}"
    return Finding(wrong, float(sliding), text, f"{wanted}; {length - at}")


@check(
    "packed = alone",
    "documents of a row see each other: attn_implementation gptoss_triton (or gptoss_fa4), or packing false",
)
def packed(stack: Stack) -> Finding:
    """Documents that share a row get the hidden states that they get alone."""
    if stack.combination.strict and not stack.combination.joined:
        return nothing("packing is off")
    batch, routing = stack.packed()
    found = stack.split(stack.step(batch, routing).hidden)
    return relative(max(map(relative_error, found, stack.alone)), stack.limit(stack.rounding))


@check("padded = unpadded", "padding is not masked: attn_implementation gptoss_triton, or packing and padding_free")
def padded(stack: Stack) -> Finding:
    """Documents padded on the right, and on the left, get the hidden states that they get alone."""
    if stack.combination.strict and stack.combination.joined:
        return nothing("packed rows have no padding")
    figures = {}
    for side in ("right", "left"):
        batch, routing = stack.padded(side)
        try:
            found = stack.split(stack.step(batch, routing).hidden, side)
        except ValueError as error:
            if stack.combination.joined and "padding" in str(error):
                return nothing("padding is refused, and the run packs")
            raise
        figures[side] = max(map(relative_error, found, stack.alone))
    side = max(figures, key=figures.get)
    return relative(figures[side], stack.limit(stack.rounding), f"{side}: relative error")


@check(
    "decode = prefill", "generate with the default dynamic cache, and the attention that was trained with", ("window",)
)
def decode(stack: Stack) -> Finding:
    """Token by token through the cache, beyond the window, as in one pass."""
    ids, routing, steps = stack.ids[2], stack.routing[2], 6
    start = len(ids) - steps
    part = lambda a, b: [x[a:b] for x in routing]  # noqa: E731
    mask = torch.ones_like(ids)[None]
    whole = stack.forward(ids[None], routing=routing, train=False, attention_mask=mask).hidden[0, start:]
    record = stack.forward(
        ids[None, :start], routing=part(0, start), train=False, use_cache=True, attention_mask=mask[:, :start]
    )
    cache, found = record.output.past_key_values, []
    for at in range(start, len(ids)):
        record = stack.forward(
            ids[None, at : at + 1],
            routing=part(at, at + 1),
            train=False,
            use_cache=True,
            past_key_values=cache,
            attention_mask=mask[:, : at + 1],
        )
        found.append(record.hidden[0, 0])
    return relative(relative_error(torch.stack(found), whole), stack.limit(stack.rounding))


# ------------------------------------------------------------------------------------------------------- activation


def experts_alone(measure: Callable[[Stack], Finding]) -> Callable[[Stack], Finding]:
    """Decorator: without adapters."""

    @functools.wraps(measure)
    def bare(stack: Stack) -> Finding:
        with stack.only(None):
            return measure(stack)

    return bare


def experts_results(stack: Stack, size: float) -> tuple[Callable, Callable, tuple]:
    """(exact(alpha, limit), eager(), found) of the first layer's experts: each is the output and the input's gradient.
    The largest pre-activation is `size` times the limit."""
    module, generator = stack.layers[0].mlp.experts, torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(stack.device)  # noqa: E731
    experts, top_k, tokens = stack.config.num_local_experts, stack.config.num_experts_per_tok, 64
    x = draw(tokens, stack.config.hidden_size)
    with torch.no_grad():
        x = (x * (size * stack.exact.limit / stack.exact.peak(module, x))).to(stack.dtype)
    indices = draw(tokens, experts).argsort(1)[:, :top_k].contiguous()
    shares, grad = draw(tokens, top_k).softmax(-1).to(stack.dtype), draw(*x.shape).to(stack.dtype)

    def both(compute: Callable, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.to(dtype).detach().requires_grad_()
        out = compute(leaf, indices, shares.to(dtype))
        return out.detach().double(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0].double()

    def exact(alpha: float, limit: float):
        return both(lambda *inputs: stack.exact.experts(module, *inputs, alpha, limit), stack.exact.dtype)

    def eager():
        return both(lambda *inputs: stack.eager.experts(module, *inputs), stack.dtype)

    stack.model.train()
    with stack.trainer.accelerator.autocast():
        found = both(module, stack.dtype)
    return exact, eager, found


def fit_alpha(stack: Stack) -> tuple[float, float, float]:
    """(alpha that fits best, error at the right alpha, plain PyTorch's error), below the clamp."""
    exact, eager, (found, _) = experts_results(stack, 0.8)
    alpha, limit = stack.exact.alpha, stack.exact.limit
    right, step = exact(alpha, limit)[0], 1e-3
    for _ in range(6):  # Gauss-Newton in one variable
        here = exact(alpha, limit)[0]
        slope = (exact(alpha + step, limit)[0] - here) / step
        alpha += ((found - here) * slope).sum().item() / slope.square().sum().item()
        alpha = min(max(alpha, 0.05), 10.0)
    return alpha, relative_error(found, right), relative_error(eager()[0], right)


@check(
    "activation: alpha", "experts_implementation gptoss_triton, grouped_mm or eager: (up + 1) gate sigmoid(1.702 gate)"
)
@experts_alone
def activation(stack: Stack) -> Finding:
    """Experts below the clamp, and the alpha that explains their output best."""
    alpha, figure, rounding = fit_alpha(stack)
    found = relative(figure, stack.limit(rounding))
    found.measured = f"alpha {alpha:.4f}, {found.measured}"
    return found


@check("activation: clamp", "experts_implementation gptoss_triton, grouped_mm or eager: gate at most 7, up within ±7")
@experts_alone
def clamp(stack: Stack) -> Finding:
    """Experts far beyond the clamp, and their gradient, given the alpha that was measured."""
    alpha = fit_alpha(stack)[0]
    exact, eager, found = experts_results(stack, 4.0)
    limits = [stack.exact.limit * x for x in (0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.4, 2.0, 10.0)]
    best = min(limits, key=lambda limit: relative_error(found[0], exact(alpha, limit)[0]))
    right, plain = exact(alpha, stack.exact.limit), exact(stack.exact.alpha, stack.exact.limit)
    errors = [relative_error(*pair) for pair in zip(found, right, strict=True)]
    bounds = [stack.limit(relative_error(*pair)) for pair in zip(eager(), plain, strict=True)]
    clamped = f"clamp {best:.3g}" if best < limits[-1] else "no clamp"
    return Finding(
        not all(figure <= bound for figure, bound in zip(errors, bounds, strict=True)),
        max(errors),
        f"{clamped}, relative error {errors[0]:.1e}, of the gradient {errors[1]:.1e}",
        f"{bounds[0]:.1e}, {bounds[1]:.1e}",
    )


# -------------------------------------------------------------------------------------------------------------- loss


def own_step(stack: Stack):
    """The step of all documents in the run's form, made once."""
    if not hasattr(stack, "_own_step"):
        batch, routing = stack.own()
        stack.checkpointing("lean" if stack.trainer.args.gradient_checkpointing else "off")
        try:
            stack._own_step = stack.step(batch, routing), batch
        finally:
            stack.checkpointing("off")
    return stack._own_step


@check("auxiliary loss", "set router_aux_loss_coef to 0.0: TRL takes the checkpoint's 0.9, which swamps the loss")
def auxiliary_loss(stack: Stack) -> Finding:
    """The coefficient that is in effect is the one that was asked for, 0 unless it was."""
    asked = stack.combination.arguments.training.router_aux_loss_coef or 0.0
    found = float(stack.trainer.router_aux_loss_coef) if stack.trainer.aux_loss_enabled else 0.0
    return Finding(found != asked, found, f"coefficient {found:g}", f"{asked:g}")


@check(
    "loss",
    "the loss is not the weighted mean of -log p: loss_type nll, and this trainer's weights",
    ("auxiliary loss",),
)
def loss(stack: Stack) -> Finding:
    """The trainer's loss, given the hidden states that it had."""
    step, batch = own_step(stack)
    if stack.trainer.aux_loss_enabled:
        return Finding(True, step.loss, "the auxiliary loss is in it", "0")
    labels, weights = (batch[key].to(stack.device)[:, 1:].flatten() for key in ("labels", "loss_weights"))
    kept = labels != -100
    hidden = step.hidden[:, :-1].flatten(0, 1)[kept]
    with torch.no_grad():
        mean = lambda exact: (  # noqa: E731
            (exact.losses(hidden.to(exact.dtype), labels[kept]) * weights[kept]).sum() / weights.sum()
        )
        right, rounded = mean(stack.exact).item(), mean(stack.eager).item()
    limit = stack.limit(abs(rounded - right) / right)
    return relative(abs(step.loss - right) / right, limit)


@check("masked tokens", "labels of masked tokens must be -100, and the first token of a packed document is masked")
def masked_tokens(stack: Stack) -> Finding:
    """No gradient enters where no weighted token is predicted."""
    step, batch = own_step(stack)
    weights = batch["loss_weights"].to(stack.device)
    silent = torch.cat([weights[:, 1:] == 0, torch.ones_like(weights[:, :1], dtype=torch.bool)], dim=1)
    sizes = step.hidden_gradient.float().norm(dim=-1)
    figure = (sizes[silent].max() / sizes.max()).item()
    speaking = (sizes[~silent] > 0).all().item()
    text = f"{figure:.1e} of the largest gradient" + ("" if speaking else "; some trained tokens have none")
    return Finding(figure != 0 or not speaking, figure, text, "0")


@check(
    "recomputation",
    "a recomputed layer chose other experts, or other numbers: gradient_checkpointing_kwargs {use_reentrant: false}, "
    "and no noise in the router",
)
def recomputation(stack: Stack) -> Finding:
    """With checkpointing, layers are computed again with the same experts, and gradients stay what they were."""
    if not stack.trainer.args.gradient_checkpointing:
        return nothing("gradient_checkpointing is off")
    batch, _ = stack.own()
    figure, moved, calls = 0.0, 0, 0
    for mode in ("lean", "fast") if stack.recomputation is not None else ("lean",):
        stack.checkpointing(mode)
        try:
            step = stack.step(batch)
        finally:
            stack.checkpointing("off")
        for first, *others in step.routing:
            calls += len(others)
            moved += sum(int((first != other).any(-1).sum()) for other in others)
        plain = stack.step(batch, step.chosen())
        scale = max(g.norm().item() for g in plain.gradients.values())
        for name, right in plain.gradients.items():
            if right.norm() > 1e-6 * scale:
                figure = max(figure, relative_error(step.gradients[name], right))
    if not calls:
        return Finding(True, None, "nothing was computed again", "")
    found = relative(figure, stack.floor, "gradients")
    found.measured = f"{moved} tokens rerouted, {found.measured}"
    found.limit, found.wrong = f"0, {found.limit}", found.wrong or moved > 0
    return found


# ------------------------------------------------------------------------------------- against the written-out model

PARTS = ("adapters applied", "window", "activation: alpha", "activation: clamp")
FORMS = ("packed = alone", "padded = unpadded")


@check("outputs", "compare attn_implementation eager and experts_implementation eager: which of the two differs", PARTS)
def outputs(stack: Stack) -> Finding:
    """Hidden states of each document alone."""
    figure = max(map(relative_error, stack.alone, stack.truth))
    return relative(figure, stack.limit(stack.rounding))


@check("routing", "the router chose other experts than the largest logits", (*PARTS, "outputs"))
def routing(stack: Stack) -> Finding:
    """No expert that was left out has a larger exact logit than a chosen one, but for rounding."""
    figure, scale = 0.0, max(x.abs().max().item() for logits in stack.router_logits for x in logits)
    for document, logits in zip(stack.routing, stack.router_logits, strict=True):
        for indices, layer in zip(document, logits, strict=True):
            chosen = layer.gather(1, indices).amin(1)
            left = layer.scatter(1, indices, float("-inf")).amax(1)
            figure = max(figure, ((left - chosen).clamp_min(0).max() / scale).item())
    return relative(figure, stack.limit(stack.rounding), "largest regret")


def exact_gradients(stack: Stack, exact) -> dict[str, torch.Tensor]:
    """Of the weighted loss of all documents, each alone."""
    total = sum(float(d.loss_weights.sum()) for d in stack.documents)
    losses = []
    for document, ids, chosen in zip(stack.documents, stack.ids, stack.routing, strict=True):
        hidden = exact.hidden(ids, chosen)[0]
        weights = torch.from_numpy(document.loss_weights[1:]).to(stack.device)
        if weights.any():
            losses.append((exact.losses(hidden[:-1], ids[1:]) * weights).sum() / total)
    return exact.gradients(sum(losses))


def compared_gradients(stack: Stack) -> dict[str, tuple[float, float]]:
    """(relative error, its limit) of every trained parameter's gradient; sinks of all layers as one."""
    if not hasattr(stack, "_compared"):
        found = own_step(stack)[0].gradients
        right, rounded = exact_gradients(stack, stack.exact), exact_gradients(stack, stack.eager)
        sinks = [name for name in right if name.endswith("sinks")]
        groups = {name: [name] for name in right if name not in sinks} | ({"sinks": sinks} if sinks else {})
        join = lambda gradients, names: torch.cat([gradients[n].flatten().double() for n in names])  # noqa: E731
        errors, roundings = {}, {}
        for group, names in groups.items():
            exact = join(right, names)
            errors[group] = relative_error(join(found, names), exact)
            roundings[group] = relative_error(join(rounded, names), exact)
        typical = sorted(roundings.values())[len(roundings) // 2]
        stack._compared = {g: (errors[g], stack.limit(max(roundings[g], typical))) for g in groups}
    return stack._compared


@check(
    "gradients",
    "the named parameter's gradient is wrong: compare attn_implementation and experts_implementation eager",
    (*PARTS, *FORMS, "auxiliary loss", "loss", "recomputation", "outputs"),
)
def gradients(stack: Stack) -> Finding:
    """Of every trained parameter but sinks."""
    compared = {name: pair for name, pair in compared_gradients(stack).items() if name != "sinks"}
    worst = max(compared, key=lambda name: compared[name][0] / compared[name][1])
    figure, limit = compared[worst]
    short = worst.replace("base_model.model.", "").replace(".default.weight", "").replace("model.layers.", "")
    found = relative(figure, limit)
    found.measured += f", the worst of {len(compared)}: {short}"
    return found


@check(
    "sink gradients",
    "attention without a gradient for its sinks: gptoss_triton, gptoss_fa4 or eager",
    (*PARTS, *FORMS, "auxiliary loss", "loss", "outputs", "gradients"),
)
def sink_gradients(stack: Stack) -> Finding:
    """Present and right where sinks are trained."""
    compared = compared_gradients(stack)
    if "sinks" not in compared:
        return nothing("sinks are not trained")
    return relative(*compared["sinks"])
