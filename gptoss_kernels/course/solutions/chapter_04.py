"""Chapter 04, the forward kernel."""

import inspect
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ...lane import interpreting
from ..check import Mistake

# -------------------------------------------------------------------------------------------------- online_update


@triton.jit
def online_update(
    acc,  # [BLOCK_M, HEAD_DIM] fp32
    running_max,  # [BLOCK_M] fp32, base 2
    running_sum,  # [BLOCK_M] fp32
    scores,  # [BLOCK_M, BLOCK_N] fp32, base 2, -inf where masked
    v_tile,  # [BLOCK_N, HEAD_DIM]
):
    """The state of BLOCK_M queries after one more tile of BLOCK_N keys."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))  # [BLOCK_M]
    p = tl.exp2(scores - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(running_max - new_max)  # [BLOCK_M]
    running_sum = running_sum * rescale + tl.sum(p, 1)  # [BLOCK_M]
    acc = acc * rescale[:, None]  # [BLOCK_M, HEAD_DIM]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
    return acc, new_max, running_sum


@triton.jit
def _probe_kernel(
    acc,
    running_max,
    running_sum,
    scores,
    v,
    UPDATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One call of UPDATE on contiguous tensors; the state is overwritten."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    acc_ptrs = acc + offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    score_tile = tl.load(scores + offs_m[:, None] * BLOCK_N + offs_n[None, :])
    v_tile = tl.load(v + offs_n[:, None] * HEAD_DIM + offs_d[None, :])
    new_acc, new_max, new_sum = UPDATE(
        tl.load(acc_ptrs), tl.load(running_max + offs_m), tl.load(running_sum + offs_m), score_tile, v_tile
    )
    tl.store(acc_ptrs, new_acc)
    tl.store(running_max + offs_m, new_max)
    tl.store(running_sum + offs_m, new_sum)


def check_online_update(function: Callable) -> None:
    if not hasattr(function, "fn"):  # nothing that @triton.jit made
        try:
            function(*[None] * 5)
        except NotImplementedError:
            raise
        except Exception:  # it was written for Triton's tensors
            pass
        raise Mistake("put @triton.jit above the function: the kernels call it")
    rows, keys, head_dim = 16, 32, 16
    generator = torch.Generator().manual_seed(0)
    acc, scores, v = (
        torch.randn(shape, generator=generator) for shape in ((rows, head_dim), (rows, keys), (keys, head_dim))
    )
    scores = 2 * scores
    running_max = torch.linspace(-3, 6, rows)  # below the tile's largest score in some rows, above it in others
    running_sum = torch.linspace(1, 4, rows)
    scores[::2, 20:] = float("-inf")
    scores[5] = float("-inf")  # a query that sees nothing in this tile
    state = (acc, running_max, running_sum)

    device = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")

    def probe(v):
        got = [x.to(device, copy=True) for x in state]
        _probe_kernel[(1,)](
            *got, scores.to(device), v.to(device), UPDATE=function, BLOCK_M=rows, BLOCK_N=keys, HEAD_DIM=head_dim
        )
        return [x.cpu() for x in got]

    got = probe(v)
    right = _update(*state, scores, v)
    for message, wrong in _wrong_updates(*state, scores, v).items():
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(got, wrong, strict=True)):
            raise Mistake(message)
    swapped = (right[0], right[2], right[1])
    if all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, swapped, strict=True)):
        raise Mistake("return the state in the order acc, running_max, running_sum")
    source = inspect.getsource(function.fn)
    if "dot(" in source and "ieee" not in source and "allow_tf32=False" not in source:
        raise Mistake(
            'tl.dot without input_precision="ieee": on a GPU it rounds fp32 factors to TF32, 11 significant bits'
        )
    named = (("running_max", got[1], right[1]), ("running_sum", got[2], right[2]), ("acc", got[0], right[0]))
    for name, a, b in named:
        close = torch.isclose(a, b, rtol=1e-4, atol=1e-4)
        if not close.all():
            index = tuple((~close).nonzero()[0].tolist())
            row = index[0]
            raise Mistake(
                f"{name}: expected {b[index]:.4f} at {list(index)}, got {a[index]:.4f}; there running_max was "
                f"{running_max[row]:.4f}, running_sum {running_sum[row]:.4f}, the tile's largest score "
                f"{scores[row].max():.4f}"
            )
    uncast = "p has to take v_tile's dtype before the product: p.to(v_tile.dtype)"
    try:
        in_half = probe(v.half())
    except Exception as error:  # of Triton's compiler or its interpreter: two dtypes in one product
        raise Mistake(uncast) from error
    if not torch.allclose(in_half[0], _update(*state, scores, v.half().float())[0], rtol=1e-2, atol=1e-2):
        raise Mistake(f"right for v_tile in fp32, wrong in fp16: {uncast}, and acc stays in fp32")


def _update(acc, running_max, running_sum, scores, v, power=torch.exp2):
    new_max = torch.maximum(running_max, scores.amax(1))
    p = power(scores - new_max[:, None])
    rescale = power(running_max - new_max)
    return acc * rescale[:, None] + p @ v, new_max, running_sum * rescale + p.sum(1)


def _wrong_updates(acc, running_max, running_sum, scores, v) -> dict[str, tuple]:
    """Known mistakes: message -> the state that they lead to."""
    right_acc, new_max, right_sum = _update(acc, running_max, running_sum, scores, v)
    p = torch.exp2(scores - new_max[:, None])
    rescale = torch.exp2(running_max - new_max)
    raw_acc, raw_sum = acc + p @ v, running_sum + p.sum(1)
    tile_max = scores.amax(1)
    of_tile = torch.exp2(scores - tile_max[:, None])
    from_tile = torch.exp2(running_max - tile_max)
    late = torch.exp2(scores - running_max[:, None])
    neither = "neither acc nor running_sum is rescaled: what they hold is relative to the old maximum, and p to the new"
    exp_p = torch.exp(scores - new_max[:, None])
    exp_rescale = torch.exp(running_max - new_max)
    inverted = "rescale is upside down: the old state shrinks when the maximum grows, 2^(old − new)"
    return {
        neither: (raw_acc, new_max, raw_sum),
        "acc is not rescaled: what it holds is relative to the old maximum": (raw_acc, new_max, right_sum),
        "running_sum is not rescaled: what it holds is relative to the old maximum": (right_acc, new_max, raw_sum),
        "that is base e: scores and running_max are in base 2, use tl.exp2": _update(
            acc, running_max, running_sum, scores, v, torch.exp
        ),
        "p is in base e, rescale in base 2: use tl.exp2 for both": (
            acc * rescale[:, None] + exp_p @ v,
            new_max,
            running_sum * rescale + exp_p.sum(1),
        ),
        "rescale is in base e, p in base 2: use tl.exp2 for both": (
            acc * exp_rescale[:, None] + p @ v,
            new_max,
            running_sum * exp_rescale + p.sum(1),
        ),
        "rescale multiplies acc's columns: it belongs to the rows, rescale[:, None]": (
            acc * rescale + p @ v,  # which is taken, since the probe has as many rows as columns
            new_max,
            right_sum,
        ),
        inverted: (acc / rescale[:, None] + p @ v, new_max, running_sum / rescale + p.sum(1)),
        "the maximum is the tile's alone: take the larger of it and running_max": (
            acc * from_tile[:, None] + of_tile @ v,
            tile_max,
            running_sum * from_tile + of_tile.sum(1),
        ),
        "p is relative to the old maximum: it has to be the new one, or large scores overflow": (
            acc * rescale[:, None] + late @ v,
            new_max,
            running_sum * rescale + late.sum(1),
        ),
        "the new maximum is not returned: the next tile would start from the old one": (
            right_acc,
            running_max,
            right_sum,
        ),
        "acc is divided by running_sum already: divide once, after the last tile": (
            right_acc / right_sum[:, None],
            new_max,
            right_sum,
        ),
        "the tile's weights are not added to running_sum": (right_acc, new_max, running_sum * rescale),
    }


# ------------------------------------------------------------------------------------------------------ key_range


def key_range(start_m: int, block_m: int, block_n: int, q_len: int, kv_len: int, window: int) -> tuple[int, int]:
    """Keys [begin, end) that the query tile starting at row start_m has to visit; begin is a multiple of block_n."""
    start = start_m + kv_len - q_len  # key position of the tile's first query
    begin = max(start - window + 1, 0) // block_n * block_n
    end = min(start + block_m, kv_len)
    return begin, end


# (block_m, block_n, q_len, kv_len, window), the simplest first
_RANGES = (
    (4, 4, 8, 8, 8),
    (4, 2, 8, 8, 8),
    (4, 4, 12, 12, 3),
    (4, 4, 16, 16, 4),
    (4, 4, 16, 16, 5),
    (8, 2, 16, 16, 3),
    (2, 8, 24, 24, 9),
    (4, 2, 7, 7, 7),
    (8, 4, 10, 10, 3),
    (4, 4, 1, 11, 11),
    (4, 4, 5, 11, 4),
    (32, 32, 70, 70, 20),
    (128, 64, 1000, 1000, 128),
)


def check_key_range(function: Callable) -> None:
    calls = [(m, *case) for case in _RANGES for m in range(0, case[2], case[0])]
    got = {}
    for call in calls:
        where = f"key_range{call}"
        result = function(*call)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise Mistake(f"expected (begin, end) of {where}, got {result!r}")
        got[call] = tuple(_whole(x, where) for x in result)
    visited = {call: _visited(call, got[call]) for call in calls}
    wrong_calls = [call for call in calls if visited[call] != _visited(call, key_range(*call))]
    if not wrong_calls:
        return
    call = wrong_calls[0]
    begin, end = got[call]
    shown = f"key_range{call}: expected {key_range(*call)}, got {got[call]}"
    for position, (message, _) in enumerate(_wrong_ranges(*call)):
        if all(visited[c] == _visited(c, _wrong_ranges(*c)[position][1]) for c in calls):
            raise Mistake(f"{message}; {shown}")
    if begin < 0:
        raise Mistake(f"there is no key before key 0; {shown}")
    if begin % call[2]:
        raise Mistake(f"begin has to be a multiple of block_n: round down; {shown}")
    row, key = _missed(call, begin, end)
    if row is not None:
        raise Mistake(f"query {row} sees key {key}, which the loop never reaches; {shown}")
    raise Mistake(f"the loop visits a tile in which no query of this tile has a key; {shown}")


def _visited(call, bounds) -> list[int]:
    """First keys of the tiles that the loop visits."""
    return list(range(*bounds, call[2]))


def _whole(value, where: str) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise Mistake(f"expected two whole numbers from {where}, got {value!r}")
    return int(value)


def _wrong_ranges(start_m, block_m, block_n, q_len, kv_len, window) -> list[tuple[str, tuple[int, int]]]:
    """Known mistakes and the range that each leads to."""
    begin, end = key_range(start_m, block_m, block_n, q_len, kv_len, window)
    start = start_m + kv_len - q_len
    last = start + block_m - 1
    down = lambda key: max(key, 0) // block_n * block_n  # noqa: E731
    of_last = "begin is the last query's: the tile's first query reaches further back, and it decides"
    return [
        (of_last, (down(min(last, kv_len - 1) - window + 1), end)),
        (of_last, (down(last - window + 1), end)),
        (
            "begin is rounded up: the first query's oldest keys lie in the tile before",
            (-(-max(start - window + 1, 0) // block_n) * block_n, end),
        ),
        ("begin is 0: tiles before the window of the tile's first query are visited for nothing", (0, end)),
        (
            "a tile too many: the window counts the query's own key, so it begins at position − window + 1",
            (down(start - window), end),
        ),
        ("end is the first query's: the tile's last query sees further", (begin, start + 1)),
        ("end passes the last key: the tile at the edge has rows that do not exist", (begin, start + block_m)),
        ("end is kv_len: keys after the tile's last query are masked for all of its queries", (begin, kv_len)),
        (
            "query i does not stand at key i but at key i + kv_len − q_len",
            (down(start_m - window + 1), min(start_m + block_m, kv_len)),
        ),
        ("end stops one key early: the last query sees its own key", (begin, end - 1)),
    ]


def _missed(arguments, begin: int, end: int):
    """The first (query, key) pair that is allowed and not visited, or (None, None)."""
    start_m, block_m, block_n, q_len, kv_len, window = arguments
    reached = -(-max(end - begin, 0) // block_n) * block_n + begin
    for row in range(start_m, min(start_m + block_m, q_len)):
        position = row + kv_len - q_len
        for key in range(max(0, position - window + 1), position + 1):
            if not begin <= key < reached:
                return row, key
    return None, None


# ------------------------------------------------------------------------------------------------ tiles_in_window


def tiles_in_window(block_m: int, block_n: int, window: int) -> int:
    """Key tiles that a query tile visits, far from the start of the text; block_m is a multiple of block_n."""
    return block_m // block_n + math.ceil((window - 1) / block_n)


def check_tiles_in_window(function: Callable) -> None:
    cases = ((64, 64, 1), (64, 64, 64), (64, 64, 65), (64, 64, 66), (128, 64, 128), (128, 32, 129), (32, 16, 20))
    got = {case: _count(function(*case), case) for case in cases}
    ceil = math.ceil
    known = {
        "that is what one query needs: the queries of a tile have windows that begin at different keys": (
            lambda m, n, w: ceil(w / n)
        ),
        "these are keys, not tiles: divide by block_n": lambda m, n, w: m + w - 1,
        "the query's own key is one of the window's: only window − 1 keys lie before the tile": (
            lambda m, n, w: m // n + ceil(w / n)
        ),
        "round up: the window's oldest keys may fill a part of a tile, which is visited all the same": (
            lambda m, n, w: m // n + (w - 1) // n
        ),
        "that is the part before the tile: the query tile's own keys need block_m / block_n tiles more": (
            lambda m, n, w: ceil((w - 1) / n)
        ),
        "block_m queries span block_m / block_n key tiles, not one": lambda m, n, w: 1 + ceil((w - 1) / n),
        "tiles are whole: round up": lambda m, n, w: (m + w - 1) / n,
    }
    if all(got[case] == tiles_in_window(*case) for case in cases):
        return
    for message, wrong in known.items():
        if all(got[case] == wrong(*case) for case in cases):
            raise Mistake(message)
    for case in cases:
        if got[case] != tiles_in_window(*case):
            raise Mistake(f"expected {tiles_in_window(*case)} for tiles_in_window{case}, got {got[case]:g}")


def _count(value, case) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"expected a number for tiles_in_window{case}, got {type(value).__name__}") from None


# ------------------------------------------------------------------------------------------------ document_starts


def document_starts(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Where the document of each token begins. cu_seqlens (documents + 1,) int32 -> (tokens,) int32."""
    return cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def check_document_starts(function: Callable) -> None:
    for ends in ([0, 2, 3], [0, 4], [0, 3, 4, 9], [0, 33, 64, 70]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        tokens = ends[-1]
        lengths = cu_seqlens.diff().long()
        each = lambda values: values.long().repeat_interleave(lengths)  # noqa: B023, E731
        right = each(cu_seqlens[:-1])
        got = function(cu_seqlens, tokens)
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor of shape ({tokens},), got {type(got).__name__}")
        if got.shape != (tokens,):
            raise Mistake(f"expected shape ({tokens},) for cu_seqlens {ends}, got {tuple(got.shape)}")
        if got.is_floating_point() or got.dtype == torch.bool:
            raise Mistake(f"expected whole numbers, torch.int32, got {got.dtype}: the kernel compares them with keys")
        got = got.long().cpu()
        if torch.equal(got, right):
            continue
        token = torch.arange(tokens)
        late = torch.searchsorted(cu_seqlens.long(), token, right=False) - 1
        known = {
            "that is the number of the document, not the token where it begins": each(torch.arange(len(lengths))),
            "that is where the document ends: drop the last entry of cu_seqlens, not the first": each(cu_seqlens[1:]),
            "a token at a boundary begins the next document: it is its own start (right=True)": cu_seqlens.long()[
                late.clamp_min(0)
            ],
            "that is the token's place in its document: subtract it from the token's own position": token - right,
            "that is how long the document is": each(lengths),
        }
        for message, wrong in known.items():
            if torch.equal(got, wrong):
                raise Mistake(message)
        raise Mistake(f"expected {right.tolist()} for cu_seqlens {ends}, got {got.tolist()}")
