"""Chapter 03, the online softmax with a sink."""

from collections.abc import Callable

import torch

from ..check import Mistake

LOWEST = -1.0e38  # "no key yet", as in gptoss_kernels.attention.forward
STATE = ("acc", "running_max", "running_sum")

# ---------------------------------------------------------------------------------------------- expected_rescales


def expected_rescales(keys: int) -> float:
    """How often the running maximum changes after the first key, on average, in a stream of independent scores."""
    return sum(1 / j for j in range(2, keys + 1))


def check_expected_rescales(function: Callable) -> None:
    right = {1: 0.0, 2: 1 / 2, 3: 1 / 2 + 1 / 3, 1000: expected_rescales(1000)}
    got = {keys: _number(function(keys), keys) for keys in right}
    known = {
        "the first key sets the maximum, it does not change it: begin with the second": lambda n: 1 + right[n],
        "ln(keys) is how the sum grows, not what it is: add up the probabilities": lambda n: torch.tensor(n).log(),
        "that is the probability for the last key alone: sum it over all keys": lambda n: 1 / n,
        "not every second key is a new maximum: key j has to beat all j keys before it, not just one": lambda n: (
            (n - 1) / 2
        ),
        "the j-th key is the largest of the first j with probability 1/j: the sum stops one key too early": lambda n: (
            right[n] - 1 / n if n > 1 else 0
        ),
    }
    for message, wrong in known.items():
        if all(abs(got[keys] - float(wrong(keys))) < 1e-4 for keys in (2, 3, 1000)):
            raise Mistake(message)
    for keys, expected in right.items():
        if abs(got[keys] - expected) > 1e-4:
            raise Mistake(f"expected {expected:.4f} for {keys} keys, got {got[keys]:.4f}")


def _number(value, keys: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"expected a number for {keys} keys, got {type(value).__name__}") from None


# -------------------------------------------------------------------------------------------------- online_update


