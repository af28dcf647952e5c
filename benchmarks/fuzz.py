"""Random calls of the kernels against their definitions in fp64, in many processes: python -m benchmarks.fuzz

Three of four calls are attention's, the others are the experts'. A call that is not within bounds is printed with its
seed, and the exit code is 1; `--first SEED --cases 1` repeats it. A row of totals goes to benchmarks/results/fuzz.csv.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from random import Random

import torch

from benchmarks import harness

COLUMNS = [
    "cases", "attention", "experts", "first_seed", "longest", "failures", "worst_share", "seconds", "gpu", "torch",
    "triton", "transformers", "date", "commit",
]  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--cases", type=int, default=20_000, help="default: %(default)s")
    add("--first", type=int, default=0, help="seed of the first case (default: %(default)s)")
    add(
        "--longest",
        type=int,
        default=1200,
        help="tokens; Hopper has kernels of its own from 1,024 (default: %(default)s)",
    )
    add("--processes", type=int, default=12, help="default: %(default)s")
    add("--seconds", type=float, default=540, help="start no case after that time (default: %(default)s)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "fuzz.csv", help="the row goes here")
    return parser.parse_args(arguments)


def draw(seed: int, longest: int):
    """The call of a seed, of the experts for every fourth."""
    from gptoss_kernels import fuzz

    gpu = torch.cuda.is_available()
    if seed % 4 == 3:
        dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * gpu
        return fuzz.draw_experts(Random(seed), longest, dtypes)
    return fuzz.draw_attention(Random(seed), longest, fuzz.GPU_SHAPES if gpu else fuzz.INTERPRETER_SHAPES)


def kernels(call) -> tuple:
    """What tells which kernels a call needs, roughly: calls that are alike share their compilation."""
    case = call.case
    if hasattr(case, "experts"):
        return "experts", case.dtype, case.hidden, case.intermediate
    return case.head_dim, case.dtype, case.q_heads, case.sinks, bool(case.window), bool(case.documents)


def chunks(seeds: range, longest: int) -> list[list[int]]:
    """Seeds in groups, each for one process: no group is large, and few have their kernels in common with others."""
    alike = defaultdict(list)
    for seed in seeds:
        alike[kernels(draw(seed, longest))].append(seed)
    return [group[i : i + 200] for group in alike.values() for i in range(0, len(group), 200)]


def run(seeds: list[int], longest: int, until: float) -> tuple[Counter, float, list[str]]:
    """(cases done by kind, largest error as a share of what is allowed, failures) of some seeds."""
    from gptoss_kernels import fuzz

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.set_num_threads(1)
    done, worst, failures = Counter(), 0.0, []
    for seed in seeds:
        if time.time() > until:
            break
        kind = "experts" if seed % 4 == 3 else "attention"
        check = fuzz.check_experts if kind == "experts" else fuzz.check_attention
        try:
            share = check(draw(seed, longest), device)
            worst = max(worst, share)
        except Exception as error:  # whatever a kernel or its check raises is a finding
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
        done[kind] += 1
    if gpu:
        torch.cuda.empty_cache()  # other processes share the GPU
    return done, worst, failures


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start, until = time.perf_counter(), time.time() + options.seconds
    groups = chunks(range(options.first, options.first + options.cases), options.longest)
    done, worst, failures = Counter(), 0.0, []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run, group, options.longest, until) for group in groups]
        for number, job in enumerate(as_completed(jobs)):
            counts, share, bad = job.result()
            done += counts
            worst = max(worst, share)
            failures += bad
            print("\n".join(bad), end="\n" if bad else "", flush=True)
            if number % 10 == 9:
                print(f"{done.total():,} cases, {len(failures)} failures", file=sys.stderr, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {
        "cases": done.total(), "attention": done["attention"], "experts": done["experts"], "first_seed": options.first,
        "longest": options.longest, "failures": len(failures), "worst_share": float(f"{worst:.3g}"),
        "seconds": round(time.perf_counter() - start), **harness.provenance(device),
    }  # fmt: skip
    harness.append_rows(options.output, COLUMNS, [row])
    print(harness.table(COLUMNS[:9], [row]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
