"""Attention at gpt-oss's shapes: forward and backward time and peak memory, ours beside the other implementations.

    python benchmarks/attention.py --contenders ours,flex,cudnn,fa4,fla,eager --lengths 4096,8192,16384,32768
    python benchmarks/attention.py --documents 1,4,16,64,16u      # one length packed as so many documents as well

One batch row, N(0, 1) inputs stored as (batch, tokens, heads, head_dim), as a model's projections leave them. Times are
GPU times of single calls; the backward pass is forward + backward less forward. Peak memory is what one forward and
backward pass allocates on top of its inputs: outputs and gradients included. Ours is timed only if it agrees with an
fp64 reference, packed as it will be; for the others the same error is measured and stored. Rows are appended to a CSV
file as they come; attention_figures.py turns them into rates and ratios.
"""

import argparse
import functools
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import attention_figures as figures
from benchmarks import harness
from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_reference

# (q, k, v, sinks, window, lengths) -> out, all (1, heads, tokens, head_dim); sinks (heads,); window an int or None;
# lengths of the documents that the tokens are packed as, one or more.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int | None, tuple[int, ...]], torch.Tensor]

NAMES = ("out", "dq", "dk", "dv", "dsinks")
# Largest relative error, ‖x − reference‖ / ‖reference‖, with which ours may be timed.
LIMITS = {
    torch.bfloat16: {"dsinks": 6e-3} | dict.fromkeys(NAMES[:4], 4e-3),
    torch.float16: {"dsinks": 6e-3} | dict.fromkeys(NAMES[:4], 4e-3),
    torch.float32: dict.fromkeys(NAMES, 1e-5),
}
COLUMNS = (
    *("contender", "package", "tokens", "window", "documents", "forward_ms", "forward_p20_ms", "forward_p80_ms"),
    *("backward_ms", "total_ms", "total_p20_ms", "total_p80_ms", "peak_extra_gib", "max_relative_error"),
    *("dtype", "heads", "kv_heads", "head_dim", "gpu", "torch", "triton", "transformers", "date", "commit"),
)
RATES = tuple(f"{part}_{unit}" for unit in ("tflops", "gbs") for part in figures.PARTS)
SHOWN = (
    *("contender", "tokens", "window", "documents", "forward_ms", "backward_ms", "total_ms", "predicted_ms"),
    *(*RATES, "peak_extra_gib"),
)


@dataclass(frozen=True)
class Contender:
    """load() -> Attend, raising where it cannot run; package: its distribution; has it sinks, windows, packing?"""

    load: Callable[[torch.device], Attend]
    package: str
    sinks: bool = True
    windows: bool = True
    packing: bool = True
    max_tokens: int | None = None


class Unavailable(Exception):
    """Why a contender cannot run here."""


@functools.cache
def cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """(documents + 1,) int32; None for one document."""
    if len(lengths) == 1:
        return None
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@functools.cache
def document_of_token(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(tokens,) int64."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def load_ours(device: torch.device) -> Attend:
    backend = "triton" if device.type == "cuda" else "auto"

    def attend(q, k, v, sinks, window, lengths):
        ends = cu_seqlens(lengths, device)
        return flash_attention(q, k, v, sinks, sliding_window=window, cu_seqlens=ends, backend=backend)

    return attend


def load_flex(device: torch.device) -> Attend:
    _need_cuda(device)
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # one compilation a length and window, one more if packed

    @functools.cache
    def block_mask(lengths: tuple[int, ...], window: int | None):
        tokens, packed, document = sum(lengths), len(lengths) > 1, document_of_token(lengths, device)

        def allowed(batch, head, query, key):
            seen = query >= key if window is None else (query >= key) & (query - key < window)
            return seen & (document[query] == document[key]) if packed else seen

        return create_block_mask(allowed, None, None, tokens, tokens, device=device)

    @functools.partial(torch.compile, dynamic=False)
    def with_sinks(q, k, v, sinks, mask):
        out, aux = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        keep = torch.sigmoid(aux.lse - sinks.float()[None, :, None])
        return (out.float() * keep[..., None]).to(q.dtype)

    return lambda q, k, v, sinks, window, lengths: with_sinks(q, k, v, sinks, block_mask(lengths, window))


def load_cudnn(device: torch.device) -> Attend:
    _need_cuda(device)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, sinks, window, lengths):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def load_fa4(device: torch.device) -> Attend:
    _need_cuda(device)
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    def attend(q, k, v, sinks, window, lengths):
        reach = (None, None) if window is None else (window - 1, 0)
        how = {"causal": True, "window_size": reach, "learnable_sink": sinks}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ends = cu_seqlens(lengths, device)
        if ends is None:
            out = flash_attn_func(q, k, v, **how)
        else:  # packed tensors have no batch dimension
            how |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ends)
            how |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(lengths))
            out = flash_attn_varlen_func(q[0], k[0], v[0], **how)
        return (out[0] if isinstance(out, tuple) else out).view(q.shape).transpose(1, 2)

    return attend