def online_update(
    acc: torch.Tensor,
    running_max: torch.Tensor,
    running_sum: torch.Tensor,
    scores: torch.Tensor,
    v_tile: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of BLOCK_M rows after one more tile of BLOCK_N keys.

    acc (..., BLOCK_M, head_dim), running_max and running_sum (..., BLOCK_M), scores (..., BLOCK_M, BLOCK_N) with -inf
    where a key is masked, v_tile (..., BLOCK_N, head_dim)."""
    new_max = torch.maximum(running_max, scores.amax(dim=-1))
    p = torch.exp(scores - new_max[..., None])
    rescale = torch.exp(running_max - new_max)
    acc = acc * rescale[..., None] + p @ v_tile
    return acc, new_max, running_sum * rescale + p.sum(dim=-1)


def check_online_update(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    acc, running_max, running_sum = draw(3, 2), torch.tensor([0.5, 3.0, -1.0]).double(), 1 + draw(3).abs()
    scores, v_tile = draw(3, 4), draw(4, 2)
    new_max = torch.maximum(running_max, scores.amax(-1))  # row 1 keeps its maximum, the others find a new one
    p = torch.exp(scores - new_max[:, None])
    rescale = torch.exp(running_max - new_max)
    summed = running_sum * rescale + p.sum(-1)
    added = acc * rescale[:, None] + p @ v_tile
    inverse = 1 / rescale
    own_max = scores.amax(-1)
    own = torch.exp(scores - own_max[:, None])
    forgot = torch.exp(running_max - own_max)
    weights = torch.softmax(scores, -1)
    known = {
        "acc is not rescaled: what it holds is relative to the old maximum": (acc + p @ v_tile, new_max, summed),
        "running_sum is not rescaled: what it holds is relative to the old maximum": (
            added, new_max, running_sum + p.sum(-1),
        ),
        "neither running_sum nor acc is rescaled: both are relative to the old maximum": (
            acc + p @ v_tile, new_max, running_sum + p.sum(-1),
        ),
        "the rescaling is upside down: it is exp(running_max - new_max), at most 1": (
            acc * inverse[:, None] + p @ v_tile, new_max, running_sum * inverse + p.sum(-1),
        ),
        "p is relative to this tile's maximum: it has to be relative to the new running maximum": (
            acc * rescale[:, None] + own @ v_tile, new_max, running_sum * rescale + own.sum(-1),
        ),
        "the new maximum is this tile's alone: the running maximum counts too, see row 1": (
            acc * forgot[:, None] + own @ v_tile, own_max, running_sum * forgot + own.sum(-1),
        ),
        "p is normalised within the tile: it stays exp(scores - new_max), the division comes at the very end": (
            acc * rescale[:, None] + weights @ v_tile, new_max, running_sum * rescale + weights.sum(-1),
        ),
        "acc is divided by the sum: the division comes once, after the last tile": (
            added / summed[:, None], new_max, summed,
        ),
        "the old maximum is returned: the next tile has to find the new one": (added, running_max, summed),
        "the new keys replace the old ones: add them to what acc and running_sum hold": (
            p @ v_tile, new_max, p.sum(-1),
        ),
    }  # fmt: skip
    given = (acc, running_max, running_sum, scores, v_tile)
    got = _state(function(*_copies(given)), (added, new_max, summed))
    for message, wrong in known.items():
        if _equal(got, wrong):
            raise Mistake(message)
    if torch.allclose(got[1], torch.maximum(running_max, scores.amax()).expand(3)) or torch.allclose(
        got[1], new_max.amax().expand(3)
    ):
        raise Mistake("every row has a maximum of its own: reduce over the keys (the last dimension) only")
    if torch.allclose(got[2], running_sum * rescale + p.sum()):
        raise Mistake("every row has a sum of its own: reduce over the keys (the last dimension) only")
    _compare(got, (added, new_max, summed), "row")

    # The maximum is there for this: exp(1000) is not a number that a float can hold.
    shifted = (acc, running_max + 1000, running_sum, scores + 1000, v_tile)
    after = _state(function(*_copies(shifted)), (added, new_max, summed))
    if not _equal(after, (added, new_max + 1000, summed)):
        raise Mistake("large scores overflow: only differences from the new maximum may meet exp")

    # Row 0 sees none of the tile's keys, in its first tile and later.
    masked = scores.clone()
    masked[0] = float("-inf")
    empty = torch.zeros(3, 2).double(), torch.full((3,), LOWEST).double(), torch.zeros(3).double()
    for before in (empty, given[:3]):
        after = _state(function(*_copies((*before, masked, v_tile))), before)
        for name, x, y in zip(STATE, after, before, strict=True):
            if not torch.allclose(x[0], y[0]):
                raise Mistake(
                    f"a row whose scores are all -inf must keep its state: expected {name} {y[0].tolist()} as before, "
                    f"got {x[0].tolist()}"
                )

    batched = (acc.expand(2, 3, 2), running_max.expand(2, 3), running_sum.expand(2, 3), scores.expand(2, 3, 4))
    after = function(*_copies((*batched, v_tile.expand(2, 4, 2))))
    if not _equal(_state(after, batched[:3]), tuple(x.expand_as(y) for x, y in zip(got, batched, strict=False))):
        raise Mistake("with a leading batch dimension the result differs: count dimensions from the end (dim=-1, .mT)")


# --------------------------------------------------------------------------------------------------- merge_states


def merge_states(
    first: tuple[torch.Tensor, torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of all keys from the states (acc, running_max, running_sum) of two disjoint sets of keys."""
    acc_1, max_1, sum_1 = first
    acc_2, max_2, sum_2 = second
    new_max = torch.maximum(max_1, max_2)
    rescale_1, rescale_2 = torch.exp(max_1 - new_max), torch.exp(max_2 - new_max)
    acc = acc_1 * rescale_1[..., None] + acc_2 * rescale_2[..., None]
    return acc, new_max, sum_1 * rescale_1 + sum_2 * rescale_2


def check_merge_states(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    first = draw(3, 2), torch.tensor([0.5, 3.0, -1.0]).double(), 1 + draw(3).abs()
    second = draw(3, 2), torch.tensor([1.5, 1.0, -2.0]).double(), 1 + draw(3).abs()
    (acc_1, max_1, sum_1), (acc_2, max_2, sum_2) = first, second
    new_max = torch.maximum(max_1, max_2)
    r_1, r_2 = torch.exp(max_1 - new_max), torch.exp(max_2 - new_max)
    total = sum_1 * r_1 + sum_2 * r_2
    acc = acc_1 * r_1[:, None] + acc_2 * r_2[:, None]
    known = {
        "neither state is rescaled: bring both to the common maximum before adding": (
            acc_1 + acc_2, new_max, sum_1 + sum_2,
        ),
        "only the second state is rescaled: in a row where the second has the larger maximum the first must be": (
            acc_1 + acc_2 * r_2[:, None], new_max, sum_1 + sum_2 * r_2,
        ),
        "only the first state is rescaled: in a row where the first has the larger maximum the second must be": (
            acc_1 * r_1[:, None] + acc_2, new_max, sum_1 * r_1 + sum_2,
        ),
        "the factors are swapped: each state is rescaled from its own maximum": (
            acc_1 * r_2[:, None] + acc_2 * r_1[:, None], new_max, sum_1 * r_2 + sum_2 * r_1,
        ),
        "the factors are upside down: exp(own maximum - common maximum), at most 1": (
            acc_1 / r_1[:, None] + acc_2 / r_2[:, None], new_max, sum_1 / r_1 + sum_2 / r_2,
        ),
        "running_sum is not rescaled": (acc, new_max, sum_1 + sum_2),
        "acc is not rescaled": (acc_1 + acc_2, new_max, total),
        "acc is divided by the sum: a state stays unnormalised, so that it can be merged again": (
            acc / total[:, None], new_max, total,
        ),
        "maxima do not add up: the common maximum is the larger of the two": (acc, max_1 + max_2, total),
        "the states are averaged: two sets of keys add up": (acc / 2, new_max, total / 2),
    }  # fmt: skip
    got = _state(function(_copies(first), _copies(second)), first)
    for message, wrong in known.items():
        if _equal(got, wrong):
            raise Mistake(message)
    _compare(got, (acc, new_max, total), "row")

    shifted = [(x, m + 1000, s) for x, m, s in (first, second)]
    if not _equal(_state(function(*map(_copies, shifted)), first), (acc, new_max + 1000, total)):
        raise Mistake("large maxima overflow: only differences of maxima may meet exp")

    empty = torch.zeros(3, 2).double(), torch.full((3,), LOWEST).double(), torch.zeros(3).double()
    for a, b, name in ((first, empty, "second"), (empty, first, "first")):
        if not _equal(_state(function(_copies(a), _copies(b)), first), first):
            raise Mistake(f"where the {name} state is the empty one (no key yet), the result must be the other state")
    mixed = tuple(torch.cat([x[:1], y[1:]]) for x, y in zip(empty, first, strict=True))  # row 0 has no key yet
    wanted = tuple(torch.cat([x[:1], y[1:]]) for x, y in zip(second, (acc, new_max, total), strict=True))
    for a, b in ((mixed, second), (second, mixed)):
        if not _equal(_state(function(_copies(a), _copies(b)), first), wanted):
            raise Mistake("rows are apart: where one row of a state is empty, the others still have to be merged")
    if not _equal(_state(function(_copies(empty), _copies(empty)), first), empty):
        raise Mistake("two empty states must give the empty state: acc = 0, running_sum = 0 and no NaN")


# ------------------------------------------------------------------------------------------ recover_probabilities


def recover_probabilities(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float) -> torch.Tensor:
    """P of one head from the rows' log-sum-exp: q (q_len, head_dim), k (kv_len, head_dim), lse (q_len,), causal with
    the last query at the last key -> (q_len, kv_len)."""
    q_len, kv_len = q.shape[0], k.shape[0]
    position = torch.arange(kv_len - q_len, kv_len, device=q.device)
    key = torch.arange(kv_len, device=q.device)
    scores = (q @ k.mT) * scale
    return torch.exp(scores - lse[:, None]).masked_fill(key > position[:, None], 0.0)


def check_recover_probabilities(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (5, 7))
    scale, sink = 0.25, torch.tensor(0.5).double()
    for q_len in (5, 7):
        q = torch.cat([q, torch.flip(q, (0,))])[:q_len]
        right, known, lse = _probabilities(q, k, scale, sink)
        got = function(q.clone(), k.clone(), lse.clone(), scale)
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor of shape {tuple(right.shape)}, got {type(got).__name__}")
        if got.shape != right.shape:
            raise Mistake(f"expected shape (q_len, kv_len) = {tuple(right.shape)}, got {tuple(got.shape)}")
        for message, wrong in known.items():
            if torch.allclose(got.to(right.dtype), wrong, equal_nan=True):
                raise Mistake(message)
        if not torch.allclose(got.to(right.dtype), right, rtol=1e-4, atol=1e-6):
            i, j = ((got - right).abs().nan_to_num(torch.inf) > 1e-6).nonzero()[0].tolist()
            raise Mistake(f"expected {right[i, j]:.4f} for query {i} and key {j}, got {got[i, j]:.4f}")


def _probabilities(q, k, scale, sink) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    q_len, kv_len = q.shape[0], k.shape[0]
    allowed = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    raw = q @ k.mT
    scores = (raw * scale).masked_fill(~allowed, float("-inf"))
    lse = torch.logaddexp(torch.logsumexp(scores, -1), sink)
    right = torch.exp(scores - lse[:, None])
    known = {
        "the mask is missing: a query does not see the keys after its own position": torch.exp(
            raw * scale - lse[:, None]
        ),
        "the scores are not scaled: lse is that of scale * q·k": torch.exp(raw - lse[:, None]) * allowed,
        "rows sum to one: that is a new softmax, without the sink. lse holds the normaliser already": torch.softmax(
            scores, -1
        ),
        "apply exp: these are the logarithms of the probabilities": scores - lse[:, None],
        "a query sees its own key: mask key > position, not key >= position": right.tril(kv_len - q_len - 1),
        "divide by exp(lse), not by lse": torch.exp(scores) / lse[:, None],
        "the normaliser is missing: subtract lse before exp": torch.exp(scores),
        "scale belongs to the scores alone: lse is scaled already": torch.exp(
            ((raw - lse[:, None]) * scale).masked_fill(~allowed, float("-inf"))
        ),
    }
    if q_len != kv_len:
        known["the last query stands at the last key: query i at position i + kv_len - q_len"] = torch.exp(
            raw * scale - lse[:, None]
        ).tril()
    else:
        known["lse belongs to the queries, the rows: lse[:, None]"] = torch.exp(scores - lse[None, :])
    return right, known, lse


# ---------------------------------------------------------------------------------------------------------- shared


def _copies(tensors):
    """Copies, so that a function may work in place."""
    return tuple(x.clone() for x in tensors)


def _state(got, like) -> tuple[torch.Tensor, ...]:
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        what = f"{len(got)} values" if isinstance(got, (tuple, list)) else type(got).__name__
        raise Mistake(f"expected three tensors (acc, running_max, running_sum), got {what}")
    for name, x, y in zip(STATE, got, like, strict=True):
        if not isinstance(x, torch.Tensor):
            raise Mistake(f"{name}: expected a tensor of shape {tuple(y.shape)}, got {type(x).__name__}")
        if x.shape != y.shape:
            raise Mistake(
                f"{name}: expected shape {tuple(y.shape)}, got {tuple(x.shape)} (the order is acc, running_max, "
                "running_sum)"
            )
    return tuple(x.to(y.dtype) for x, y in zip(got, like, strict=True))


def _equal(got, expected) -> bool:
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(got, expected, strict=True))


def _compare(got, expected, unit: str) -> None:
    for name, x, y in zip(STATE, got, expected, strict=True):
        for row in range(len(y)):
            if not torch.allclose(x[row], y[row], rtol=1e-5, atol=1e-6):
                raise Mistake(f"{name} of {unit} {row}: expected {_shown(y[row])}, got {_shown(x[row])}")


def _shown(x: torch.Tensor) -> str:
    return str([round(value, 4) for value in x.tolist()] if x.dim() else round(x.item(), 4))
