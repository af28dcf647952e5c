"""Chapter 06, the flash backward kernels."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ... import lane
from ...testing import relative_error
from ..check import Mistake

# ----------------------------------------------------------------------------------------------- dq_causal_kernel


@triton.jit
def dq_causal_kernel(
    q,  # (heads, length, HEAD_DIM), contiguous
    k,
    v,
    dout,
    lse,  # (heads, length) fp32
    delta,
    dq,  # as q
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_m = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1).to(tl.int64) * length  # row 0 of this head
    dim = tl.arange(0, HEAD_DIM)[None, :]
    row = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    own = (first + row)[:, None] * HEAD_DIM + dim  # [BLOCK_M, HEAD_DIM]
    q_tile = tl.load(q + own)
    do_tile = tl.load(dout + own)
    row_lse = tl.load(lse + first + row)
    row_delta = tl.load(delta + first + row)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for start_n in range(0, start_m + BLOCK_M, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        there = (first + key)[:, None] * HEAD_DIM + dim  # [BLOCK_N, HEAD_DIM]
        k_tile = tl.load(k + there)
        v_tile = tl.load(v + there)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        p = tl.exp(scores - row_lse[:, None])
        p = tl.where(row[:, None] >= key[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    tl.store(dq + own, (acc * scale).to(dq.dtype.element_ty))


UNWRITTEN = -777.0
CLOSE = 5e-3  # relative; an fp32 product in TF32, which a GPU does unless told otherwise, stays below
CLOSE_HALF = 2e-2  # fp16 inputs and products, fp32 sums stay below a tenth of it


def check_dq_causal_kernel(function: Callable) -> None:
    if not isinstance(function, triton.runtime.KernelInterface):
        try:
            function()
        except NotImplementedError:
            raise
        except Exception:
            pass
        raise Mistake(f"expected a kernel, a function under @triton.jit, got {type(function).__name__}")
    gpu = torch.cuda.is_available() and not lane.interpreting()
    device = torch.device("cuda" if gpu else "cpu")
    for block_m, block_n in ((32, 16), (16, 32)):
        saved, scale, right, known = _dq_problem(block_m, block_n)
        heads, length, head_dim = right.shape
        # One head more than there are programs for: whoever writes beside its own rows is seen.
        dq = torch.full((heads + 1, length, head_dim), UNWRITTEN, device=device)
        tensors = [x.float().to(device) for x in saved]
        function[(length // block_m, heads)](
            *tensors, dq, length, scale, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n
        )
        dq = dq.cpu()
        sizes = f"BLOCK_M={block_m}, BLOCK_N={block_n}"
        if (dq[heads] != UNWRITTEN).any():
            raise Mistake("a program wrote beside its own tile: dq belongs at the offsets of its own rows, `dq + own`")
        got = dq[:heads]
        if (got == UNWRITTEN).all():
            raise Mistake("nothing was written: store acc into dq after the loop")
        if (got == UNWRITTEN).any():
            head, row, _ = (got == UNWRITTEN).nonzero()[0].tolist()
            raise Mistake(f"row {row} of head {head} was not written, with {sizes}")
        if not torch.isfinite(got).all():
            head, row, _ = (~torch.isfinite(got)).nonzero()[0].tolist()
            raise Mistake(
                f"row {row} of head {head} holds NaN or infinity: set p to 0 where a query does not see a key, with "
                "tl.where after the exponential; or a load ran past the tile: keys are BLOCK_N long"
            )
        if relative_error(got, right) < CLOSE:
            continue
        for message, wrong in known.items():
            if relative_error(got, wrong) < CLOSE:
                raise Mistake(message)
        worst = (got - right).abs().amax(-1) > CLOSE * right.abs().max()
        head, row = worst.nonzero()[0].tolist()
        raise Mistake(
            f"with {sizes}, row {row} of head {head}: expected dq {_shown(right[head, row])}, "
            f"got {_shown(got[head, row])}"
        )
    _in_half_precision(function, device)


def _in_half_precision(function: Callable, device: torch.device) -> None:
    """For a kernel that is right in fp32."""
    saved, scale, right, _ = _dq_problem(32, 16)
    heads, length, head_dim = right.shape
    half = [x.half().to(device) for x in saved[:4]]
    dq = torch.full((heads, length, head_dim), UNWRITTEN, dtype=torch.float16, device=device)
    constants = dict(HEAD_DIM=head_dim, BLOCK_M=32, BLOCK_N=16)
    try:
        function[(length // 32, heads)](
            *half, *(x.float().to(device) for x in saved[4:]), dq, length, scale, **constants
        )
    except Exception as error:
        raise Mistake("it fails on half-precision inputs: round ds to k_tile.dtype before the last product") from error
    error = relative_error(dq.cpu(), right)
    if not error < CLOSE_HALF:
        raise Mistake(
            f"right on fp32 inputs, but on fp16 inputs dq has a relative error of {error:.1e}: acc stays fp32"
        )


def _dq_problem(block_m: int, block_n: int):
    """((q, k, v, dout, lse, delta), scale, dq, {message: dq of a wrong kernel}), all in fp64."""
    generator = torch.Generator().manual_seed(0)
    heads, length, head_dim, scale = 2, 64, 16, 0.5
    q, k, v, dout = (torch.randn(heads, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(4))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    raw = q @ k.mT
    lse = torch.logaddexp(
        (raw * scale).masked_fill(~seen, float("-inf")).logsumexp(-1), torch.tensor([0.5, -1.0]).double()[:, None]
    )
    p = torch.exp(raw * scale - lse[..., None])
    delta = (dout * ((p * seen) @ v)).sum(-1)
    rest = dout @ v.mT - delta[..., None]  # dP - delta
    ds = p * seen * rest
    right = scale * ds @ k

    tile_of_row, tile_of_key = torch.arange(length) // block_m, torch.arange(length) // block_n
    begins_before = tile_of_key[None, :] * block_n < tile_of_row[:, None] * block_m  # key tile before the query tile
    last_tile = ((tile_of_row + 1) * block_m - 1) // block_n
    key = torch.arange(length)[None, :]
    visits_by_block_m = sum(  # how often each key is visited if start_n moves on by BLOCK_M
        ((start <= key) & (key < start + block_n) & (start < (tile_of_row[:, None] + 1) * block_m)).double()
        for start in range(0, length, block_m)
    )
    by_key = lambda mask: scale * (p * mask * rest) @ k  # noqa: E731
    unscaled = torch.exp(raw - lse[..., None]) * seen * rest
    known = {
        "scale is missing: dQ = scale · dS K": right / scale,
        "scale is applied twice to dQ: once, after the loop (or once in ds)": right * scale,
        "the mask is missing: queries see keys after their own. p is 0 unless row >= key": by_key(1.0),
        "the mask is missing in the last tiles: queries see later keys there. p is 0 unless row >= key": by_key(
            tile_of_key[None, :] * block_n < (tile_of_row[:, None] + 1) * block_m
        ),
        "the mask hides a query's own key: it is row >= key, not row > key": by_key(seen.tril(-1)),
        "the mask is the wrong way round: a query sees the keys at or before its own row": by_key(seen.mT),
        "the loop ends before the diagonal: it has to reach the key of the tile's last query": by_key(
            seen & begins_before
        ),
        "the loop ends at the tile of the first query's key: it has to reach start_m + BLOCK_M": by_key(
            seen & (tile_of_key[None, :] * block_n <= tile_of_row[:, None] * block_m)
        ),
        "start_n moves on by BLOCK_M: a step is a tile of keys, BLOCK_N": by_key(seen * visits_by_block_m),
        "only the last tile of keys is left: add to acc in every step": by_key(
            seen & (tile_of_key[None, :] == last_tile[:, None])
        ),
        "only the first tile of keys is there: start_n moves on by BLOCK_N": by_key(seen & (tile_of_key == 0)),
        "delta is missing: ds = p · (dp - delta)": scale * (p * seen * (dout @ v.mT)) @ k,
        "delta is added: ds = p · (dp - delta)": scale * (p * seen * (rest + 2 * delta[..., None])) @ k,
        "delta is scaled: it is a sum over dO · O, which has no scale in it": scale
        * (p * seen * (rest + (1 - scale) * delta[..., None]))
        @ k,
        "p is missing in ds: ds = p · (dp - delta)": scale * (seen * rest) @ k,
        "lse is missing: p = exp(scores - lse)": scale * (torch.exp(raw * scale) * seen * rest) @ k,
        "the scores in p are not scaled: lse is that of scale · q·k": scale * unscaled @ k,
        "the last product takes K, not V: dQ = scale · dS K": scale * ds @ v,
        "the last product takes dS, not P: dQ = scale · dS K": scale * (p * seen) @ k,
    }
    return (q, k, v, dout, lse, delta), scale, right, known


def _shown(x: torch.Tensor) -> str:
    return str([round(value, 4) for value in x[:3].tolist()])[:-1] + ", …]"


# ---------------------------------------------------------------------------------------------------- query_range


def query_range(
    start_n: int, block_m: int, block_n: int, q_len: int, kv_len: int, sliding_window: int | None = None
) -> tuple[int, int]:
    """Query rows (begin, end) that see a key of start_n … start_n + block_n - 1; begin is a multiple of block_m."""
    offset = kv_len - q_len
    begin = max(start_n - offset, 0) // block_m * block_m
    end = q_len
    if sliding_window is not None:
        last_key = start_n + block_n - 1
        end = min(q_len, last_key + sliding_window - offset)
    return begin, end


def _wrong_ranges() -> dict[str, Callable]:
    """Message -> a query_range that makes this mistake."""

    def variant(begin=None, end=None):
        def function(start_n, block_m, block_n, q_len, kv_len, window=None):
            first, stop = query_range(start_n, block_m, block_n, q_len, kv_len, window)
            offset, last = kv_len - q_len, start_n + block_n - 1
            if begin:
                first = begin(start_n, last, block_m, offset)
            if end and window is not None:
                stop = end(start_n, last, q_len, offset, window)
            return first, stop

        return function

    down = lambda x, block: max(x, 0) // block * block  # noqa: E731
    return {
        "queries before the tile's first key do not see it: begin at the diagonal, not at row 0": variant(
            begin=lambda start_n, last, block_m, offset: 0
        ),
        "the first row follows from the tile's first key, start_n: its last key is seen later": variant(
            begin=lambda start_n, last, block_m, offset: down(last - offset, block_m)
        ),
        "query row i stands at position i + kv_len - q_len: the offset is missing where the loop begins": variant(
            begin=lambda start_n, last, block_m, offset: down(start_n, block_m)
        ),
        "the offset is missing: row i stands at position i + kv_len - q_len": variant(
            begin=lambda start_n, last, block_m, offset: down(start_n, block_m),
            end=lambda start_n, last, q_len, offset, window: min(q_len, last + window),
        ),
        "the offset has the wrong sign: row = position - (kv_len - q_len)": variant(
            begin=lambda start_n, last, block_m, offset: down(start_n + offset, block_m),
            end=lambda start_n, last, q_len, offset, window: min(q_len, last + window + offset),
        ),
        "the query tiles lie on a grid: round begin down to a multiple of block_m": variant(
            begin=lambda start_n, last, block_m, offset: max(start_n - offset, 0)
        ),
        "begin is rounded up: the tile that holds the first row is needed too": variant(
            begin=lambda start_n, last, block_m, offset: -(-max(start_n - offset, 0) // block_m) * block_m
        ),
        "begin is negative: before row 0 there are no queries": variant(
            begin=lambda start_n, last, block_m, offset: (start_n - offset) // block_m * block_m
        ),
        "the window is ignored: a key is out of reach for queries that come sliding_window later": variant(
            end=lambda start_n, last, q_len, offset, window: q_len
        ),
        "the last row follows from the tile's last key, start_n + block_n - 1, not from its first": variant(
            end=lambda start_n, last, q_len, offset, window: min(q_len, start_n + window - offset)
        ),
        "one row too many: positions j … j + sliding_window - 1 see key j, and end is one past the last": variant(
            end=lambda start_n, last, q_len, offset, window: min(q_len, last + 1 + window - offset)
        ),
        "one row too few: end is one past the last row, which stands at last_key + sliding_window - 1": variant(
            end=lambda start_n, last, q_len, offset, window: min(q_len, last - 1 + window - offset)
        ),
        "the offset is missing where the loop ends: row i stands at position i + kv_len - q_len": variant(
            end=lambda start_n, last, q_len, offset, window: min(q_len, last + window)
        ),
        "end goes beyond the last query: clip it to q_len": variant(
            end=lambda start_n, last, q_len, offset, window: last + window - offset
        ),
    }  # fmt: skip


def check_query_range(function: Callable) -> None:
    cases = [
        (start_n, block_m, block_n, q_len, kv_len, window)
        for q_len, kv_len in ((20, 20), (13, 20), (1, 20), (7, 9))
        for window in (None, 1, 3, 6, 100)
        for block_m, block_n in ((1, 4), (4, 4), (4, 8), (8, 4), (1, 1))
        for start_n in range(0, kv_len, block_n)
    ]
    got = {}
    for case in cases:
        answer = function(*case)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise Mistake(f"expected two ints (begin, end), got {answer!r}")
        try:
            begin, end = (int(x) for x in answer)
        except (TypeError, ValueError):
            raise Mistake(f"expected two ints (begin, end), got {answer!r}") from None
        if (begin, end) != tuple(answer):
            raise Mistake(f"expected two ints (begin, end), got {answer!r}: divide with //, not with /")
        got[case] = begin, end
    bad = [case for case in cases if _tiles(got[case], case) != _needed(*case) or _grid(got[case], case)]
    if not bad:
        return
    for message, wrong in _wrong_ranges().items():
        if all(_tiles(got[case], case) == _tiles(wrong(*case), case) for case in cases):
            raise Mistake(f"{message}. {_example(bad[0], got)}")
    raise Mistake(_example(bad[0], got))


def _tiles(answer, case) -> list[int]:
    """First rows of the tiles that the loop visits."""
    return list(range(*answer, case[1]))


def _grid(answer, case) -> bool:
    """Whether a range that is not empty goes off the grid of tiles or beyond the last row."""
    begin, end = answer
    return begin < end and (begin % case[1] != 0 or begin < 0 or end > case[3])


def _needed(start_n, block_m, block_n, q_len, kv_len, window) -> list[int]:
    """First rows of the query tiles with a query that sees a key of the tile, by looking at every pair."""
    needed = []
    for start_m in range(0, q_len, block_m):
        rows = range(start_m, min(start_m + block_m, q_len))
        keys = range(start_n, min(start_n + block_n, kv_len))
        distances = [row + kv_len - q_len - key for row in rows for key in keys]
        if any(0 <= distance < (window or kv_len) for distance in distances):
            needed.append(start_m)
    return needed


def _example(case, got) -> str:
    start_n, block_m, block_n, q_len, kv_len, window = case
    needed = _needed(*case)
    tiles = f"the tiles that begin at rows {needed}" if needed else "no tile at all"
    return (
        f"With start_n={start_n}, block_m={block_m}, block_n={block_n}, q_len={q_len}, kv_len={kv_len}, "
        f"sliding_window={window} the loop has to visit {tiles}; range{(*got[case], block_m)} visits "
        f"{_tiles(got[case], case)}, up to row {got[case][1] - 1}"
    )


# ------------------------------------------------------------------------------------------------ empty_gradients


def empty_gradients(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dk, dv: uninitialised, shapes, dtypes and devices of k and v, equal strides, the last 1."""
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    contiguous = torch.zeros(2, 2, 6, 4)
    transposed = torch.zeros(2, 6, 2, 4).transpose(1, 2)
    fused = torch.zeros(2, 6, 5, 4).transpose(1, 2)
    return {
        "k contiguous and v a transposed view": (contiguous, transposed),
        "k a transposed view and v contiguous": (transposed, contiguous),
        "k and v slices of a fused tensor": (fused[:, :2], fused[:, 3:]),
        "k and v with a last stride of 2": (torch.zeros(2, 2, 6, 8)[..., ::2], torch.zeros(2, 2, 6, 8)[..., ::2]),
        "k and v whose last two dimensions are swapped in memory": (torch.zeros(2, 2, 4, 6).mT,) * 2,
        "k contiguous and v expanded over the heads": (contiguous, torch.zeros(2, 1, 6, 4).expand(2, 2, 6, 4)),
        "k and v expanded over the heads": (torch.zeros(2, 1, 6, 4).expand(2, 2, 6, 4),) * 2,
        "k and v of dtype float16": (contiguous.half(), transposed.half()),
        "k of dtype float16 and v of float32": (contiguous.half(), transposed),
        "k and v on the meta device": (contiguous.to("meta"), transposed.to("meta")),
    }


