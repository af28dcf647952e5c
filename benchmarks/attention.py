"""Attention at gpt-oss's shapes: forward and backward time and peak memory, ours beside the other implementations.

    python benchmarks/attention.py --contenders ours,flex,cudnn,fa4,fla,eager --lengths 4096,8192,16384,32768

One batch row, N(0, 1) inputs stored as (batch, tokens, heads, head_dim), as a model's projections leave them. Times are
GPU times of single calls; the backward pass is forward + backward less forward. Peak memory is what one forward and
backward pass allocates on top of its inputs: outputs and gradients included. Ours is timed only if it agrees with an
fp64 reference; for the others the same error is measured and stored. Rows are appended to a CSV file as they come.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import harness
from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_reference

# (q, k, v, sinks, window) -> out, all (batch, heads, tokens, head_dim); sinks (heads,); window an int or None.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int | None], torch.Tensor]

NAMES = ("out", "dq", "dk", "dv", "dsinks")
# Largest relative error, ‖x − reference‖ / ‖reference‖, with which ours may be timed.
LIMITS = {
    torch.bfloat16: {"dsinks": 6e-3} | dict.fromkeys(NAMES[:4], 4e-3),
    torch.float16: {"dsinks": 6e-3} | dict.fromkeys(NAMES[:4], 4e-3),
    torch.float32: dict.fromkeys(NAMES, 1e-5),
}
COLUMNS = (
    *("contender", "package", "tokens", "window", "forward_ms", "forward_p20_ms", "forward_p80_ms"),
    *("backward_ms", "total_ms", "total_p20_ms", "total_p80_ms", "peak_extra_gib", "max_relative_error"),
    *("dtype", "heads", "kv_heads", "head_dim", "gpu", "torch", "triton", "transformers", "date", "commit"),
)
SHOWN = ("contender", "tokens", "window", "forward_ms", "backward_ms", "total_ms", "peak_extra_gib")


@dataclass(frozen=True)
class Contender:
    """load() -> Attend, raising where it cannot run; package: its distribution; what it has of sinks and windows."""

    load: Callable[[torch.device], Attend]
    package: str
    sinks: bool = True
    windows: bool = True
    max_tokens: int | None = None


class Unavailable(Exception):
    """Why a contender cannot run here."""


def load_ours(device: torch.device) -> Attend:
    backend = "triton" if device.type == "cuda" else "auto"
    return lambda q, k, v, sinks, window: flash_attention(q, k, v, sinks, sliding_window=window, backend=backend)


def load_flex(device: torch.device) -> Attend:
    _need_cuda(device)
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # one compilation a length and window

    @functools.cache
    def block_mask(tokens: int, window: int | None):
        def allowed(batch, head, query, key):
            return query >= key if window is None else (query >= key) & (query - key < window)

        return create_block_mask(allowed, None, None, tokens, tokens, device=device)

    @functools.partial(torch.compile, dynamic=False)
    def with_sinks(q, k, v, sinks, mask):
        out, aux = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        keep = torch.sigmoid(aux.lse - sinks.float()[None, :, None])
        return (out.float() * keep[..., None]).to(q.dtype)

    return lambda q, k, v, sinks, window: with_sinks(q, k, v, sinks, block_mask(q.shape[2], window))


def load_cudnn(device: torch.device) -> Attend:
    _need_cuda(device)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, sinks, window):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def load_fa4(device: torch.device) -> Attend:
    _need_cuda(device)
    from flash_attn.cute import flash_attn_func

    def attend(q, k, v, sinks, window):
        reach = (None, None) if window is None else (window - 1, 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(q, k, v, causal=True, window_size=reach, learnable_sink=sinks)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def load_fla(device: torch.device) -> Attend:
    _need_cuda(device)
    from fla.ops.attn.parallel import parallel_attn

    def attend(q, k, v, sinks, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return parallel_attn(q, k, v, window_size=window, sink_bias=sinks).transpose(1, 2)

    return attend


def load_eager(device: torch.device) -> Attend:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    @functools.lru_cache(maxsize=1)
    def mask(tokens: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if window is not None:
            allowed = allowed.triu(1 - window)
        bias = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device)
        return bias.masked_fill_(~allowed, torch.finfo(dtype).min)

    def attend(q, k, v, sinks, window):
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], sinks=sinks, training=True)
        out, _ = eager_attention_forward(
            module, q, k, v, mask(q.shape[2], window, q.dtype), scaling=q.shape[-1] ** -0.5
        )
        return out.transpose(1, 2)

    return attend


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"needs a CUDA GPU, --device is {device}")


CONTENDERS = {
    "ours": Contender(load_ours, "gptoss-kernels"),
    "flex": Contender(load_flex, "torch"),
    "cudnn": Contender(load_cudnn, "torch", sinks=False, windows=False),
    "fa4": Contender(load_fa4, "flash-attn-4"),
    "fla": Contender(load_fla, "fla-core"),
    "eager": Contender(load_eager, "transformers", max_tokens=8192),
}


def make_inputs(tokens: int, options: argparse.Namespace, seed: int) -> tuple[torch.Tensor, ...]:
    """q, k, v (1, heads, tokens, head_dim), sinks (heads,), and the gradient of out; q, k, v, sinks require grad."""
    generator = torch.Generator(options.device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=options.device).to(options.dtype)

    def draw_heads(heads: int) -> torch.Tensor:
        return draw(1, tokens, heads, options.head_dim).transpose(1, 2)

    heads, kv_heads = options.heads, options.kv_heads
    leaves = draw_heads(heads), draw_heads(kv_heads), draw_heads(kv_heads), draw(heads)
    return *(leaf.requires_grad_() for leaf in leaves), draw_heads(heads)


def run(contender: Contender, attend: Attend, inputs: tuple[torch.Tensor, ...], window: int | None):
    """out and the gradients of q, k, v and, where the contender has sinks, sinks."""
    *leaves, grad = inputs
    out = attend(*leaves, window)
    return out, *torch.autograd.grad(out, leaves if contender.sinks else leaves[:3], grad)


def relative_errors(
    contender: Contender, attend: Attend, inputs: tuple[torch.Tensor, ...], window: int | None
) -> dict[str, float]:
    """Relative error of out, dq, dk, dv (and dsinks) against fp64, one kv head's group at a time to bound memory."""
    q, k, v, sinks, grad = inputs
    group = q.shape[1] // k.shape[1]
    got = run(contender, attend, inputs, window)
    errors, sizes = [0.0] * len(got), [0.0] * len(got)
    for head in range(k.shape[1]):
        heads, kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        parts = (q[:, heads], k[:, kv], v[:, kv], sinks[heads])
        exact = [x.detach().double().requires_grad_() for x in parts]
        used = exact if contender.sinks else [*exact[:3], None]
        out, _ = attention_reference(*used, sliding_window=window)
        expected = out, *torch.autograd.grad(out, exact[: len(got) - 1], grad[:, heads].double())
        for i, want in enumerate(expected):
            # out and dq have query heads, dk and dv kv heads; dsinks is a vector of query heads.
            have = got[i][heads] if i == 4 else got[i][:, kv if i in (2, 3) else heads]
            errors[i] += (have.detach().double() - want).square().sum().item()
            sizes[i] += want.detach().square().sum().item()
    return {name: (error / size) ** 0.5 for name, error, size in zip(NAMES, errors, sizes, strict=False)}


