"""Full finetuning on the GPUs of a node: speed and memory under FSDP2 and ZeRO-3, through sft.py's own trainer.

    python -m benchmarks.node --gpus 8                   rows of node.csv, for each engine and stack
    python -m benchmarks.node --gpus 2 --states bf16     where fp32 weights and moments do not fit
    python -m benchmarks.node losses --gpus 2            the small model on one GPU and on all: node_losses.csv
    python -m benchmarks.node plot                       node.png from node.csv

gpt-oss-20b with random weights, configs/sft_full.yaml, one row of one document a GPU, gradient checkpointing that keeps
nothing (lean). Stacks: "ours" is this package's attention, experts, norms, rotary embedding; "stock" is Transformers'
eager attention and grouped_mm with the same loss. One `accelerate launch` for an engine and a stack trains on all
lengths in turn, the shortest first; the first step of each is not counted, the median of the others is. A step is timed
by the first process, GPU synchronised, from the batch being there to the optimizer's end; memory is that of the process
with most, reset at each length. A length that runs out of memory gets a row that says so and ends its launch.

States: fp32 is what one trains with, 16 bytes a parameter: FSDP2 keeps fp32 weights, DeepSpeed fp32 copies of bf16
ones, both fp32 moments. bf16 keeps weights, gradients and moments in bf16, 8 bytes a parameter. That is a measurement's
setting and no way to train: updates smaller than half a unit in the last place are lost by rounding to nearest.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from benchmarks import harness
from benchmarks.readme import NODE, NODE_LABELS
from gptoss_kernels.provenance import commit

ROOT = Path(__file__).parents[1]
LOSSES = NODE.with_name("node_losses.csv")
ENGINES = ("fsdp2", "zero3")
STACKS = {
    "ours": {"packing": "true"},
    "stock": {
        "attn_implementation": "eager", "experts_implementation": "grouped_mm", "fused_layers": "false",
        "packing": "false",
    },
}  # fmt: skip
SMALL = {
    "model_name_or_path": "data/tiny-gpt-oss", "dtype": "float32", "bf16": "false", "learning_rate": 1e-3,
    "warmup_steps": 0, "max_length": 256, "packing": "true",
}  # fmt: skip
GRACE = 10  # seconds that a launcher has to end its processes
MEASURED, NO_MEMORY = "measured", "out of memory"
_PACKAGES = ("accelerate", "deepspeed", "trl", "peft")
_ORIGIN = (*_PACKAGES, "gpu", "torch", "triton", "transformers", "date", "commit")
COLUMNS = (
    *("engine", "stack", "states", "model", "gpus", "tokens", "steps", "outcome", "tokens_per_second_per_gpu"),
    *("step_ms", "step_min_ms", "step_max_ms", "peak_gib", "reserved_gib", "loss", *_ORIGIN),
)
LOSS_COLUMNS = (
    *("engine", "model", "gpus", "steps", "first_loss", "last_loss", "max_relative_difference"),
    *("max_relative_difference_grad_norm", *_ORIGIN),
)
SHOWN = (*COLUMNS[:3], "gpus", *COLUMNS[5:10], *COLUMNS[12:15])


# ------------------------------------------------------------------------------------------------------- one process


def origin(device: torch.device) -> dict[str, str]:
    return {name: harness.version(name) or "" for name in _PACKAGES} | harness.provenance(device)


def documents(lengths: list[int], vocabulary: int):
    """Rows of one document each, of these lengths, with random tokens, all trained but the first."""
    from gptoss_kernels.finetune.packing import Document, Report, build

    draw = np.random.default_rng(0)
    made = [
        Document(
            draw.integers(0, vocabulary, length, dtype=np.int32),
            (np.arange(length) > 0).astype(np.float32),
            np.zeros(length, dtype=np.int8),
        )
        for length in lengths
    ]
    return build(made, False, Report(split="train"))


class Measure(TrainerCallback):
    """Times each step, and when all of a length are done gives a row of what they took to `write`."""

    def __init__(self, lengths: list[int], steps: int, write):
        self.lengths, self.steps, self.write = lengths, steps, write
        self.tokens = lengths[0]

    def on_step_begin(self, args, state, control, **kwargs):
        index, step = divmod(state.global_step, self.steps)
        self.gpu = args.device.type == "cuda"
        if step == 0:
            self.tokens, self.seconds = self.lengths[index], []
            if self.gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or len(self.seconds) < self.steps:
            return
        peaks = torch.tensor(
            [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if self.gpu else [0, 0],
            dtype=torch.float64,
            device=args.device,
        )
        torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
        peak, reserved = (x / 2**30 for x in peaks.tolist()) if self.gpu else (None, None)
        counted = [1e3 * x for x in self.seconds[1:]]
        step = statistics.median(counted)
        if args.process_index == 0:
            self.write(
                tokens=self.tokens, outcome=MEASURED, tokens_per_second_per_gpu=round(1e3 * self.tokens / step, 1),
                step_ms=step, step_min_ms=min(counted), step_max_ms=max(counted), peak_gib=peak, reserved_gib=reserved,
                loss=logs["loss"],
            )  # fmt: skip

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def train(job: dict, callbacks, lengths: list[int]):
    """The trainer of a job, after training on rows of these lengths in this order."""
    from gptoss_kernels.finetune import train
    from gptoss_kernels.finetune.config import parse
    from gptoss_kernels.finetune.data import load_tokenizer
    from gptoss_kernels.finetune.engine import Sharding, check_engine

    torch.backends.cuda.matmul.allow_tf32 = False
    arguments = parse(job["argv"])
    model_args, training = arguments.model, arguments.training
    check_engine(training)
    if training.world_size != arguments.run.num_processes:
        sys.exit(f"num_processes: expected {arguments.run.num_processes} processes, {training.world_size} run")
    if job["states"] == "bf16" and training.deepspeed_plugin is not None:
        settings = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        training.deepspeed_plugin.deepspeed_config["bf16"] = settings
    tokenizer = load_tokenizer(
        model_args.tokenizer_name or model_args.model_name_or_path,
        conversation_date=arguments.data.conversation_date,
    )
    torch.manual_seed(training.seed)
    model = train.make_model(arguments, tokenizer)
    rows = documents(lengths, model.config.vocab_size)
    trainer = train.make_trainer(arguments, model, tokenizer, rows, None, (*callbacks, Sharding()))
    trainer.train()
    return trainer


def measure(job: dict) -> None:
    """Appends a row for each length to job["output"]; out of memory, the first process to notice writes that."""
    output = Path(job["output"])

    def write(**found):
        base = dict.fromkeys(COLUMNS) | job["row"] | origin(device)
        row = base | {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in found.items()}
        harness.append_rows(output, COLUMNS, [row])
        print(harness.table(SHOWN, [row]), flush=True)

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    callback = Measure(job["lengths"], job["steps"], write)
    each = job["steps"] * job["row"]["gpus"]
    try:
        train(job, (callback,), [length for length in job["lengths"] for _ in range(each)])
    except Exception as error:  # NCCL's is no OutOfMemoryError
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        with contextlib.suppress(FileExistsError):
            Path(f"{job['file']}.out_of_memory").touch(exist_ok=False)
            write(tokens=callback.tokens, outcome=NO_MEMORY)
        print(f"process {rank}: {str(error).splitlines()[0][:300]}", flush=True)
        os._exit(1)  # the others wait for this one, until the launcher ends them


def losses(job: dict) -> None:
    """Writes loss and gradient norm of each step to job["output"]."""
    trainer = train(job, (), job["lengths"])
    if trainer.args.process_index == 0:
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(job["output"]).write_text(json.dumps([(entry["loss"], entry["grad_norm"]) for entry in entries]))


# -------------------------------------------------------------------------------------------------------- launches


def stop(process: subprocess.Popen) -> None:
    """Ends a launcher and all that it has started: asked first, then killed."""
    family = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += family[0].children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(alive, timeout=GRACE)  # their memory is free then


def launch(command: list[str], seconds: float, **variables: str) -> int | None:
    """The exit code of a command in the repository's root, or None where it was ended after so many seconds."""
    environment = {"NCCL_NVLS_ENABLE": "0", "GPTOSS_COMMIT": commit(), **os.environ, **variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            stop(process)


def launcher(engine: str, processes: int, mixed_precision: str) -> list[str]:
    """The start of a command that runs a module under an engine; "ddp" is for processes on a CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    if engine == "ddp":
        start = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    else:
        start = [
            "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / f"{engine}.yaml"), "--num_processes",
            str(processes), "--mixed_precision", mixed_precision, "--main_process_port", port,
        ]  # fmt: skip
    return [sys.executable, "-m", *start, "--module"]


def command_line(folder: str, **keys) -> list[str]:
    """Of sft.py, with what all runs here have in common."""
    common = {
        "config": ROOT / "configs" / "sft_full.yaml", "tokenizer_name": ROOT / "data" / "tokenizer",
        "output_dir": folder, "train_sampling_strategy": "sequential", "recomputation": "lean", "save_strategy": "no",
        "logging_steps": 1, "report_to": "none", "disable_tqdm": "true",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in (common | keys).items()]


def job_file(folder: str, name: str, **job) -> str:
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps(job | {"file": str(path)}))
    return str(path)


def run_measurements(options) -> int:
    dry, before, failed = options.dry_run, len(harness.read_rows(options.output)), []
    for stack in options.stacks:
        for engine in ["ddp"] if dry else options.engines:
            with tempfile.TemporaryDirectory() as folder:
                bf16_alone = options.states == "bf16" and engine == "fsdp2"  # FSDP2 trains fp32 ones otherwise
                keys = {
                    "model_name_or_path": options.model, "model_init": "random", "num_processes": options.gpus,
                    "max_length": max(options.lengths), "max_steps": options.steps * len(options.lengths),
                    "bf16": str(not (dry or bf16_alone)).lower(), **STACKS[stack],
                }  # fmt: skip
                if dry:
                    keys |= {"use_cpu": "true", "dtype": "float32"}
                row = {
                    "engine": engine, "stack": stack, "states": options.states, "model": options.model,
                    "gpus": options.gpus, "steps": options.steps - 1,
                }  # fmt: skip
                path = job_file(
                    folder, "job", kind="measure", argv=command_line(folder, **keys), lengths=options.lengths, row=row,
                    steps=options.steps, states=options.states, output=str(options.output.resolve()),
                )  # fmt: skip
                start = launcher(engine, options.gpus, "no" if bf16_alone else "bf16")
                code = launch([*start, "benchmarks.node", "worker", path], options.seconds)
            found = harness.read_rows(options.output)[before:]
            mine = [r for r in found if (r["engine"], r["stack"]) == (engine, stack)]
            if code is None or not mine or (code and mine[-1]["outcome"] != NO_MEMORY):
                what = f"ended after {options.seconds:g} s" if code is None else f"exit code {code}"
                failed.append(f"{engine}, {stack}: {what}, {len(mine)} of {len(options.lengths)} lengths")
    rows = harness.read_rows(options.output)[before:]
    if rows:
        print(harness.table(SHOWN, rows))
    print("\n".join([f"{len(rows)} rows appended to {options.output}", *failed]))
    return 1 if failed else 0


def run_losses(options) -> int:
    """The small model in fp32, the same rows in each step, on one GPU with accumulation and under each engine."""
    draw = random.Random(0)
    lengths = [draw.randrange(64, 256) for _ in range(options.steps * options.gpus)]  # not even, as a step's weights
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("one", *options.engines):
            processes = 1 if engine == "one" else options.gpus
            keys = SMALL | {
                "num_processes": processes, "gradient_accumulation_steps": options.gpus // processes,
                "max_steps": options.steps,
            }  # fmt: skip
            output = Path(folder) / f"{engine}.losses"
            argv = command_line(f"{folder}/{engine}", **keys)
            path = job_file(
                folder, engine, kind="losses", argv=argv, lengths=lengths, states="fp32", output=str(output)
            )
            start = [sys.executable, "-m"] if engine == "one" else launcher(engine, processes, "no")
            variables = {"CUDA_VISIBLE_DEVICES": "0"} if engine == "one" else {}
            code = launch([*start, "benchmarks.node", "worker", path], options.seconds, **variables)
            if output.is_file():
                found[engine] = json.loads(output.read_text())
            else:
                print(f"{engine}: " + (f"ended after {options.seconds:g} s" if code is None else f"exit code {code}"))
    if "one" not in found:
        return 1
    device = torch.device("cuda", 0)
    rows = [
        {
            "engine": engine, "model": SMALL["model_name_or_path"], "gpus": options.gpus, "steps": options.steps,
            "first_loss": values[0][0], "last_loss": values[-1][0], **differences(values, found["one"]),
            **origin(device),
        }
        for engine, values in found.items() if engine != "one"
    ]  # fmt: skip
    if rows:
        harness.append_rows(options.output, LOSS_COLUMNS, rows)
        print("losses on one GPU: " + ", ".join(f"{loss:.6f}" for loss, _ in found["one"]))
        for row in rows:
            print(", ".join(f"{key} {row[key]}" for key in LOSS_COLUMNS[:8]))
    print(f"{len(rows)} rows appended to {options.output}")
    return 0 if len(found) == 1 + len(options.engines) else 1


def differences(found: list, expected: list) -> dict[str, float]:
    """Largest relative difference over the steps of losses and of gradient norms.

    Raises:
        ValueError: the numbers of steps differ.
    """
    pairs = list(zip(found, expected, strict=True))
    largest = [max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in range(2)]
    names = ("max_relative_difference", "max_relative_difference_grad_norm")
    return {name: float(f"{x:.3g}") for name, x in zip(names, largest, strict=True)}


# ---------------------------------------------------------------------------------------------------------- figure


def draw(rows: list[dict[str, str]]):
    """The figure: tokens a second and GPU against context, a curve an engine and stack, of the last row's GPUs.

    Raises:
        ValueError: there is no measured row.
    """
    import matplotlib.pyplot as plt

    from gptoss_kernels.course import plots

    rows = [row for row in rows if row["outcome"] == MEASURED]
    if not rows:
        raise ValueError("rows: expected at least one that was measured, got none")
    setting = ("gpu", "gpus", "states", "model")
    last = rows[-1]
    newest = {(r["stack"], r["engine"], int(r["tokens"])): r for r in rows if all(r[k] == last[k] for k in setting)}
    plots.style()
    figure, ax = plt.subplots(figsize=(7.5, 4.6))
    for (place, label), colour, marker in zip(NODE_LABELS.items(), plots.OKABE_ITO, "osD^", strict=False):
        points = sorted(
            (tokens, float(r["tokens_per_second_per_gpu"]))
            for (stack, engine, tokens), r in newest.items()
            if (stack, engine) == place
        )
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="-", label=label)
    ticks = sorted({tokens for *_, tokens in newest})
    ax.set(xscale="log", xlabel="context, tokens", ylabel="tokens a second and GPU", ylim=(0, None))
    ax.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        f"All weights of {last['model']}, {last['gpus']} × {last['gpu']}, {last['states']} states, {last['date']}"
    )
    return figure


# --------------------------------------------------------------------------------------------------------- command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.node", description=__doc__.splitlines()[0])
    names = lambda text: [part.strip() for part in text.split(",")]  # noqa: E731
    add = parser.add_argument
    add("action", nargs="?", default="measure", choices=["measure", "losses", "plot"])
    add("--engines", type=names, default=list(ENGINES), help="with commas between: fsdp2, zero3")
    add("--stacks", type=names, default=list(STACKS), help="with commas between: ours, stock")
    add("--lengths", type=lambda text: sorted(map(int, text.split(","))), default=[4096, 8192, 16384])
    add("--gpus", type=int, default=torch.cuda.device_count(), help="processes, one a GPU; default: all")
    add("--steps", type=int, default=4, help="of each length, one of which is not counted")
    add("--states", choices=["fp32", "bf16"], default="fp32", help="of weights, gradients and moments")
    add("--seconds", type=float, default=600, help="after which a launch is ended")
    add("--model", default="gpt-oss-20b", help="a name of configs/models")
    add("--output", type=Path, help="a table of rows; default: in benchmarks/results")
    add("--dry-run", action="store_true", help="on the CPU, unsharded (Accelerate shards on GPUs alone), no result")
    options = parser.parse_args(argv)
    for name, known in (("engines", ENGINES), ("stacks", STACKS)):
        if set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(getattr(options, name))}")
    if options.steps < 2:
        parser.error(f"--steps: expected at least 2, got {options.steps}")
    if options.dry_run and options.output is None:
        parser.error("--output: expected a file for a dry run's rows, which are no results, got nothing")
    if options.action != "plot" and options.gpus < 2:
        parser.error(f"--gpus: expected at least 2, got {options.gpus}")
    options.output = options.output or (LOSSES if options.action == "losses" else NODE)
    return options


def main(argv: list[str]) -> int:
    if argv[:1] == ["worker"]:
        job = json.loads(Path(argv[1]).read_text())
        {"measure": measure, "losses": losses}[job["kind"]](job)
        return 0
    options = parse(argv)
    if options.action == "plot":
        from gptoss_kernels.course import plots

        plots.save(draw(harness.read_rows(options.output)), options.output.with_suffix(".png"))
        return 0
    if not options.dry_run and torch.cuda.device_count() < options.gpus:
        sys.exit(f"benchmarks/node.py: expected {options.gpus} CUDA GPUs, got {torch.cuda.device_count()}")
    return run_losses(options) if options.action == "losses" else run_measurements(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