def load_fla(device: torch.device) -> Attend:
    _need_cuda(device)
    from fla.ops.attn.parallel import parallel_attn

    def attend(q, k, v, sinks, window, lengths):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ends = cu_seqlens(lengths, device)
        return parallel_attn(q, k, v, window_size=window, sink_bias=sinks, cu_seqlens=ends).transpose(1, 2)

    return attend


def load_eager(device: torch.device) -> Attend:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    @functools.lru_cache(maxsize=1)
    def mask(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype) -> torch.Tensor:
        tokens, document = sum(lengths), document_of_token(lengths, device)
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if window is not None:
            allowed = allowed.triu(1 - window)
        if len(lengths) > 1:
            allowed &= document[:, None] == document
        bias = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device)
        return bias.masked_fill_(~allowed, torch.finfo(dtype).min)

    def attend(q, k, v, sinks, window, lengths):
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], sinks=sinks, training=True)
        out, _ = eager_attention_forward(module, q, k, v, mask(lengths, window, q.dtype), scaling=q.shape[-1] ** -0.5)
        return out.transpose(1, 2)

    return attend


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"needs a CUDA GPU, --device is {device}")


CONTENDERS = {
    "ours": Contender(load_ours, "gptoss-kernels"),
    "flex": Contender(load_flex, "torch"),
    "cudnn": Contender(load_cudnn, "torch", sinks=False, windows=False, packing=False),
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


@dataclass(frozen=True)
class Case:
    """One layer on one input: tokens, window (None: a full layer), and documents as --documents names them."""

    tokens: int
    window: int | None
    documents: str = "1"

    @property
    def lengths(self) -> tuple[int, ...]:
        return figures.document_lengths(self.tokens, self.documents)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, window {self.window}, documents {self.documents}"

    def lacking(self, contender: Contender) -> str | None:
        """Why a contender cannot have this case; None: it can."""
        if self.window is not None and not contender.windows:
            return "it has no windows"
        if self.documents != "1" and not contender.packing:
            return "it has no packing"
        if self.tokens > (contender.max_tokens or self.tokens):
            return f"its limit is {contender.max_tokens} tokens"
        return None


def run(contender: Contender, attend: Attend, inputs: tuple[torch.Tensor, ...], case: Case):
    """out and the gradients of q, k, v and, where the contender has sinks, sinks."""
    *leaves, grad = inputs
    out = attend(*leaves, case.window, case.lengths)
    return out, *torch.autograd.grad(out, leaves if contender.sinks else leaves[:3], grad)


def relative_errors(
    contender: Contender, attend: Attend, inputs: tuple[torch.Tensor, ...], case: Case
) -> dict[str, float]:
    """Relative error of out, dq, dk, dv (and dsinks) against fp64, one kv head's group at a time to bound memory."""
    q, k, v, sinks, grad = inputs
    group = q.shape[1] // k.shape[1]
    got = run(contender, attend, inputs, case)
    errors, sizes = [0.0] * len(got), [0.0] * len(got)
    for head in range(k.shape[1]):
        heads, kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        parts = (q[:, heads], k[:, kv], v[:, kv], sinks[heads])
        exact = [x.detach().double().requires_grad_() for x in parts]
        used = exact if contender.sinks else [*exact[:3], None]
        ends = cu_seqlens(case.lengths, q.device)
        out, _ = attention_reference(*used, sliding_window=case.window, cu_seqlens=ends)
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


def check_contenders(
    loaded: dict[str, Attend], options: argparse.Namespace
) -> dict[tuple[str, int | None, str], float]:
    """(name, window, documents) -> largest relative error at --check-tokens; without those that fail to run.

    Raises:
        SystemExit: ours is over its limit.
    """
    worst = {}
    inputs = make_inputs(options.check_tokens, options, seed=0)
    for name, attend in loaded.items():
        contender = CONTENDERS[name]
        for documents in options.documents:
            for window in options.windows:
                case = Case(options.check_tokens, window, documents)
                if why := case.lacking(contender):
                    print(f"{name}: {case}: left out, {why}")
                    continue
                start = time.perf_counter()
                try:
                    errors = relative_errors(contender, attend, inputs, case)
                except Exception as error:  # a contender that does not run here must not end the others' measurement
                    if name == "ours":
                        raise
                    print(f"{name}: {case}: skipped, {_first_line(error)}")
                    continue
                shown = ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
                print(f"{name}: {case}: relative error {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
                if name == "ours" and (over := over_limit(errors, options.dtype)):
                    raise SystemExit(f"ours is wrong and is not timed: {case}: {', '.join(over)}")
                worst[name, window, documents] = max(errors.values())
    return worst


def measure(loaded: dict[str, Attend], case: Case, options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """name -> forward, backward, total times and peak memory of every contender that takes this case."""
    sets = [make_inputs(case.tokens, options, seed) for seed in range(3)]
    calls, peaks = {}, {}
    for name, attend in loaded.items():
        contender = CONTENDERS[name]
        if case.lacking(contender):
            continue

        def forward(n, attend=attend):
            attend(*sets[n % len(sets)][:4], case.window, case.lengths)

        def total(n, contender=contender, attend=attend):
            run(contender, attend, sets[n % len(sets)], case)

        try:
            total(0)
            peaks[name] = harness.peak_extra_gib(functools.partial(total, 1), options.device)
        except Exception as error:  # as in check_contenders; running out of memory is what eager does
            if name == "ours":
                raise
            print(f"{name}: {case}: no row, {_first_line(error)}")
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


def report(rows: list[dict]) -> str:
    """What a run says at its end: times and rates, and how the others' times compare with ours."""
    shown = []
    for row in rows:
        rates = [rate(row, part) for rate in (figures.tflops, figures.gbs) for part in figures.PARTS]
        predicted = None if row["documents"] == "1" else figures.predicted_ms(row, rows)
        shown.append(row | dict(zip(RATES, map(round, rates), strict=True)) | {"predicted_ms": predicted})
    lines = [
        "tflops: of visible pairs; gbs: of the least bytes; predicted_ms: a packed row's total if it followed the "
        "visible pairs (full layers: the sum of squares)",
        harness.table(SHOWN, shown),
    ]
    times = figures.layer_times(figures.comparable(rows))
    for (tokens, layer), contenders in times.items():
        if ours := contenders.get("ours"):
            others = [f"{time / ours:.2f}x {name}" for name, time in contenders.items() if name != "ours"]
            lines.append(f"{tokens} tokens, {layer}, forward + backward: ours {ours:.3f} ms; {', '.join(others)}")
    for layer, found in figures.ratios(times).items():
        span = ", ".join(f"{least:.2f}-{most:.2f}x {name}" for name, (least, most) in found.items())
        lines.append(f"{layer}, all lengths: {span}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message that names what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--contenders", default=",".join(CONTENDERS), help="of " + ", ".join(CONTENDERS))
    add("--lengths", default="4096,8192,16384,32768", help="tokens")
    add("--windows", default="0,128", help="keys kept; 0 is a full layer")
    add("--documents", default="1", help="documents that the tokens are packed as: 4, or 4u for unequal ones")
    add("--packed-tokens", type=int, default=16384, help="the one of --lengths that is measured packed as well")
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
    options.documents = options.documents.split(",")
    for documents in options.documents:
        if not re.fullmatch(r"[1-9]\d*|[1-9]\d*u", documents) or documents == "1u":
            parser.error(f"--documents: expected integers >= 1, or >= 2 with a u after them, got {documents!r}")
        if int(documents.removesuffix("u")) > options.check_tokens:
            parser.error(f"--documents: expected at most --check-tokens {options.check_tokens}, got {documents!r}")
    if options.documents != ["1"] and options.packed_tokens not in options.lengths:
        parser.error(f"--packed-tokens: expected one of --lengths {options.lengths}, got {options.packed_tokens}")
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
    for case in cases(options):
        gc.collect()
        start, new = time.perf_counter(), []
        checked = {name: loaded[name] for name in loaded if (name, case.window, case.documents) in worst}
        for name, result in measure(checked, case, options).items():
            package = CONTENDERS[name].package
            new.append(
                {
                    "contender": name,
                    "package": f"{package} {harness.version(package) or ''}".strip(),
                    "tokens": case.tokens,
                    "window": case.window or 0,
                    "documents": case.documents,
                    **result,
                    "max_relative_error": worst[name, case.window, case.documents],
                    "dtype": str(options.dtype).removeprefix("torch."),
                    "heads": options.heads,
                    "kv_heads": options.kv_heads,
                    "head_dim": options.head_dim,
                    **origin,
                }
            )
        harness.append_rows(options.output, COLUMNS, [_rounded(row) for row in new])
        rows += new
        names, seconds = ", ".join(row["contender"] for row in new) or "none", time.perf_counter() - start
        print(f"{case}: {names} ({seconds:.0f} s)", flush=True)
    print(f"\n{report(rows)}\n\n{len(rows)} rows appended to {options.output}")


def cases(options: argparse.Namespace) -> list[Case]:
    """Every length as one document if --documents has 1, --packed-tokens as the others too; each with every window."""
    return [
        Case(tokens, window, documents)
        for tokens in options.lengths
        for documents in options.documents
        if documents == "1" or tokens == options.packed_tokens
        for window in options.windows
    ]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _rounded(row: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