def over_limit(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """What exceeds LIMITS (or is not a number), in words."""
    limits = LIMITS[dtype]
    # `not <=`, so that NaN is over the limit.
    return [f"{name} {error:.1e} > {limits[name]:.0e}" for name, error in errors.items() if not error <= limits[name]]


def load_contenders(options: argparse.Namespace) -> dict[str, Attend]:
    """Those of --contenders that run here; says why the others do not."""
    loaded = {}
    for name in options.contenders:
        try:
            loaded[name] = CONTENDERS[name].load(options.device)
        except (Unavailable, ImportError, RuntimeError) as error:
            print(f"{name}: skipped, {_first_line(error)}")
    return loaded


def check_contenders(loaded: dict[str, Attend], options: argparse.Namespace) -> dict[tuple[str, int | None], float]:
    """(name, window) -> largest relative error at --check-tokens; drops those that fail to run.

    Raises:
        SystemExit: ours is over its limit.
    """
    worst = {}
    inputs = make_inputs(options.check_tokens, options, seed=0)
    for name, attend in list(loaded.items()):
        for window in options.windows:
            if window is not None and not CONTENDERS[name].windows:
                continue
            try:
                errors = relative_errors(CONTENDERS[name], attend, inputs, window)
            except Exception as error:  # a contender that does not run here must not end the others' measurement
                if name == "ours":
                    raise
                print(f"{name}: skipped, {_first_line(error)}")
                del loaded[name]
                break
            shown = ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
            print(f"{name}: relative error at {options.check_tokens} tokens, window {window}: {shown}")
            if name == "ours" and (over := over_limit(errors, options.dtype)):
                raise SystemExit(f"ours is wrong and is not timed: window {window}: {', '.join(over)}")
            worst[name, window] = max(errors.values())
    return worst


def measure(
    loaded: dict[str, Attend], tokens: int, window: int | None, options: argparse.Namespace
) -> dict[str, dict[str, float | None]]:
    """name -> forward, backward, total times and peak memory of every contender that takes this length and window."""
    sets = [make_inputs(tokens, options, seed) for seed in range(3)]
    calls, peaks = {}, {}
    for name, attend in loaded.items():
        contender = CONTENDERS[name]
        if (window is not None and not contender.windows) or tokens > (contender.max_tokens or tokens):
            continue

        def forward(n, attend=attend):
            attend(*sets[n % len(sets)][:4], window)

        def total(n, contender=contender, attend=attend):
            run(contender, attend, sets[n % len(sets)], window)

        try:
            total(0)
            peaks[name] = harness.peak_extra_gib(functools.partial(total, 1), options.device)
        except Exception as error:  # as in check_contenders; running out of memory is what eager does
            if name == "ours":
                raise
            print(f"{name}: {tokens} tokens, window {window}: no row, {_first_line(error)}")
            continue
        calls[name, "forward"], calls[name, "total"] = forward, total
    times = harness.time_interleaved(calls, options.device, rounds=options.rounds)

    results = {}
    for name in peaks:
        forward, forward_p20, forward_p80 = harness.percentiles(times[name, "forward"])
        total, total_p20, total_p80 = harness.percentiles(times[name, "total"])
        results[name] = {
            "forward_ms": forward,
            "forward_p20_ms": forward_p20,
            "forward_p80_ms": forward_p80,
            "backward_ms": total - forward,
            "total_ms": total,
            "total_p20_ms": total_p20,
            "total_p80_ms": total_p80,
            "peak_extra_gib": peaks[name],
        }
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message that names what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--contenders", default=",".join(CONTENDERS), help="of " + ", ".join(CONTENDERS))
    add("--lengths", default="4096,8192,16384,32768", help="tokens")
    add("--windows", default="0,128", help="keys kept; 0 is a full layer")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "attention.csv", help="rows go here")
    add("--device", default="cuda", help="cuda, or cpu to try the script without a GPU")
    add("--dtype", help="bfloat16, float16 or float32; default bfloat16 on a GPU, float32 on a CPU")
    add("--rounds", type=int, default=30, help="timed rounds, >= 2")
    add("--check-tokens", type=int, default=2048, help="length of the correctness check")
    add("--heads", type=int, default=64)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    options = parser.parse_args(arguments)

    def integers(flag: str, text: str, least: int) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or min(values) < least:
            parser.error(f"{flag}: expected integers >= {least} with commas between, got {text!r}")
        return values

    options.contenders = options.contenders.split(",")
    if unknown := [name for name in options.contenders if name not in CONTENDERS]:
        parser.error(f"--contenders: expected some of {', '.join(CONTENDERS)}, got {', '.join(map(repr, unknown))}")
    options.lengths = integers("--lengths", options.lengths, 1)
    options.windows = [window or None for window in integers("--windows", options.windows, 0)]
    if options.device not in ("cuda", "cpu"):
        parser.error(f"--device: expected cuda or cpu, got {options.device!r}")
    options.device = torch.device(options.device)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
    default = "bfloat16" if options.device.type == "cuda" else "float32"
    if (options.dtype or default) not in dtypes:
        parser.error(f"--dtype: expected one of {', '.join(dtypes)}, got {options.dtype!r}")
    options.dtype = dtypes[options.dtype or default]
    if options.rounds < 2:
        parser.error(f"--rounds: expected >= 2, got {options.rounds}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA GPU for 'cuda', got none; --device cpu tries the script without one")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    origin = harness.provenance(options.device)
    print(" · ".join(f"{key} {value}" for key, value in origin.items()))
    loaded = load_contenders(options)
    worst = check_contenders(loaded, options)
    rows = []
    for tokens in options.lengths:
        for window in options.windows:
            gc.collect()
            new = []
            for name, result in measure(loaded, tokens, window, options).items():
                package = CONTENDERS[name].package
                new.append(
                    {
                        "contender": name,
                        "package": f"{package} {harness.version(package) or ''}".strip(),
                        "tokens": tokens,
                        "window": window or 0,
                        **result,
                        "max_relative_error": worst[name, window],
                        "dtype": str(options.dtype).removeprefix("torch."),
                        "heads": options.heads,
                        "kv_heads": options.kv_heads,
                        "head_dim": options.head_dim,
                        **origin,
                    }
                )
            harness.append_rows(options.output, COLUMNS, [_rounded(row) for row in new])
            rows += new
            print(
                f"{tokens} tokens, window {window}: {', '.join(row['contender'] for row in new) or 'none'}", flush=True
            )
    print(f"\n{harness.table(SHOWN, rows)}\n\n{len(rows)} rows appended to {options.output}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _rounded(row: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
