"""Will it fit, and how fast? Memory by part and tokens a second of a training step, predicted without a GPU.

python -m gptoss_kernels.plan --model gpt-oss-20b --method lora --context 8192 --gpu-memory 80
python -m gptoss_kernels.plan --model gpt-oss-120b --method lora --context 4096 --gpu-memory 80
python -m gptoss_kernels.plan --model gpt-oss-20b --method full --context 8192 --gpu-memory 80 --gpus 8
python -m gptoss_kernels.plan --config configs/sft_lora.yaml --gpu-memory 80 --plot memory.png

Exit code: 0 it fits, 1 it does not, 2 bad arguments. The predicted stack is this package's: its attention, experts,
norms and loss, gradient checkpointing, one document a row; packed shorter ones take the same memory and less time.
"""

import argparse
import csv
import datetime
import json
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

from ..provenance import commit
from .memory import (
    CONTEXT,
    GIB,
    IN_BACKWARD,
    RECOMPUTATION,
    STATES,
    TARGETS,
    Memory,
    Settings,
    offloaded_bytes,
    predict,
)
from .speed import BY_MEMORY, EFFICIENCY, GPUS, NO_ROW, Speed, step_time

PROGRAM = "python -m gptoss_kernels.plan"
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
STEP = 256  # tokens between the contexts that are tried
SHARES = (0.25, 0.5, 0.75, 1.0)  # of moments on the host that are tried
NEEDED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_local_experts", "num_experts_per_tok", "vocab_size", "sliding_window", "max_position_embeddings",
)  # fmt: skip
DEFAULTS = {"attention_bias": True, "tie_word_embeddings": False}
SETTINGS = [field.name for field in fields(Settings)]


def load_config(name: str) -> SimpleNamespace:
    """The shapes of a model.

    Args:
        name: a folder with a config.json, a .json file, or the name of a file in configs/models, with or without an
            organisation before it.

    Raises:
        ValueError: nothing readable, or no gpt-oss, is found under the name.
    """
    path = Path(name)
    places = (path, path / "config.json", MODELS / f"{path.name}.json")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(file.stem for file in MODELS.glob("*.json"))) or "none"
        raise ValueError(f"model: expected a name out of {known}, a folder with config.json or a .json, got {name!r}")
    try:
        keys = DEFAULTS | json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: cannot read {found}: {' '.join(str(error).split())}") from error
    if keys.get("model_type") != "gpt_oss":
        raise ValueError(f"model: expected a gpt_oss configuration, {found} is of {keys.get('model_type')!r}")
    missing = [key for key in NEEDED if not isinstance(keys.get(key), int) or keys[key] < 1]
    if missing:
        raise ValueError(f"model: expected positive integers for {', '.join(missing)} in {found}")
    if keys.get("layer_types") is None:  # Transformers' rule
        keys["layer_types"] = [
            "sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(keys["num_hidden_layers"])
        ]
    if len(keys["layer_types"]) != keys["num_hidden_layers"]:
        raise ValueError(f"model: expected {keys['num_hidden_layers']} layer_types in {found}")
    return SimpleNamespace(**keys)