def check_empty_gradients(function: Callable) -> None:
    for layout, (k, v) in _layouts().items():
        got = function(k, v)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Mistake(f"expected two tensors dk, dv, got {type(got).__name__}")
        for name, x, like in zip(("dk", "dv"), got, (k, v), strict=True):
            if not isinstance(x, torch.Tensor):
                raise Mistake(f"{name}: expected a tensor, got {type(x).__name__}")
            if x.shape != like.shape:
                raise Mistake(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")
            if x.dtype != like.dtype or x.device != like.device:
                raise Mistake(f"{name}: expected {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
        dk, dv = got
        strides = f"dk {dk.stride()}, dv {dv.stride()}"
        if dk.stride() != dv.stride():
            raise Mistake(
                f"the strides differ, with {layout}: {strides}. A `…_like` function keeps the layout of its argument, "
                "and k and v need not have the same"
            )
        if dk.stride(-1) != 1:
            raise Mistake(
                f"the last stride is not 1, with {layout}: {strides}; the kernel adds `dim` to a row's address"
            )
        if 0 in dk.stride():
            raise Mistake(f"elements share memory, with {layout}: {strides}. Each element of a gradient needs its own")
        if dk.device.type == "meta":
            continue
        dk.fill_(1)
        dv.fill_(2)
        if not (dk == 1).all():
            raise Mistake("dk and dv share memory: they are two tensors")
        if any((x == filled).any() for x in (k, v) for filled in (1, 2)):
            raise Mistake("dk or dv shares memory with k or v: filling it would overwrite the input")
        # Distinct elements at distinct addresses, whatever the strides.
        offsets = sum(
            torch.arange(size).view([-1 if d == axis else 1 for d in range(4)]) * stride
            for axis, (size, stride) in enumerate(zip(dk.shape, dk.stride(), strict=True))
        )
        if offsets.unique().numel() != dk.numel():
            raise Mistake(f"elements share memory, with {layout}: {strides}. Each element of a gradient needs its own")
