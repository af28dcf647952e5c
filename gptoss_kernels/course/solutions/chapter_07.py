"""Chapter 07, autograd, operators and honest speed."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from ... import lane
from ...testing import AttentionCase, relative_error
from ..check import Mistake

REGISTERS_PER_SM = 65536
SHARED_PER_SM = 228 * 1024
WARPS_PER_SM = 64


def _empty_heads_last(x):
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _run_forward(q, k, v, sinks, scale, window):
    from ...attention.forward import launch_forward  # decorates the kernel: not before the notebook's set-up

    out = _empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_forward(q, k, v, sinks, out, lse, scale, window, None, None, lane.interpreting())
    return out, lse


def _run_backward(dout, q, k, v, sinks, out, lse, scale, window):
    from ...attention.backward import launch_backward

    dq, dk, dv = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)
    dsinks = launch_backward(
        dout, None, q, k, v, sinks, out, lse, dq, dk, dv, scale, window, None, None, lane.interpreting()
    )
    return dq, dk, dv, dsinks


# ---------------------------------------------------------------------------------------------- the Function's backward


def attention_backward(ctx, dout, dlse):
    """dout (batch, q_heads, length, head_dim), dlse None -> one value for each argument of forward."""
    q, k, v, sinks, out, lse = ctx.saved_tensors
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dq, dk, dv, dsinks = _run_backward(dout, q, k, v, sinks, out, lse, ctx.scale, ctx.window)
    return dq, dk, dv, dsinks, None, None


def check_attention_backward(function: Callable) -> None:
    gpu = torch.cuda.is_available() and not lane.interpreting()
    device, dtype = (torch.device("cuda"), torch.float16) if gpu else (torch.device("cpu"), torch.float32)
    leaves, _ = AttentionCase(q_len=40, q_heads=2, kv_heads=1, dtype=dtype).inputs(device)
    inputs = [x.detach() for x in leaves]
    scale, window = 0.3, 9
    out, lse = _run_forward(*inputs, scale, window)
    context = SimpleNamespace(
        saved_tensors=(*inputs, out, lse), scale=scale, window=window, needs_input_grad=(True,) * 4 + (False,) * 2
    )
    generator = torch.Generator(device).manual_seed(1)
    dout = torch.randn(out.shape, device=device, dtype=torch.float32, generator=generator).to(dtype)
    right = _run_backward(dout, *inputs, out, lse, scale, window)

    got = function(context, dout, None)
    if got is None:
        raise Mistake("backward returned None: is there a return?")
    if not isinstance(got, (tuple, list)):
        raise Mistake(f"expected a tuple, one value for each argument of forward, got {type(got).__name__}")
    if len(got) == 4:
        raise Mistake(
            "4 values: autograd expects one for each argument of forward, 6 here; scale and window have no gradient, "
            "so None stands in their places"
        )
    if len(got) != 6:
        raise Mistake(f"expected 6 values, one for each argument of forward, got {len(got)}")
    names = ("dq", "dk", "dv", "dsinks")
    for place, name in enumerate(names):
        if not isinstance(got[place], torch.Tensor):
            raise Mistake(f"{name}: expected a tensor in place {place}, got {type(got[place]).__name__}")
    if got[4] is not None or got[5] is not None:
        raise Mistake("scale and window are no tensors: their gradients are None")

    def same(a, b):
        return a.shape == b.shape and relative_error(a, b) < 1e-3

    for place, name in enumerate(names):
        if same(got[place], right[place]):
            continue
        for other, gradient in zip(names, right, strict=True):
            if same(got[place], gradient):
                raise Mistake(f"{other} stands in {name}'s place: the order is that of forward's arguments")
        variants = {
            "ctx.window was not passed on": (scale, None),
            "ctx.scale was not passed on": (inputs[0].shape[-1] ** -0.5, window),
        }
        for message, (a_scale, a_window) in variants.items():
            if same(got[place], _run_backward(dout, *inputs, out, lse, a_scale, a_window)[place]):
                raise Mistake(message)
        if got[place].shape != right[place].shape:
            shapes = f"{tuple(right[place].shape)}, got {tuple(got[place].shape)}"
            raise Mistake(f"{name}: a gradient has its input's shape, expected {shapes}")
        error = relative_error(got[place], right[place])
        raise Mistake(f"{name}: expected what run_backward returns for dout, the relative error is {error:.1e}")

    # Its numbers are those of dout, its last stride is not 1. A kernel that ignores this stays within its memory.
    got = function(context, dout.mT.contiguous().mT, None)
    if not all(same(a, b) for a, b in zip(got, right, strict=False)):
        raise Mistake(
            "right for a contiguous dout, wrong for one whose last stride is not 1: autograd passes views, and the "
            "kernel reads rows of adjacent numbers; copy dout if dout.stride(-1) != 1"
        )
    ones = torch.ones((), device=device, dtype=dtype).expand(out.shape)
    expected = _run_backward(ones.contiguous(), *inputs, out, lse, scale, window)
    got = function(context, ones, None)
    if not all(same(a, b) for a, b in zip(got, expected, strict=False)):
        raise Mistake(
            "wrong for an expanded dout, every stride 0, as out.sum().backward() sends it: copy dout if "
            "dout.stride(-1) != 1"
        )


# ------------------------------------------------------------------------------------------------------------- the fake


def attention_forward_fake(q, k, v, sinks, scale, window):
    """(out, lse), uninitialised, as the real operator's: shapes, dtypes, strides and devices."""
    return _empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def check_attention_forward_fake(function: Callable) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    def arguments(transposed, dtype, kv_len, device):
        def draw(heads, length):
            if transposed:
                return torch.empty(2, length, heads, 16, dtype=dtype, device=device).transpose(1, 2)
            return torch.empty(2, heads, length, 16, dtype=dtype, device=device)

        q, k, v = draw(4, 7), draw(2, kv_len), draw(2, kv_len)
        return q, k, v, torch.empty(4, dtype=dtype, device=device), 0.25, None

    cases = [(True, torch.float32, 7), (False, torch.float32, 7), (True, torch.bfloat16, 7), (False, torch.float16, 9)]
    for transposed, dtype, kv_len in cases:
        given = arguments(transposed, dtype, kv_len, "meta")
        q = given[0]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
                got = function(*fakes)
        except (DataDependentOutputException, RuntimeError, AttributeError) as error:
            if isinstance(error, NotImplementedError):
                raise
            raise Mistake(
                f"a fake sees tensors without data: it must not launch a kernel or look at values ({error})"
            ) from error
        layout = "a transposed view" if transposed else "contiguous"
        if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(x, torch.Tensor) for x in got):
            raise Mistake("expected two tensors (out, lse)")
        out, lse = got
        expected_out, expected_lse = attention_forward_fake(*given)
        if any(out.untyped_storage()._cdata == x.untyped_storage()._cdata for x in fakes[:4]):
            raise Mistake("out is one of the arguments: an operator's results share no memory with them")
        if out.shape != expected_out.shape:
            raise Mistake(f"out: expected q's shape {tuple(q.shape)}, got {tuple(out.shape)}")
        if out.dtype != q.dtype:
            raise Mistake(f"out: expected q's dtype {q.dtype}, got {out.dtype}")
        if lse.shape != expected_lse.shape:
            hint = ": keep no dimension of size 1" if lse.shape == (*q.shape[:3], 1) else ""
            rows = tuple(q.shape[:3])
            raise Mistake(f"lse: expected (batch, q_heads, length) = {rows}, got {tuple(lse.shape)}{hint}")
        if lse.dtype != torch.float32:
            raise Mistake(f"lse: expected torch.float32 whatever q's dtype is, got {lse.dtype} for q in {q.dtype}")
        for name, x in (("out", out), ("lse", lse)):
            if x.device != q.device:
                raise Mistake(
                    f"{name}: expected q's device, got {x.device} for q on {q.device}: new_empty keeps the device, "
                    "torch.empty does not"
                )
        if out.stride() != expected_out.stride():
            if out.stride() == q.stride():
                raise Mistake(
                    f"out has q's own strides {q.stride()}, here of q that is {layout}: empty_like copies the layout, "
                    f"run_forward always allocates (batch, length, heads, head_dim), strides {expected_out.stride()}"
                )
            if out.is_contiguous():
                raise Mistake(
                    f"out is contiguous, strides {out.stride()}; run_forward allocates (batch, length, heads, "
                    f"head_dim) and transposes, strides {expected_out.stride()}"
                )
            raise Mistake(f"out: expected strides {expected_out.stride()}, got {out.stride()}")
        if lse.stride() != expected_lse.stride():
            raise Mistake(f"lse: expected strides {expected_lse.stride()}, got {lse.stride()}")


