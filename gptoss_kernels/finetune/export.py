"""What was finetuned, as a checkpoint that Transformers and vLLM load: adapters merged, experts in bf16 or MXFP4.

    python -m gptoss_kernels.finetune.export ADAPTER_OR_CHECKPOINT --to bf16|mxfp4 --out DIR

Adapters on attention, router and experts are merged in fp32, and the sum is rounded once. What has no adapter and is
stored as wanted already is copied bit for bit. Experts that have to become MXFP4 get the scale of the OCP standard,
2 ** (floor(log2 of the greatest of 32 weights) - 2), or twice that where the sum of squared errors is smaller, and the
nearest of its numbers, ties to the even code; what lies above 6 times the scale becomes 6 times the scale. An adapter
on experts changes most weights by less than half a step of MXFP4, and rounding takes much of it back: the comparison
says how much that matters, and --to bf16 keeps it.

Tensors go from file to file, one expert at a time. DIR appears when it is complete; one that holds something is
refused. Then the exported model is compared with the trained one on held-out text: KL divergence and how often the
likeliest token is the same.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors import safe_open
from tqdm.auto import tqdm

from ..mxfp4.read import weight_files
from ..mxfp4.reference import BYTES, GROUP, dequantize, quantize
from ..mxfp4.write import Group, write_checkpoint
from . import saving
from .errors import SetupError
from .model import load_config, stored_shapes

FORMATS = ("bf16", "mxfp4")
PARTS = {"self_attn": "attention", "experts": "experts", "router": "router"}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
UNCONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
ROUNDING = (
    "scale 2 ** (floor(log2 of the greatest of 32 weights) - 2) as in the OCP standard, or twice that where the sum of "
    "squared errors is smaller; nearest number, ties to the even code; above 6 x scale: 6 x scale"
)
# What an adapter's configuration may say. Anything else that is not PEFT's default would be lost here.
MERGED_OPTIONS = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "peft_type", "peft_version", "auto_mapping", "init_lora_weights", "runtime_config",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights when they start
LORA_KEY = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight")


@dataclass
class Report:
    """What became of the tensors; counts are of tensors as the model has them, a packed weight being one."""

    merged: Counter = field(default_factory=Counter)  # by part: attention, experts, router, others
    adapter_tensors: int = 0
    copied: int = 0  # bit for bit
    rounded: int = 0  # to bf16, without an adapter
    dequantized: int = 0  # without an adapter
    quantized: int = 0  # with or without one
    squared_error: float = 0.0  # of quantization
    squared_weights: float = 0.0
    files: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def quantization_error(self) -> float:
        """Norm of the quantization's errors over that of the weights."""
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0

    def __str__(self) -> str:
        lines = []
        if self.merged:
            parts = ", ".join(f"{part} {count}" for part, count in sorted(self.merged.items()))
            lines.append(f"merged: {parts} weights, with all {self.adapter_tensors} tensors of the adapter")
        kept = {"copied bit for bit": self.copied, "rounded to bf16": self.rounded, "dequantized": self.dequantized}
        lines.append("without an adapter: " + ", ".join(f"{what} {count}" for what, count in kept.items() if count))
        if self.quantized:
            lines.append(f"quantized: {self.quantized} weights, relative error {self.quantization_error:.2e}")
            lines.append(f"  {ROUNDING}")
        lines.append(f"written: {self.files} files, {self.nbytes / 1e9:.3f} GB, in {self.seconds:.1f} s")
        return "\n".join(lines)


