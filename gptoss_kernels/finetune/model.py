"""The model of a run: a checkpoint (MXFP4 dequantized on load), or random weights in real shapes."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedConfig, PreTrainedModel

import gptoss_kernels  # noqa: F401  (registers attn_implementation="gptoss_triton")

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
    **kwargs,
) -> PreTrainedModel:
    """A gpt-oss of the configuration's shapes with random weights, made in place on the device.

    Matrices are normal with the configuration's initializer_range, norms one, biases zero, sinks standard normal (a
    sink near zero would hardly be told from none). The same seed gives the same weights on the same kind of device.

    Args:
        config: a GptOssConfig.
        device, dtype: of every parameter.
        seed: of the weights.
        kwargs: attn_implementation and experts_implementation, as for `from_config`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    model.to_empty(device=device)
    # The rotary frequencies are buffers that the constructor computes, and nothing was computed on "meta".
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = 1.0 if name.endswith("sinks") else config.initializer_range
                parameter.normal_(0, std, generator=generator)
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
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if str(getattr(method, "value", method)) != "mxfp4":
            raise SetupError(f"model_name_or_path: expected mxfp4 or no quantization, {name} is {method}")
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
        return PeftModel.from_pretrained(model, path)
    except Exception as error:  # a missing file, bad JSON, other shapes: no common base class
        raise SetupError(f"adapter: cannot load {path}: {_line(error)}") from error


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of the configuration's model, counted without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).parameters())


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