# ----------------------------------------------------------------------------------------------------------- the counts


def attention_flops(tokens, heads, head_dim, window=None, backward=False):
    """FLOPs of the matrix products of one causal attention layer, batch 1."""
    w = tokens if window is None else min(window, tokens)
    pairs = tokens * w - w * (w - 1) // 2
    products = 5 if backward else 2
    return products * 2 * head_dim * pairs * heads


def check_attention_flops(function: Callable) -> None:
    heads, head_dim = 3, 16
    unit = 4 * heads * head_dim  # forward, one pair a head

    def ask(*arguments, **keywords):
        got = function(*arguments, **keywords)
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            raise Mistake(f"expected a number, got {type(got).__name__}")
        return got

    got, n = ask(5, heads, head_dim), 5
    known = {
        "that is the whole square: a causal row i sees i + 1 keys": unit * n * n,
        "half the square leaves out half of the diagonal: n (n + 1) / 2 pairs": unit * n * n / 2,
        "the diagonal is missing: a query sees its own key": unit * n * (n - 1) // 2,
        "a multiplication and an addition are two FLOPs": unit * n * (n + 1) // 4,
        "that is one product: forward has two, scores and P V": unit * n * (n + 1) // 4,
        "the heads are missing": unit * n * (n + 1) // 2 // heads,
    }
    expected = unit * n * (n + 1) // 2
    for message, wrong in known.items():
        if got == wrong:
            raise Mistake(message)
    if got != expected:
        raise Mistake(
            f"{n} tokens, {heads} heads, head_dim {head_dim}: expected {expected} (15 pairs a head), got {got}"
        )

    got, window = ask(5, heads, head_dim, window=2), 2
    known = {
        "window: the first rows see fewer keys than the window": unit * n * window,
        "window: it counts the query's own key, so row i sees min(i + 1, window)": unit * (1 + 2 + 3 + 3 + 3),
        "window is ignored": expected,
    }
    for message, wrong in known.items():
        if got == wrong:
            raise Mistake(message)
    if got != unit * 9:
        raise Mistake(f"{n} tokens, a window of 2: rows see 1, 2, 2, 2, 2 keys, expected {unit * 9} FLOPs, got {got}")
    if (got := ask(5, heads, head_dim, window=100)) != expected:
        raise Mistake(f"a window longer than the text is no window: expected {expected} for 5 tokens, got {got}")

    got = ask(5, heads, head_dim, window=2, backward=True)
    right = unit * 9 * 5 // 2
    known = {
        "backward is ignored": unit * 9,
        "backward has five products, not four: the scores are computed once more": unit * 9 * 2,
        "backward alone is asked for, without forward": unit * 9 * 7 // 2,
        "seven products are what the two backward kernels execute; what is counted is what must be done, five": (
            unit * 9 * 7 // 2
        ),
    }
    for message, wrong in known.items():
        if got == wrong:
            raise Mistake(message)
    if got != right:
        raise Mistake(f"backward, 5 tokens, a window of 2: expected {right} FLOPs, got {got}")
    # Long texts: exact, and in no time.
    if ask(131072, 64, 64) != attention_flops(131072, 64, 64):
        raise Mistake("131,072 tokens: not exact; floats lose the last digits, use // and integers")


