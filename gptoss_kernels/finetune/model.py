"""The model of a run: a checkpoint (MXFP4 dequantized on load, or kept), or random weights in real shapes."""

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch.distributed.tensor import distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from gptoss_kernels import patch_gpt_oss  # the package registers attn_implementation="gptoss_triton"

from ..integrations.mxfp4 import pack_experts, packed_parameters
from ..mxfp4.read import INDEX, read_tensors, weight_files
from ..mxfp4.reference import MAGNITUDES
from ..plan.memory import Shapes
from .engine import numel
from .errors import SetupError

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "models"


def load_config(name: str, *, random: bool = False, revision: str = "main") -> PreTrainedConfig:
    """The model's configuration.

    Args:
        name: a name on the Hub, or a folder with a config.json; with random also the name of a file in
            configs/models ("openai/gpt-oss-20b", "gpt-oss-tiny") or the path of a .json file of that kind.
        random: read shapes only, without looking for a checkpoint.
        revision: branch, tag or commit on the Hub.

    Raises:
        SetupError: nothing readable is found under the name.
    """
    try:
        if not random:
            return AutoConfig.from_pretrained(name, revision=revision)
        path = Path(name)
        for candidate in (path, path / "config.json", SHAPES / f"{path.name}.json"):
            if candidate.is_file():
                return AutoConfig.for_model(**json.loads(candidate.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(f"model_name_or_path: cannot read the configuration of {name!r}: {_line(error)}") from error
    known = ", ".join(sorted(p.stem for p in SHAPES.glob("*.json"))) or f"nothing, {SHAPES} is missing"
    raise SetupError(
        f"model_name_or_path: model_init=random knows the shapes of {known}, and of any config.json; got {name!r}"
    )


def build_random(
    config: PreTrainedConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    packed: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """A gpt-oss of the configuration's shapes with random weights, made in place on the device.

    Matrices are normal with the configuration's initializer_range, norms one, biases zero, sinks standard normal (a
    sink near zero would hardly be told from none). The same seed gives the same weights on the same kind of device.

    Args:
        config: a GptOssConfig.
        device, dtype: of every parameter.
        seed: of the weights.
        packed: the experts are in MXFP4, drawn as such: uniform codes, and of two scales as many as it takes to give
            the weights the same standard deviation.
        kwargs: attn_implementation and experts_implementation, as for `from_config`.
    """
    model = _without_weights(config, dtype, packed, kwargs)
    model.to_empty(device=device)
    _compute_buffers(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, config.initializer_range, generator)
        # Of numbers 2 ** low and 2 ** (low + 1) times those of the codes, the mean square is to be that of the range.
        square = sum(x * x for x in MAGNITUDES) / len(MAGNITUDES)
        wanted = config.initializer_range**2 / square
        low = math.floor(math.log2(wanted) / 2)
        share = (wanted / 4.0**low - 1) / 3
        for name, buffer in model.named_buffers():
            if name.endswith("_blocks"):
                buffer.random_(0, 256, generator=generator)
            elif name.endswith("_scales"):
                buffer.bernoulli_(share, generator=generator).add_(127 + low)
    return model.eval()


def _draw(name: str, x: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return x.fill_(1)
    if name.endswith("bias"):
        return x.zero_()
    return x.normal_(0, 1.0 if name.endswith("sinks") else std, generator=generator)


def build_without_weights(
    config: PreTrainedConfig, device: torch.device | str, dtype: torch.dtype, **kwargs
) -> PreTrainedModel:
    """As `build_random`, with parameters on "meta" for `fill_fsdp2` to make and buffers on the device."""
    model = _without_weights(config, dtype, False, kwargs)
    _compute_buffers(model, device)
    return model.eval()


def build_unfilled(config: PreTrainedConfig, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    """As `build_random` on the CPU, with parameters that nobody has written to, which take no memory until then.

    Not on "meta": Accelerate tells the parameters of an optimizer apart by their addresses.
    """
    model = _without_weights(config, dtype, False, kwargs)
    model.to_empty(device="cpu")
    _compute_buffers(model, "cpu")
    return model.eval()


@torch.no_grad()
def fill_fsdp2(model: PreTrainedModel, accelerator: Accelerator, seed: int) -> None:
    """Shards a model of `build_without_weights` as Accelerate's FSDP2 would, and gives it `build_random`'s weights.

    Each process draws each tensor whole, keeps its own part and sends nothing: a GPU holds its parts and one tensor.

    Raises:
        SetupError: it is not FSDP2, or a tensor has fewer rows than there are processes.
    """
    if not accelerator.is_fsdp2:
        raise SetupError("model_init: random weights are spread by fsdp_version 2 or ZeRO-3, got another FSDP")
    processes, device, dtype = accelerator.num_processes, accelerator.device, model.dtype
    for name, parameter in model.named_parameters():
        # Accelerate tells parameters apart by the addresses of their parts, and an empty part has none.
        if -(-len(parameter) // processes) * (processes - 1) >= len(parameter):
            raise SetupError(f"model_init: {name} with {len(parameter)} rows is too short for {processes} processes")
    buffers = {name: x.clone() for name, x in model.named_buffers(remove_duplicate=False)}
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # there is nothing to send to the others
    fsdp2_prepare_model(accelerator, model)
    model.to_empty(device=device)
    for name, x in model.named_buffers(remove_duplicate=False):
        x.copy_(buffers[name])
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=dtype, device=device)
        _draw(name, whole, model.config.initializer_range, generator)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())


@torch.no_grad()
def build_random_zero3(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int, **kwargs
) -> PreTrainedModel:
    """As `build_random`, spread over all processes by DeepSpeed's ZeRO-3, tensor by tensor; its configuration is set.

    Every process has to call it; the first one draws.
    """
    import deepspeed

    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)  # Transformers makes it in zero.Init
    _compute_buffers(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                whole = torch.empty(parameter.shape, dtype=dtype, device=device)
                parameter.copy_(_draw(name, whole, config.initializer_range, generator))
    return model.eval()


def _without_weights(config, dtype, packed: bool, kwargs: dict) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    return pack_experts(model) if packed else model


def _compute_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """The rotary frequencies are buffers that the constructor computes, and nothing was computed on "meta"."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()


def quantization_method(config: PreTrainedConfig) -> str | None:
    """What the checkpoint says of its weights: "mxfp4", another method's name, or None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def load_packed(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str = "main",
    device: torch.device | str = "cpu",
    **kwargs,
) -> PreTrainedModel:
    """A model from an MXFP4 checkpoint whose experts stay as they are stored: 17/32 of a byte a weight, frozen.

    Each tensor goes from its file to the device; the dense experts never exist, neither there nor on the host.

    Args:
        name, config, revision: as given to and returned by `load_config`.
        dtype: of everything but the packed experts; "auto" keeps the checkpoint's.
        device: of all.
        kwargs: attn_implementation and experts_implementation, as for `from_config`.

    Raises:
        SetupError: the checkpoint is not in MXFP4, cannot be read, or does not hold all of the model's weights.
    """
    method = quantization_method(config)
    if method != "mxfp4":
        raise SetupError(f"base_weights: expected an MXFP4 checkpoint for mxfp4, {name} is {method or 'not quantized'}")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    try:
        model = _without_weights(config, dtype, True, kwargs)
        folder = name
        if not Path(name).is_dir():
            # Not the copies in other formats that OpenAI keeps in folders beside it.
            folder = snapshot_download(name, revision=revision, allow_patterns=["model*.safetensors", INDEX])
        for file in weight_files(folder):
            tensors = read_tensors([file], device)
            tensors = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors}
            model.load_state_dict(tensors, strict=False, assign=True)
        _compute_buffers(model, device)
    except torch.OutOfMemoryError as error:
        raise SetupError(f"model_name_or_path: the GPU is too small to hold {name}: {_line(error)}") from error
    except Exception as error:  # safetensors, JSON, network and shape errors share no base class
        raise SetupError(f"model_name_or_path: cannot read the checkpoint {name}: {_line(error)}") from error
    missing = sorted(key for key, x in model.state_dict().items() if x.is_meta)
    if missing:
        raise SetupError(
            f"model_name_or_path: the checkpoint {name} does not fit its config.json: {len(missing)} weights are "
            f"missing ({', '.join(missing[:3])}, ...)"
        )
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        pass  # it has none, and keeps what the configuration implies
    return model.eval()


def load_checkpoint(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str = "main",
    device_map: dict | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A model from a checkpoint. Experts stored as MXFP4 are dequantized, which is exact in bf16.

    Args:
        name, config, revision: as given to and returned by `load_config`.
        dtype: of every parameter; "auto" keeps the checkpoint's.
        device_map: where to load to, as in Transformers.
        kwargs: passed on to `from_pretrained`.

    Raises:
        SetupError: the checkpoint cannot be read, or does not hold all of the model's weights.
    """
    quantization = quantization_method(config)
    if quantization is not None:
        if quantization != "mxfp4":
            raise SetupError(f"model_name_or_path: expected mxfp4 or no quantization, {name} is {quantization}")
        kwargs["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            revision=revision,
            device_map=device_map,
            output_loading_info=True,
            **kwargs,
        )
    except torch.OutOfMemoryError as error:
        raise SetupError(f"model_name_or_path: the GPU is too small to hold {name}: {_line(error)}") from error
    except Exception as error:  # safetensors, JSON, network and shape errors share no base class
        raise SetupError(f"model_name_or_path: cannot read the checkpoint {name}: {_line(error)}") from error
    missing, odd = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or odd:
        # Transformers would give these random weights and a warning.
        what = [f"{len(missing)} weights are missing ({', '.join(missing[:3])}, ...)"] if missing else []
        what += [f"{len(odd)} have another shape ({', '.join(odd[:3])}, ...)"] if odd else []
        raise SetupError(f"model_name_or_path: the checkpoint {name} does not fit its config.json: {'; '.join(what)}")
    if quantization is not None:
        # save_pretrained would undo what loading did, and with MXFP4 writes experts under names that nothing can load.
        model._weight_conversions = []
    if quantization is not None and dtype != "auto":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # Transformers 5.17 dequantizes to bf16 whatever was asked for
    return model


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """The model with the LoRA adapter in a folder; SetupError where there is none that fits."""
    try:
        adapted = PeftModel.from_pretrained(model, path)
    except Exception as error:  # a missing file, bad JSON, other shapes: no common base class
        raise SetupError(f"adapter: cannot load {path}: {_line(error)}") from error
    if packed_parameters(model):
        patch_gpt_oss(adapted, attention=False, experts=False, rms_norm=False, rope=False)
    return adapted


def census(model: torch.nn.Module) -> dict[str, int]:
    """Number of trained parameters by part of the model: attention, experts, router, others. Parts without are left
    out."""
    parts = {"self_attn": "attention", "experts": "experts", "router": "router"}
    counts = dict.fromkeys((*parts.values(), "others"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for word, part in parts.items() if word in name.split(".")), "others")
            counts[part] += numel(parameter)
    return {part: count for part, count in counts.items() if count}


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of the configuration's model, counted without building it (ZeRO-3 would spread it)."""
    return Shapes(config).parameters


def count_packed_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the configuration's model with its experts in MXFP4, counted without allocating it."""
    model = _without_weights(config, dtype, True, {})
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def stored_shapes(config: PreTrainedConfig, packed: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint of the configuration's model holds, by name; with packed, its experts in
    MXFP4."""
    return {
        name: tuple(x.shape) for name, x in _without_weights(config, torch.bfloat16, packed, {}).state_dict().items()
    }


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
