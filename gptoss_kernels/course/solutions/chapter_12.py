"""Chapter 12, the experts."""

import math
import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ...lane import interpreting
from ..check import Mistake

# ------------------------------------------------------------------------------------------------- sort_by_expert


def sort_by_expert(router_indices: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in the order of their experts, and where each expert's slots end.

    Args:
        router_indices: (tokens, top_k), integers in 0 … experts; `experts` is the sentinel, of no expert.
        experts: their number.

    Returns:
        slot (tokens * top_k,): token * top_k + choice, by expert, and within an expert by slot; the sentinel's last.
        ends (experts,): one past the last position of each expert in slot.
    """
    expert, slot = router_indices.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device, dtype=expert.dtype), right=True)
    return slot, ends


def check_sort_by_expert(function: Callable) -> None:
    # Expert 1 has no slot; the sentinel, 4, has three.
    indices = torch.tensor([[2, 0], [4, 2], [3, 4], [0, 2], [4, 3], [2, 0]])
    experts, top_k = 4, 2
    result = function(indices.clone(), experts)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Mistake(f"expected a pair (slot, ends), got {type(result).__name__}")
    slot, ends = (_integers(name, x) for name, x in zip(("slot", "ends"), result, strict=True))
    flat = indices.flatten()
    right = flat.sort(stable=True).indices
    counts = torch.bincount(flat, minlength=experts + 1)
    if slot.dim() != 1 or slot.numel() == int((flat < experts).sum()):
        raise Mistake(
            f"expected slot of shape ({flat.numel()},), got {tuple(slot.shape)}: the sentinel's slots stay in it, at "
            "the end, so that its length does not depend on the routing"
        )
    if slot.shape != right.shape:
        raise Mistake(f"expected slot of shape ({flat.numel()},), one a slot, got {tuple(slot.shape)}")
    if torch.equal(slot, right.argsort()):
        raise Mistake("slot is the inverse: slot[r] is the slot that goes to place r, not the place of slot r")
    if torch.equal(slot, right // top_k):
        raise Mistake("slot holds tokens: leave the division by top_k to the caller, who needs the choice as well")
    if torch.equal(slot, flat[right]):
        raise Mistake("slot holds the sorted experts: what is wanted is where each of them came from")
    if torch.equal(slot, torch.arange(len(flat))):
        raise Mistake("slot is not sorted by expert")
    if torch.equal(slot, indices.T.flatten().sort(stable=True).indices):
        raise Mistake("slots are numbered choice by choice: slot = token * top_k + choice, as flatten() numbers them")
    if sorted(slot.tolist()) != list(range(len(flat))):
        raise Mistake(f"every slot has to appear once in slot, got {slot.tolist()}")
    if torch.equal(flat[slot], flat[right]) and not torch.equal(slot, right):
        raise Mistake(
            "sorted, but within an expert not by slot: sort(stable=True) keeps their order, so that two runs add in "
            "the same order"
        )
    if not torch.equal(slot, right):
        raise Mistake(f"for experts {flat.tolist()} expected slot {right.tolist()}, got {slot.tolist()}")

    wanted = counts[:experts].cumsum(0)
    if ends.shape == (experts + 1,) and torch.equal(ends, torch.cat([wanted.new_zeros(1), wanted])):
        raise Mistake("ends begins with a 0: it has one number an expert, where that expert's slots end")
    if ends.shape == (experts + 1,):
        raise Mistake("ends has one number too many: the sentinel is no expert")
    if ends.shape != wanted.shape:
        raise Mistake(f"expected ends of shape ({experts},), one an expert, hit or not, got {tuple(ends.shape)}")
    if torch.equal(ends, counts[:experts]):
        raise Mistake("ends holds counts: add them up")
    if torch.equal(ends, wanted - counts[:experts]):
        raise Mistake("ends holds where the experts begin: one past the last slot is wanted")
    if torch.equal(ends, wanted - 1):
        raise Mistake("ends holds the last slots themselves: one past them is wanted")
    if not torch.equal(ends, wanted):
        raise Mistake(f"for experts {flat.tolist()} expected ends {wanted.tolist()}, got {ends.tolist()}")
    slot, ends = function(torch.full((5, 3), 2), 3)
    if slot.tolist() != list(range(15)) or ends.tolist() != [0, 0, 15]:
        raise Mistake("wrong where all slots go to the last of three experts: expected ends [0, 0, 15]")


def _integers(name: str, x) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise Mistake(f"{name}: expected a tensor of integers, got {getattr(x, 'dtype', type(x).__name__)}")
    return x.cpu().long()


# ------------------------------------------------------------------------------------------------- combine_kernel


@triton.jit
def combine_kernel(
    down,  # (rows, HIDDEN), by sorted row
    bias,  # (experts, HIDDEN)
    weight,  # (tokens, TOP_K)
    row_of_slot,  # (tokens, TOP_K) int32
    expert_of_slot,  # (tokens, TOP_K) int32 or int64
    out,  # (tokens, HIDDEN)
    experts,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_t = sum over choices of weight · (down + bias), in fp32; grid (tokens, cdiv(HIDDEN, BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        own = tl.load(expert_of_slot + slot).to(tl.int64)
        row = tl.load(row_of_slot + slot).to(tl.int64)
        if own < experts:
            part = tl.load(down + row * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)  # [BLOCK]
            part += tl.load(bias + own * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
            acc += tl.load(weight + slot).to(tl.float32) * part
    tl.store(out + token * HIDDEN + column, acc.to(out.dtype.element_ty), mask=column < HIDDEN)


UNWRITTEN = -777.0
CLOSE = 1e-4  # relative; fp32 sums of a few numbers stay far below


def check_combine_kernel(function: Callable) -> None:
    if not isinstance(function, triton.runtime.KernelInterface):
        try:
            function()
        except NotImplementedError:
            raise
        except Exception:
            pass
        raise Mistake(f"expected a kernel, a function under @triton.jit, got {type(function).__name__}")
    tokens, hidden, experts, top_k = 4, 6, 3, 2
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    indices = torch.tensor([[2, 0], [1, 2], [2, 1], [0, 1]])
    down, bias, weight = draw(tokens * top_k, hidden), draw(experts, hidden), draw(tokens, top_k).abs() + 0.1
    _check_combine(function, down, bias, weight, indices, "")
    _check_combine(function, down, bias, weight, indices.masked_fill(indices == 1, experts), " with the sentinel")
    got = _combined(function, down.half(), bias.half(), weight.half(), indices)
    inputs = [x.half().double() for x in (down, bias, weight)]
    wanted = _combine(*inputs, indices)["right"]
    if not (got.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max():
        raise Mistake("right in fp32, wrong in half precision: convert what is loaded to fp32 before it is added up")


def _check_combine(function, down, bias, weight, indices, where: str) -> None:
    known = _combine(down.double(), bias.double(), weight.double(), indices)
    right = known.pop("right")
    got = _combined(function, down, bias, weight, indices)
    if (got == UNWRITTEN).all():
        raise Mistake("nothing was written: store the sum into out after the loop")
    if (got == UNWRITTEN).any():
        token, column = (got == UNWRITTEN).nonzero()[0].tolist()
        raise Mistake(
            f"column {column} of token {token} was not written: program_id(0) is the token, program_id(1) the block "
            "of columns"
        )
    if not torch.isfinite(got).all():
        raise Mistake(
            f"NaN{where}: a row or a bias of no expert was read, or columns beyond HIDDEN. Skip slots of no "
            "expert: those that are not below experts"
        )
    if _like(got, right):
        return
    for message, wrong in known.items():
        if _like(got, wrong):
            raise Mistake(message + where)
    token, column = ((got - right).abs() > CLOSE * right.abs().max()).nonzero()[0].tolist()
    raise Mistake(
        f"token {token}, column {column}{where}: expected {right[token, column]:.5g}, got {got[token, column]:.5g}"
    )


def _like(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got.double() - wanted).abs().max() <= CLOSE * wanted.abs().max())


def _order(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slot = indices.flatten().sort(stable=True).indices
    row = torch.empty_like(slot)
    row[slot] = torch.arange(len(slot))
    return slot, row.view_as(indices)


def _combine(down, bias, weight, indices) -> dict[str, torch.Tensor]:
    """What a right kernel and known wrong ones write. (tokens, hidden) each"""
    experts = len(bias)
    slot, row = _order(indices)
    real = (indices < experts)[..., None]  # [tokens, top_k, 1]
    own = torch.where(real, bias[indices.clamp(max=experts - 1)], 0.0)  # [tokens, top_k, hidden]
    rows, inverse = torch.where(real, down[row], 0.0), torch.where(real, down[slot.view_as(row)], 0.0)
    in_place = torch.where(real, down.view(*indices.shape, -1), 0.0)
    each = weight[..., None]
    return {
        "right": (each * (rows + own)).sum(1),
        "the bias is missing: weight · (down + bias)": (each * rows).sum(1),
        "the routing weight is missing: weight · (down + bias)": (rows + own).sum(1),
        "the bias is not weighted: weight · (down + bias), not weight · down + bias": (each * rows + own).sum(1),
        "down is read at the slot: the slot's row is row_of_slot": (each * (in_place + own)).sum(1),
        "down is read by the inverse of row_of_slot": (each * (inverse + own)).sum(1),
        "only the last choice is left: add in every step": (each * (rows + own))[:, -1],
        "only the first choice is there: the loop runs over TOP_K choices": (each * (rows + own))[:, 0],
        "all choices have the first one's weight: it is that of the slot": (weight[:, :1, None] * (rows + own)).sum(1),
        "all choices have the first one's bias: it is that of the choice's expert": (
            each * (rows + torch.where(real, own[:, :1], 0.0))
        ).sum(1),
        "the mean over choices is taken: their weighted sum is wanted": (each * (rows + own)).mean(1),
    }


def _combined(function, down, bias, weight, indices) -> torch.Tensor:
    """out of one launch, among NaN inputs and fences. (tokens, hidden)"""
    gpu = torch.cuda.is_available() and not interpreting()
    device = torch.device("cuda" if gpu else "cpu")
    tokens, top_k = indices.shape
    hidden, block = down.shape[1], 4  # the second block of columns is half empty
    _, row = _order(indices)
    down, bias = down.clone(), bias.clone()
    down[row[indices == len(bias)]] = math.nan  # nobody's rows hold anything
    fenced = [_fence(x, device) for x in (down, bias, weight)]
    out = torch.full((tokens + 2, hidden), UNWRITTEN, dtype=down.dtype, device=device)
    grid = (tokens, triton.cdiv(hidden, block))
    constants = dict(HIDDEN=hidden, TOP_K=top_k, BLOCK=block)
    where = (row.to(torch.int32).to(device), indices.to(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function[grid](*fenced, *where, out[1:], len(bias), **constants)
    if (out[0] != UNWRITTEN).any() or (out[-1] != UNWRITTEN).any():
        raise Mistake("a program wrote beside its token's columns: store where column < HIDDEN")
    return out[1:-1].cpu()


def _fence(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x amid NaN, so that a read beside it shows."""
    buffer = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype, device=device)
    view = buffer[32 : 32 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


# ---------------------------------------------------------------------------------------- routing_weight_gradient


def routing_weight_gradient(
    dy_rows: torch.Tensor, dact: torch.Tensor, act: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Gradient of the routing weight of each row, without the layer's output.

    Args:
        dy_rows: (rows, hidden), gradient of y at each row's token.
        dact: (rows, intermediate), dy_rows W2ᵀ.
        act: (rows, intermediate).
        bias: (hidden,), b2 of the expert.

    Returns:
        (rows,): ⟨dact, act⟩ + ⟨dy_rows, bias⟩ of each row.
    """
    return (dact * act).sum(-1) + dy_rows @ bias


def check_routing_weight_gradient(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for rows in (5, 6):  # once as many as columns
        dy, act, w2, bias = draw(rows, 6), draw(rows, 4), draw(4, 6), draw(6)
        dact = dy @ w2.T
        right = (dy * (act @ w2 + bias)).sum(-1)
        got = function(dy.clone(), dact.clone(), act.clone(), bias.clone())
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor, got {type(got).__name__}")
        if got.dim() == 0:
            raise Mistake("one number came back: each row has a gradient of its own, so sum over the last axis alone")
        if got.shape == (rows, 1):
            raise Mistake(f"expected shape ({rows},), got ({rows}, 1): sum without keepdim")
        if got.shape != right.shape:
            raise Mistake(f"expected shape ({rows},), one number a row, got {tuple(got.shape)}")
        through_act, through_bias = (dact * act).sum(-1), dy @ bias
        known = {
            "the bias is missing: out = act W2 + b2, so ⟨dy, b2⟩ belongs to it": through_act,
            "only the bias's part is there: ⟨dy, act W2⟩ = ⟨dy W2ᵀ, act⟩ is missing": through_bias,
            "the bias's part has the wrong sign": through_act - through_bias,
            "a mean was taken over the columns: an inner product is a sum": (dact * act).mean(-1) + through_bias,
            "means were taken: an inner product is a sum": (dact * act).mean(-1) + (dy * bias).mean(-1),
            "the bias was added to dy, not multiplied with it": through_act + (dy + bias).sum(-1),
            "the bias alone was added: what is wanted is its inner product with dy": through_act + bias.sum(),
            "dy was left out: sum(act) is no gradient": act.sum(-1) + through_bias,
            "dact was summed without act": dact.sum(-1) + through_bias,
        }
        if torch.allclose(got.double(), right, rtol=1e-5, atol=1e-7):
            continue
        for message, wrong in known.items():
            if torch.allclose(got.double(), wrong, rtol=1e-5, atol=1e-7):
                raise Mistake(message)
        raise Mistake(f"row 0: expected {right[0]:.5g}, got {got[0].item():.5g}")


# ---------------------------------------------------------------------------------------------- grouped_intensity


def grouped_intensity(tokens: int, top_k: int, experts: int, hidden: int, width: int, itemsize: int) -> float:
    """FLOPs of a grouped product, rows (hidden) by experts (hidden, width), over the bytes that have to move.

    Every expert is hit: its matrix is read once; each of the tokens * top_k rows is read once and written once.
    """
    rows = tokens * top_k
    return 2 * rows * hidden * width / ((rows * hidden + experts * hidden * width + rows * width) * itemsize)


def check_grouped_intensity(function: Callable) -> None:
    for sizes in ((7, 3, 4, 5, 6, 2), (1000, 4, 32, 64, 128, 4)):
        tokens, top_k, experts, hidden, width, itemsize = sizes
        got = function(*sizes)
        if isinstance(got, torch.Tensor) and got.numel() == 1:
            got = got.item()
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            raise Mistake(f"expected a number, FLOPs per byte, got {type(got).__name__}")
        rows = tokens * top_k
        flops, read, weights, written = 2 * rows * hidden * width, rows * hidden, experts * hidden * width, rows * width
        right = flops / (read + weights + written) / itemsize
        without = tokens * hidden + weights + tokens * width
        known = {
            "a multiplication and an addition are two FLOPs": right / 2,
            "elements were counted, not bytes: multiply by itemsize": right * itemsize,
            "the experts' matrices are missing among the bytes": flops / (read + written) / itemsize,
            "one expert's matrix was counted: all of them are read": (
                flops / (read + hidden * width + written) / itemsize
            ),
            "what is written is missing among the bytes": flops / (read + weights) / itemsize,
            "the rows that are read are missing among the bytes": flops / (weights + written) / itemsize,
            "each token has top_k rows, in the FLOPs as well as in the bytes": (
                2 * tokens * hidden * width / without / itemsize
            ),
            "each token has top_k rows, in the FLOPs as well": right / top_k,
            "each token has top_k rows, in the bytes as well": flops / without / itemsize,
            "every expert was run on every row: each row meets one expert": right * experts,
            "a matrix was read anew for each row: a tile of rows shares it": (
                flops / (read + rows * hidden * width + written) / itemsize
            ),
            "upside down: FLOPs over bytes": 1 / right,
        }
        if math.isclose(got, right, rel_tol=1e-9):
            continue
        for message, wrong in known.items():
            if math.isclose(got, wrong, rel_tol=1e-9):
                raise Mistake(message)
        raise Mistake(f"for {sizes} expected {right:.6g} FLOPs a byte, got {got:.6g}")