# ------------------------------------------------------------------------------------------------------------ occupancy


def blocks_per_sm(registers, shared, num_warps):
    """Blocks that fit on a multiprocessor of an H100 at once."""
    per_warp = -(-32 * registers // 256) * 256
    by_registers = REGISTERS_PER_SM // (per_warp * num_warps)
    by_shared = SHARED_PER_SM // (shared + 1024)
    by_warps = WARPS_PER_SM // num_warps
    return min(by_registers, by_shared, by_warps)


def check_blocks_per_sm(function: Callable) -> None:
    kib = 1024

    def ask(registers, shared, num_warps):
        got = function(registers, shared, num_warps)
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            raise Mistake(f"expected a whole number, got {type(got).__name__}")
        if got != int(got):
            raise Mistake(f"a block fits or it does not: expected a whole number, got {got}; divide with //")
        return got

    # (registers, shared, num_warps), wrong answer -> the mistake behind it
    no_registers = (
        "that is what warps and shared memory allow; registers are a thread's, and a block has 32 * num_warps threads"
    )
    known = [
        ((128, 16 * kib, 8), 8, no_registers),
        ((128, 16 * kib, 8), 13, "all three limits hold, so the smallest counts"),
        ((128, 16 * kib, 8), 16, "registers are a thread's, and a block has 32 * num_warps threads"),
        ((32, 100 * kib, 4), 16, "the limit of shared memory is missing"),
        ((16, 0, 4), 32, "the limit of 64 warps is missing"),
        ((170, 8 * kib, 4), 3, "a warp's registers come in units of 256: 170 a thread take the room of 176"),
        ((64, 76 * kib, 4), 3, "each block takes 1 KiB of shared memory more than it asks for"),
        ((64, 113 * kib, 4), 1, "a multiprocessor has 228 KiB of shared memory; 227 is the most for one block"),
    ]
    for arguments, wrong, message in known:
        right = blocks_per_sm(*arguments)
        got = ask(*arguments)
        if got == wrong:
            raise Mistake(message)
        if got != right and all(got != its_wrong for case, its_wrong, _ in known if case == arguments):
            registers, shared, num_warps = arguments
            raise Mistake(
                f"{registers} registers a thread, {shared} bytes of shared memory, {num_warps} warps: expected {right} "
                f"blocks, got {got}"
            )
    for registers in (24, 80, 149, 168, 207, 255):
        for num_warps in (4, 8, 16):
            for shared in (0, 40 * kib, 80 * kib, 227 * kib):
                if (got := ask(registers, shared, num_warps)) != (right := blocks_per_sm(registers, shared, num_warps)):
                    raise Mistake(
                        f"{registers} registers a thread, {shared} bytes of shared memory, {num_warps} warps: expected "
                        f"{right} blocks, got {got}"
                    )