class Base:
    """The weights of a checkpoint, under the names and in the shapes that the dense model has.

    Args:
        folder: with safetensors files; experts may be in MXFP4.

    Attributes:
        shapes: name -> shape; of packed experts, of the weight that is meant: (experts, in, out).
        packed: names of those that are stored in MXFP4.

    Raises:
        SetupError: there is no such file, or one cannot be read.
    """

    def __init__(self, folder: Path):
        self._files, self._dtypes, self.shapes, self.packed = {}, {}, {}, set()
        try:
            for path in weight_files(folder):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        stored = file.get_slice(name)
                        self._files[name], self._dtypes[name] = path, stored.get_dtype()
                        self._add(name, tuple(stored.get_shape()))
        except saving.ERRORS as error:
            raise SetupError(f"base: cannot read the checkpoint in {folder}: {_line(error)}") from error

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        dense = name.removesuffix("_blocks")
        if dense != name:
            experts, out, groups, _ = shape
            shape = (experts, groups * GROUP, out)
            self.packed.add(dense)
        if not name.endswith("_scales"):
            self.shapes[dense] = shape

    def is_bf16(self, name: str) -> bool:
        return self._dtypes.get(name) == "BF16"

    def stored(self, name: str) -> torch.Tensor:
        """A tensor of the files. Each call maps its file anew, so that the pages read go when the tensor goes."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def weights(self, name: str, device: torch.device | str) -> Iterator[torch.Tensor]:
        """The weight in fp32: of experts one (in, out) after the other, of everything else the whole."""
        if name in self.packed:
            blocks, scales = self.stored(f"{name}_blocks"), self.stored(f"{name}_scales")
            for pair in zip(blocks.split(1), scales.split(1), strict=True):
                yield dequantize(*(x.to(device) for x in pair), torch.float32)[0]
        else:
            weight = self.stored(name)
            for part in weight if name.endswith(EXPERTS) else (weight,):
                yield part.to(device).float()


class Adapter:
    """A LoRA adapter as PEFT saves it, by the weights that it changes.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        shapes: of the base's weights, by name.

    Attributes:
        keys: weight -> the adapter's tensors that change it: A and B, or one that takes its place (modules_to_save).
        used: the adapter's tensors that `apply` has merged.

    Raises:
        SetupError: it cannot be read, is more than plain LoRA, or holds a tensor that belongs to no weight of the base.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]):
        self.path, self.used, self.keys, self._shapes = folder / ADAPTER, set(), {}, shapes
        self._config = read_json(folder / ADAPTER_CONFIG)
        check_plain_lora(self._config)
        try:
            with safe_open(self.path, framework="pt") as file:
                self.stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except saving.ERRORS as error:
            raise SetupError(f"adapter: cannot read {self.path}: {_line(error)}") from error
        pairs, strange = {}, []
        for key, shape in self.stored.items():
            name = key.removeprefix("base_model.model.")
            if match := LORA_KEY.fullmatch(name):
                pairs.setdefault(match.group(1, 2), {})[match[3]] = key
            elif shapes.get(name) == shape:
                self.keys[name] = (key,)
            else:
                strange.append(key)
        for (module, _), pair in pairs.items():
            a, b = (self.stored.get(pair.get(letter), ()) for letter in "AB")
            # PEFT nests the adapters of a layer's two projections; their shapes tell which is which.
            own = [f"{module}.weight", f"{module}.gate_up_proj", f"{module}.down_proj"]
            fitting = [name for name in own if _fits(a, b, shapes.get(name, ()))]
            if len(fitting) == 1 and fitting[0] not in self.keys:
                self.keys[fitting[0]] = pair["A"], pair["B"]
            else:
                strange += pair.values()
        if strange or not self.stored:
            shown = ", ".join(f"{key} {self.stored[key]}" for key in sorted(strange)[:3]) or "nothing"
            raise SetupError(
                f"adapter: expected lora_A and lora_B of weights that the base has, {self.path} holds {shown}"
                + (f" and {len(strange) - 3} more without a place" if len(strange) > 3 else "")
            )

    def apply(self, name: str, weights: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The weights of `Base.weights` with what the adapter changes in them, in fp32."""
        with safe_open(self.path, framework="pt") as file:
            tensors = [file.get_tensor(key).float() for key in self.keys[name]]
        by_expert = name.endswith(EXPERTS)
        if len(tensors) == 1:
            yield from tensors[0] if by_expert else tensors
        else:
            experts = self._shapes[name][0] if by_expert else 1
            a = tensors[0].unflatten(0, (experts, -1))  # (experts, rank, in)
            b = tensors[1].unflatten(1, (-1, experts))  # (out, rank, experts)
            rank = a.shape[1]
            scaling = self._config["lora_alpha"] / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            for number, weight in enumerate(weights):
                change = b[..., number].to(weight.device) @ a[number].to(weight.device)  # (out, in)
                yield torch.add(weight, change.T if by_expert else change, alpha=scaling)
        self.used |= set(self.keys[name])


def _fits(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether shapes of A and B are those of an adapter for a weight (out, in), or (experts, in, out)."""
    if len(shape) not in (2, 3) or len(a) != 2 or len(b) != 2:
        return False
    experts, rows, columns = shape if len(shape) == 3 else (1, shape[1], shape[0])
    return (a[1], b[0]) == (rows, columns) and a[0] == b[1] and a[0] % experts == 0


def check_plain_lora(config: dict) -> None:
    """SetupError if a PEFT configuration holds anything that merging B A * scaling would lose."""
    plain = LoraConfig().to_dict()
    odd = {
        key: value
        for key, value in config.items()
        if key not in MERGED_OPTIONS and value and value != plain.get(key)
    }  # fmt: skip
    if config.get("peft_type") != "LORA":
        odd["peft_type"] = config.get("peft_type")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    if odd:
        shown = ", ".join(f"{key}: {value}" for key, value in odd.items())
        raise SetupError(f"adapter: expected plain LoRA, got {shown}; merge it with PEFT and export the checkpoint")


def plan(base: Base, adapter: Adapter | None, to: str, device: torch.device | str, report: Report) -> list[Group]:
    """The tensors to be written, and how each comes about. Counts them in the report.

    Args:
        base, adapter: the weights, and what changes them.
        to: "bf16" or "mxfp4": of the experts.
        device: where it is computed.
        report: gets the counts, and while tensors are written, the error of quantization.

    Raises:
        SetupError: sizes that MXFP4's groups do not divide; while tensors are written, a weight that is not finite.
    """

    def weights(name: str) -> Iterator[torch.Tensor]:
        found = base.weights(name, device)
        for weight in adapter.apply(name, found) if adapter and name in adapter.keys else found:
            if not weight.sum().isfinite():  # faster than to look at each, and infinite or NaN if one is
                raise SetupError(f"base: expected finite numbers, {name} holds others")
            yield weight

    def rounded(name: str) -> Iterator[torch.Tensor]:
        return (weight.bfloat16() for weight in weights(name))

    def quantized(name: str) -> Iterator[torch.Tensor]:
        scales = []
        for weight in weights(name):
            blocks, scale = quantize(weight[None], best_scale=True)
            error = dequantize(blocks, scale, torch.float32)[0] - weight
            report.squared_error += error.double().square().sum().item()
            report.squared_weights += weight.double().square().sum().item()
            scales.append(scale)
            yield blocks
        yield from scales

    groups = []
    for name, shape in base.shapes.items():
        adapted = adapter is not None and name in adapter.keys
        if adapted:
            part = next((part for word, part in PARTS.items() if word in name), "others")
            report.merged[part] += 1
        if to == "mxfp4" and name.endswith(EXPERTS):
            experts, rows, columns = shape
            if rows % GROUP:
                raise SetupError(f"to: mxfp4 has groups of {GROUP} weights, {name} has columns of {rows}")
            names = [f"{name}_blocks", f"{name}_scales"]
            shapes = [(experts, columns, rows // GROUP, BYTES), (experts, columns, rows // GROUP)]
            as_stored = name in base.packed and not adapted
            report.quantized += not as_stored
            make = quantized
            dtype = torch.uint8
        else:
            names, shapes, dtype, make = [name], [shape], torch.bfloat16, rounded
            as_stored = base.is_bf16(name) and not adapted
            report.dequantized += name in base.packed and not adapted
            report.rounded += not (as_stored or adapted or name in base.packed)
        report.copied += as_stored
        pieces = partial(map, base.stored, names) if as_stored else partial(make, name)
        groups.append(Group(dict(zip(names, shapes, strict=True)), dtype, pieces))
    return groups


def export(
    source: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    shard_bytes: int = 5 * 10**9,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Report:
    """Writes a folder that Transformers and vLLM load.

    Args:
        source: a folder with an adapter or with a model, as `sft.py` writes them.
        to: "bf16", or "mxfp4" for experts in MXFP4 and the rest in bf16.
        out: the folder to be made; one that holds nothing may be there.
        base: what an adapter was trained on, a folder or a name on the Hub; default: what the adapter says.
        shard_bytes: most bytes of one file, unless one weight has more.
        device: where the arithmetic is done.
        progress: whether to show a bar.

    Returns:
        What was done. The same source, device and versions give the same files.

    Raises:
        SetupError: whatever is wrong with source, base or out; nothing is left under out then.
    """
    start, source, out, report = time.perf_counter(), Path(source), Path(out), Report()
    if to not in FORMATS:
        raise SetupError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    _check_free(out)
    folder = base_folder(source, base)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gpt_oss":
        raise SetupError(f"base: expected a gpt_oss model, {folder} is {config.get('model_type')!r}")
    weights = Base(folder)
    adapter = Adapter(source, weights.shapes) if is_adapter(source) else None
    groups = plan(weights, adapter, to, device, report)
    report.nbytes = sum(group.nbytes for group in groups)
    unfinished = out.with_name(f"{out.name}{saving.UNFINISHED}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier export that was killed
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if report.nbytes > free:
            raise SetupError(f"out: {report.nbytes / 1e9:.1f} GB do not fit in the {free / 1e9:.1f} GB free at {out}")
        _write_config(unfinished, config, to)
        _copy_rest(source, folder, unfinished)
        _check_complete(unfinished, groups, to)
        with tqdm(total=report.nbytes, unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
            files = write_checkpoint(unfinished, groups, shard_bytes, lambda group: bar.update(group.nbytes))
        report.files = len(files)
        if adapter is not None and adapter.used != set(adapter.stored):
            lost = sorted(set(adapter.stored) - adapter.used)
            raise SetupError(f"adapter: {len(lost)} of its tensors were not merged ({', '.join(lost[:3])})")
        report.adapter_tensors = len(adapter.stored) if adapter is not None else 0
        _check_free(out)
        if out.exists():
            out.rmdir()
        saving.rename_folder(unfinished, out)
    except saving.ERRORS as error:
        raise SetupError(f"out: cannot write {out}: {_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report.seconds = time.perf_counter() - start
    return report


def is_adapter(source: Path) -> bool:
    return (source / ADAPTER_CONFIG).is_file()


def base_folder(source: Path, base: str | None) -> Path:
    """The folder with the checkpoint that a source is, or that its adapter changes.

    Raises:
        SetupError: there is none, or a base beside a source that is no adapter.
    """
    if not is_adapter(source):
        if not (source / "config.json").is_file():
            raise SetupError(f"source: expected a folder with {ADAPTER_CONFIG} or config.json, {source} holds neither")
        if base is not None:
            raise SetupError(f"base: expected with an adapter, {source} is a model")
        return source
    name = base or read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise SetupError(f"base: {source / ADAPTER_CONFIG} names none, and none was given")
    if Path(name).is_dir():
        return Path(name)
    try:
        # Not the copies in other formats that OpenAI keeps in folders beside it.
        patterns = ["*.json", "*.jinja", "model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # not found, no network, no name of the Hub: no common base class
        raise SetupError(f"base: neither a folder nor to be had from the Hub: {name!r} ({_line(error)})") from error


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"out: expected a folder that is not there or is empty, {out} holds something")


def _write_config(folder: Path, config: dict, to: str) -> None:
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = "bfloat16"
    if to == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": UNCONVERTED}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_rest(source: Path, base: Path, folder: Path) -> None:
    """The tokenizer that was trained with, and how to generate."""
    tokenizer = source if (source / TOKENIZER[0]).is_file() else base
    if not (tokenizer / TOKENIZER[0]).is_file():
        raise SetupError(f"source: expected {TOKENIZER[0]} there or in the base, {base}, got none")
    for path in (*(tokenizer / name for name in TOKENIZER), base / "generation_config.json"):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _check_complete(folder: Path, groups: list[Group], to: str) -> None:
    """SetupError unless the tensors are those of the model, to the last one."""
    want = stored_shapes(load_config(str(folder)), packed=to == "mxfp4")
    got = {name: tuple(shape) for group in groups for name, shape in group.shapes.items()}
    odd = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    if odd:
        shown = ", ".join(f"{name} {got.get(name, 'missing')}" for name in odd[:3])
        raise SetupError(f"base: does not fit its config.json: {len(odd)} tensors are not as expected ({shown})")


def read_json(path: Path) -> dict:
    """The object in a JSON file; SetupError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot read {path}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_kernels.finetune.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, help="a folder that sft.py wrote: an adapter, or a model")
    add("--to", required=True, choices=FORMATS, help="of the experts' weights; all others are bf16")
    add("--out", required=True, type=Path, help="folder to be made")
    add("--base", help="what the adapter was trained on (default: what its configuration says)")
    add("--shard-size", type=float, default=5.0, metavar="GB", help="most of one file (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute (default: a GPU)")
    add("--check", choices=["auto", "none", "only"], default="auto", help="compare the exported with the trained "
        "model: where it fits, not, or do nothing else (default: %(default)s)")  # fmt: skip
    add("--text", help="held-out text for it: .txt, .jsonl, .csv, or a folder with a test split (default: "
        "data/reasoning)")  # fmt: skip
    add("--tokens", type=int, default=4096, help="of that text, at most (default: %(default)s)")
    add("--max-kl", type=float, help="nats a token above which the exit code is 1 (default: none)")
    args = parser.parse_args(argv)
    if args.shard_size <= 0:
        parser.error(f"--shard-size: expected > 0, got {args.shard_size}")
    if args.tokens < 1:
        parser.error(f"--tokens: expected >= 1, got {args.tokens}")
    if args.max_kl is not None and args.check == "none":
        parser.error("--max-kl: expected with a check, got --check none")
    try:
        base = str(base_folder(args.source, args.base))
        if args.check != "only":
            print(f"{args.source} on {base} -> {args.out}" if is_adapter(args.source) else f"{base} -> {args.out}")
            shard_bytes = int(args.shard_size * 1e9)
            options = {"shard_bytes": shard_bytes, "device": args.device, "progress": sys.stderr.isatty()}
            print(export(args.source, args.to, args.out, base=args.base, **options), flush=True)
        if args.check == "none":
            return 0
        from .compare import compare

        result = compare(args.source, base, args.out, text=args.text, tokens=args.tokens)
    except SetupError as error:
        sys.exit(f"export: error: {error}")
    print(result)
    if args.max_kl is not None and not (result.kl is not None and result.kl <= args.max_kl):
        print(f"expected a KL divergence of {args.max_kl:g} nats a token at most")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