def settings_of(arguments) -> tuple[str | None, dict]:
    """Model and settings of a training configuration.

    Args:
        arguments: from `finetune.config.parse`.
    """
    from ..finetune.preflight import moments_on_host

    model, run, training = arguments.model, arguments.run, arguments.training
    targets = model.lora_targets
    if targets is None:
        named = [*(model.lora_target_parameters or ())]
        targets = [part for part in ("experts", "router") if any(part in name for name in named)]
        if model.lora_target_modules or not targets:
            targets.insert(0, "attention")
    checkpointed = training.gradient_checkpointing
    return model.model_name_or_path, {
        "method": "lora" if model.use_peft else "full",
        "context": training.max_length,
        "gpus": run.num_processes or 1,
        "batch": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "base_weights": model.base_weights,
        "lora_targets": tuple(targets),
        "lora_r": model.lora_r,
        "recomputation": run.recomputation if checkpointed else "fast",
        "offload": training.activation_offloading,
        "optim": str(getattr(training.optim, "value", training.optim)),
        "on_host": moments_on_host(training),
        "itemsize": 4 if model.dtype == "float32" else 2,
    }


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, SimpleNamespace, Settings]:
    """Options, the model's shapes and the settings; SystemExit with code 2 and a line that names what is wrong."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=lines[0], epilog="\n".join(lines[2:]), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", help="a name of configs/models, a folder with config.json, or a .json file")
    add("--method", choices=["lora", "full"], help="adapters, or all weights; default lora")
    add("--context", type=int, metavar="N", help="tokens of a row; default 8192, or what the model knows")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU, by its name: 16, 24, 48, 80, 141; default 80")
    add("--gpus", type=int, metavar="N", help="full: weights, gradients and states spread over them; lora: copies")
    add("--batch", type=int, metavar="N", help="rows of a forward pass; default 1")
    add("--accumulation", type=int, metavar="N", help="forward passes of a step; default 1")
    add("--base-weights", choices=["mxfp4", "bf16"], help="of the experts under adapters; default mxfp4")
    add("--lora-targets", metavar="PARTS", help=f"with commas between: {', '.join(TARGETS)}; default attention")
    add("--lora-r", type=int, metavar="N", help="rank of the adapters; default 8")
    add("--recomputation", choices=RECOMPUTATION, help="as sft.py's; default auto")
    add("--offload", action="store_true", default=None, help="the layers' inputs wait in the host's memory")
    add("--optim", help="as sft.py's; default adamw_torch_fused, with --on-host adamw_8bit_sr_in_backward")
    add("--on-host", type=float, metavar="SHARE", help="of that optimizer's moments, in the host's memory")
    add("--states", choices=STATES, help="of weights and moments spread over GPUs; default fp32 (bf16: to measure)")
    add("--config", metavar="FILE.yaml", help="a training configuration to start from; the options above win")
    add("--gpu", choices=list(GPUS), help="for the speed; default: by --gpu-memory")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--plot", metavar="FILE.png", help="also draw memory by part against context")
    add("--record", metavar="FILE.csv", help="also append the prediction to a table")
    add("--efficiency", action="store_true", help="also print the shares of the peak behind the speed, and their rows")
    options = parser.parse_args(argv)

    def fail(message: str):
        parser.exit(2, f"{PROGRAM}: error: {message}\n")

    model, given = None, {}
    if options.config:
        # Transformers renamed gradient_checkpointing in 5.23 and warns about TRL's default.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        from ..finetune.config import parse as parse_config

        # Looking needs no GPU, and bf16 would ask for one.
        model, given = settings_of(parse_config(["--use_cpu=true", "--output_dir=.", "--config", options.config]))
        if given["context"] is None and options.context is None:
            fail(f"context: expected a number of tokens, got nothing (max_length in {options.config} is null)")
    given |= {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    if isinstance(given.get("lora_targets"), str):
        given["lora_targets"] = tuple(part.strip() for part in given["lora_targets"].split(","))
    model = options.model or model
    if model is None:
        fail("model: expected a name, a folder or a .json file, got nothing")
    if given.get("on_host"):
        given.setdefault("optim", IN_BACKWARD)
    if given.get("method", Settings.method) == "lora":
        given.setdefault("base_weights", "mxfp4")
    try:
        config = load_config(model)
        given.setdefault("context", min(Settings.context, config.max_position_embeddings))
        settings = Settings(**given)
        if settings.context > config.max_position_embeddings:
            positions = config.max_position_embeddings
            raise ValueError(f"context: {model} knows {positions} positions, got {settings.context}")
    except ValueError as error:
        fail(str(error))
    options.model = Path(model).name
    if options.gpu is None:
        options.gpu = next((name for name in BY_MEMORY if GPUS[name].gib >= settings.gpu_memory), BY_MEMORY[-1])
    return options, config, settings


# ---------------------------------------------------------------------------------------------------------- what fits


def longest_context(config, settings: Settings) -> int:
    """Tokens of the longest row that fits, in steps of STEP up to what the model knows; 0 if none does."""
    # `auto` keeps what is left: it fits where `lean` does.
    settings = settings.but(recomputation="lean") if settings.recomputation == "auto" else settings
    low, high = 0, config.max_position_embeddings // STEP
    while low < high:
        middle = (low + high + 1) // 2
        trial = settings.but(context=middle * STEP)
        low, high = (middle, high) if predict(config, trial).fits(trial) else (low, middle - 1)
    return low * STEP


def switches(config, settings: Settings) -> list[tuple[str, Settings, Memory]]:
    """What to change so that it fits, each on top of those before it, the cheapest first and the last one enough, if
    anything is: (options, settings, memory). Changes that save nothing are left out."""
    changes: list[tuple[str, dict]] = []
    if settings.method == "lora" and settings.base_weights == "bf16":
        changes.append(("--base-weights mxfp4", {"base_weights": "mxfp4"}))
    if settings.recomputation == "fast":
        changes.append(("--recomputation lean", {"recomputation": "lean"}))
    if not settings.offload:
        changes.append(("--offload", {"offload": True}))
    if settings.method == "full" and settings.gpus == 1:
        name = IN_BACKWARD
        once = " --accumulation 1" * (settings.accumulation > 1)
        changes.append((f"--optim {name}{once}", {"optim": name, "accumulation": 1}))
        changes += [(f"--on-host {share:g}", {"on_host": share}) for share in SHARES if share > settings.on_host]
    if settings.method == "lora" and {"attention"} < set(settings.lora_targets):
        changes.append(("--lora-targets attention", {"lora_targets": ("attention",)}))
    tried, names, needed = [], [], predict(config, settings).needed
    for name, change in changes:
        trial = settings.but(**change)
        memory = predict(config, trial)
        if memory.needed >= needed:
            continue
        names = [*(other for other in names if other.split()[0] != name.split()[0]), name]
        settings, needed = trial, memory.needed
        tried.append((" ".join(names), trial, memory))
        if memory.fits(trial):
            return tried
    if (context := longest_context(config, settings)) and context < settings.context:
        trial = settings.but(context=context)
        tried.append((" ".join([*names, f"--context {context}"]), trial, predict(config, trial)))
    elif settings.method == "full":
        sharded = settings.but(optim="adamw_torch_fused", on_host=0.0)
        for trial in (sharded.but(gpus=n) for n in (2, 4, 8, 16, 32, 64) if n > settings.gpus):
            memory = predict(config, trial)
            if memory.fits(trial):
                options = f"--gpus {trial.gpus} --optim {trial.optim}" + " --offload" * trial.offload
                tried.append((options, trial, memory))
                break
    return tried


# -------------------------------------------------------------------------------------------------------------- output


def report(options, config, settings: Settings, memory: Memory, speed: Speed) -> dict:
    """All that is printed, as --json gives it: bytes, ms, tokens a second."""
    fits = memory.fits(settings)
    return {
        "model": options.model,
        "settings": asdict(settings),
        "parts": memory.parts,
        "total": memory.total,
        "reserved": memory.reserved,
        "needed": memory.needed,
        "capacity": settings.capacity,
        "fits": fits,
        "moment": memory.moment,
        "kept": dict(zip(("attention", "experts", "whole"), memory.kept, strict=True)),
        "host": offloaded_bytes(config, settings),
        "longest_context": longest_context(config, settings),
        "switches": [
            {"options": name, "needed": changed.needed, "fits": changed.fits(trial)}
            for name, trial, changed in ([] if fits else switches(config, settings))
        ],
        "speed": {"gpu": options.gpu, **asdict(speed)},
    }


def describe(model: str, settings: Settings) -> str:
    gpus = f"{settings.gpus} GPU{'s' * (settings.gpus > 1)} with {settings.gpu_memory:g} GB"
    rows = f"{settings.context:,} tokens" + (f" x {settings.batch} rows" if settings.batch > 1 else "")
    rows += f", {settings.accumulation} forward passes a step" if settings.accumulation > 1 else ""
    what = "all weights" + (" (sharded)" if settings.sharded else "")
    if settings.method == "lora":
        what = f"LoRA r={settings.lora_r} on {' and '.join(settings.lora_targets)}, experts in {settings.base_weights}"
    inputs = ", layers' inputs in the host's memory" if settings.offload else ""
    optim = settings.optim + f" with {settings.on_host:.0%} of its moments on the host" * (settings.on_host > 0)
    optim += ", bf16 states" * (settings.states == "bf16")
    return f"{model}: {what}; {rows}; {optim}; recomputation {settings.recomputation}{inputs}; {gpus}"


def show(found: dict, settings: Settings, layers: int) -> None:
    def line(name: str, size: int, more: str = "") -> None:
        print(f"  {name:44s}{size / GIB:8.2f} GiB{more}")

    print(describe(found["model"], settings), end="\n\n")
    for name, size in found["parts"].items():
        if size:
            line(name.replace("_", " "), size)
    line("total: torch's max_memory_allocated", found["total"], f"   (peak: {found['moment']})")
    line("max_memory_reserved", found["reserved"])
    line(f"with the CUDA context ({CONTEXT / GIB:g} GiB)", found["needed"], f"   of {found['capacity'] / GIB:.2f} GiB")
    kept = found["kept"]
    print(f"\n  of {layers} layers {kept['attention']} keep attention's results, {kept['experts']} the experts', "
          f"{kept['whole']} all")  # fmt: skip
    if found["host"]:
        print(f"  pinned memory of the host for each GPU: {found['host'] / GIB:.1f} GiB")
    if found["fits"]:
        print(f"\nfits; up to {found['longest_context']:,} tokens do")
    else:
        short = (found["needed"] - found["capacity"]) / GIB
        print(f"\ndoes not fit: {short:.1f} GiB are missing")
        for switch in found["switches"]:
            end = "fits" if switch["fits"] else "does not fit"
            print(f"  with {switch['options']}: needs {switch['needed'] / GIB:.2f} GiB, {end}")
        if not found["switches"] or not found["switches"][-1]["fits"]:
            print("  nothing here makes it fit: take a larger GPU")
        if found["longest_context"]:
            print(f"  as it is, up to {found['longest_context']:,} tokens fit")
        return
    speed = found["speed"]
    parts = ", ".join(f"{name} {ms:,.0f}" for name, ms in speed["parts"].items())
    estimate = ", an estimate: see --efficiency" if speed["estimate"] else ""
    print(f"{speed['tokens_per_second']:,.0f} tokens/s on {settings.gpus} x {speed['gpu']}{estimate}")
    print(f"  {speed['step_ms']:,.0f} ms a step, bound by {speed['bound']}; MFU {speed['mfu']:.2f}")
    print(f"  ms: {parts}")


def show_efficiency() -> None:
    print("\nshare of the peak, and the row of benchmarks/results that it comes from (for other GPUs: an estimate)")
    for name, share in EFFICIENCY.items():
        print(f"  {name:30s} {share.value:5.3f} of {share.of:10s} {share.row}")
    if any(share.row == NO_ROW for share in EFFICIENCY.values()):
        print(f"  shares with {NO_ROW!r} are guesses")


def record(path: Path, found: dict, settings: Settings) -> None:
    """Appends the prediction as a row; the columns that a measurement has too bear the names of mxfp4.csv.

    Raises:
        ValueError: the file has other columns, or cannot be written.
    """
    speed = found["speed"]
    row = {
        "model": found["model"], "method": settings.method, "weights": settings.base_weights,
        "targets": "+".join(settings.lora_targets) if settings.method == "lora" else "all", "rank": settings.lora_r,
        "recomputation": settings.recomputation, "offload": settings.offload,
        "optim": settings.optim + f" on_host={settings.on_host:g}" * (settings.on_host > 0)
        + ", bf16 states" * (settings.states == "bf16"),
        "gpus": settings.gpus, "memory_gib": settings.gpu_memory, "batch": settings.batch,
        "accumulation": settings.accumulation, "tokens": settings.tokens, "gpu": speed["gpu"],
        "tokens_per_second": round(speed["tokens_per_second"]), "step_ms": f"{speed['step_ms']:.5g}",
        "peak_gib": f"{found['total'] / GIB:.5g}", "reserved_gib": f"{found['reserved'] / GIB:.5g}",
        **{f"kept_{name}": layers for name, layers in found["kept"].items()},
        **{f"{name}_gib": f"{size / GIB:.5g}" for name, size in found["parts"].items()}, "moment": found["moment"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit(),
    }  # fmt: skip
    try:
        there = path.is_file() and path.stat().st_size > 0
        if there:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(row):
                raise ValueError(f"record: expected a table with the columns of a prediction, {path} has others")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not there:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise ValueError(f"record: cannot write {path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    options, config, settings = parse(argv)
    memory = predict(config, settings)
    found = report(options, config, settings, memory, step_time(config, settings, memory, options.gpu))
    try:
        if options.record:
            record(Path(options.record), found, settings)
        if options.plot:
            from .plot import draw

            draw(config, settings, options.plot, describe(options.model, settings))
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, settings, config.num_hidden_layers)
        if options.efficiency:
            show_efficiency()
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
