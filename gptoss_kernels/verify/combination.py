"""The run to be checked, as its trainer builds it, over a small model of the same shapes."""

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import GptOssConfig, PreTrainedConfig

from ..finetune import train
from ..finetune.config import Arguments, parse
from ..finetune.data import SHIPPED_TOKENIZER, load_tokenizer
from ..finetune.errors import SetupError
from ..finetune.model import build_random, load_config
from ..finetune.packing import Document, Report, build
from ..testing import draw_weights

# Everything that gpt-oss has, at its real head_dim, window, top_k and kind of rotary embedding.
SMALL = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 2048,  # the shipped tokenizer has fewer
    "max_position_embeddings": 131072,
    "router_aux_loss_coef": 0.9,  # as in the checkpoints
}
LAYERS = 2
LARGE = 2**27  # parameters: more are not checked on a CPU, and on a GPU against fp32 instead of fp64


@dataclass
class Combination:
    """A run to be checked: its trainer, the documents that it is checked with, and what differs from the run itself.

    strict: only what the run uses is judged; otherwise every way of passing documents is.
    """

    arguments: Arguments
    trainer: train.Trainer
    documents: list[Document]
    name: str
    strict: bool
    notes: list[str] = field(default_factory=list)

    @property
    def joined(self) -> bool:
        training = self.arguments.training
        return bool(training.packing or training.padding_free)


def settings(
    folder: str,
    *,
    config: str | None = None,
    device: str | None = None,
    model: str | None = None,
    attention: str | None = None,
    experts: str | None = None,
    trained: str = "lora",
) -> Arguments:
    """The settings of a run as `sft.py` would read them.

    Args:
        folder: for whatever the trainer writes.
        config: a configuration of sft.py. Default: packing, checkpointing, and per `trained` LoRA (r 8) on attention,
            experts and router ("lora") or all weights ("full").
        device: "cuda" or "cpu"; default: the GPU if there is one. On the CPU everything is in fp32.
        model, attention, experts: in the place of the configuration's.

    Raises:
        SystemExit: with code 2, for a configuration that sft.py would not take.
        SetupError: an unknown device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise SetupError(f"device: expected cpu, or cuda where there is a GPU, got {device}")
    given = {"output_dir": folder, "overwrite": "true", "report_to": "none", "deepspeed": None}
    if config is None:
        given |= {
            "model_name_or_path": "small",
            "packing": "true",
            "max_length": 4 * SMALL["sliding_window"],
            "gradient_checkpointing": "true",
            "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
            "recomputation": "lean",
            "bf16": "true",
            "dtype": "bfloat16",
        }
        if trained == "lora":
            given |= {"use_peft": "true", "lora_r": 8, "lora_dropout": 0.0}
    if device == "cpu":
        given |= {"use_cpu": "true", "bf16": "false", "fp16": "false", "dtype": "float32"}
    chosen = {"model_name_or_path": model, "attn_implementation": attention, "experts_implementation": experts}
    given |= {key: value for key, value in chosen.items() if value is not None}
    argv = [f"--{key}={value}" for key, value in given.items() if value is not None]
    if config is None and trained == "lora":
        argv += ["--lora_targets", "attention", "experts", "router"]
    with warnings.catch_warnings():
        # Transformers renamed gradient_checkpointing in 5.23 and warns about it; the old name works in all.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        return parse([*(["--config", config] if config else []), *argv])


def combine(arguments: Arguments, folder: str, *, strict: bool, stock: bool = False, seed: int = 0) -> Combination:
    """The trainer of a run over a small model.

    Args:
        arguments: of the run; they are not changed.
        folder: for whatever the trainer writes.
        strict: see `Combination`.
        stock: what TRL does by itself: the router's auxiliary loss as the checkpoint's configuration has it, and none
            of this package's layers.
        seed: of weights, tokens and loss weights.

    Raises:
        SetupError: the model's shapes cannot be read, or the run uses something that is not checked here.
    """
    arguments = copy.copy(arguments)
    arguments.model, arguments.run, training = map(copy.copy, (arguments.model, arguments.run, arguments.training))
    arguments.training = training
    model_args, notes = arguments.model, []
    if training.deepspeed_plugin is not None or training.distributed_state.distributed_type.value == "FSDP":
        raise SetupError("verify: checks one process without ZeRO or FSDP; run `python -m gptoss_kernels.verify`")
    if training.world_size > 1:
        raise SetupError("verify: checks one process; run `python -m gptoss_kernels.verify --config FILE` before")
    if model_args.use_peft and (model_args.use_dora or model_args.lora_modules_to_save):
        raise SetupError("verify: knows plain LoRA, without use_dora and lora_modules_to_save")
    if model_args.use_peft and model_args.lora_dropout:
        model_args.lora_dropout = 0.0
        notes.append("without LoRA's dropout")
    for key, value in {"output_dir": folder, "report_to": [], "push_to_hub": False, "eval_strategy": "no",
                       "eval_on_start": False, "do_eval": False, "save_strategy": "no", "disable_tqdm": True,
                       "load_best_model_at_end": False, "eval_packing": None}.items():  # fmt: skip
        setattr(training, key, value)
    if stock:
        training.router_aux_loss_coef, model_args.fused_layers = None, False

    config, name = _shapes(model_args.model_name_or_path, model_args.model_revision, notes)
    if training.device.type == "cpu" and train.count_parameters(config) > LARGE:
        notes[-1:] = [f"{name} need a GPU"]
        config, name = _shapes("small", "", notes)
    tokenizer = load_tokenizer(
        str(Path(__file__).parents[2] / SHIPPED_TOKENIZER), conversation_date=arguments.data.conversation_date
    )
    documents = _documents(config, seed)
    dtype = train.DTYPES[model_args.dtype] if model_args.dtype != "auto" else torch.bfloat16
    implementations = {"attn_implementation": model_args.attn_implementation}
    if model_args.experts_implementation is not None:
        implementations["experts_implementation"] = model_args.experts_implementation
    packed = model_args.base_weights == "mxfp4"
    config.initializer_range = config.hidden_size**-0.5  # of packed weights; others are drawn below
    model = draw_weights(build_random(config, training.device, dtype, seed, packed, **implementations), seed)
    rows = build(documents, False, Report("verify"))
    trainer = train.make_trainer(arguments, model, tokenizer, rows)
    _draw_adapters(trainer.model, seed + 1)
    return Combination(arguments, trainer, documents, name, strict, notes)


def _draw_adapters(model: torch.nn.Module, seed: int) -> None:
    """LoRA's weights so that an adapter is a fifth of what it adapts: PEFT's zeros would hide whether it is applied."""
    generator = None
    with torch.no_grad():
        for module in model.modules():
            for name, a in getattr(module, "lora_A", {}).items():
                a, b = a.weight, module.lora_B[name].weight
                generator = generator or torch.Generator(a.device).manual_seed(seed)
                a.normal_(0, a.shape[1] ** -0.5, generator=generator)
                b.normal_(0, 0.2 / (module.scaling[name] * module.r[name] ** 0.5), generator=generator)


def _shapes(name: str, revision: str, notes: list[str]) -> tuple[PreTrainedConfig, str]:
    """A configuration with two layers, one of each kind, and what it is of."""
    if name == "small":
        # The scaled rotary embedding is the class's own default.
        return GptOssConfig(**SMALL), "a small gpt-oss"
    try:
        config = load_config(name, random=True)
    except SetupError:
        config = load_config(name, revision=revision)
    if config.model_type != "gpt_oss":
        raise SetupError(f"model: expected a gpt_oss model, {name} is a {config.model_type}")
    config = copy.deepcopy(config)
    if config.num_hidden_layers > LAYERS:
        notes.append(f"{LAYERS} of {config.num_hidden_layers} layers")
    config.num_hidden_layers, config.layer_types = LAYERS, ["sliding_attention", "full_attention"]
    config.pad_token_id = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, f"the shapes of {name}"


def _documents(config: PreTrainedConfig, seed: int) -> list[Document]:
    """Four documents: longer than the window, of one token, twice the window and more, shorter; four windows in all."""
    draw, window = np.random.default_rng(seed), config.sliding_window
    documents = []
    for length in (window + 13, 1, 2 * window + 2, window - 16):
        weights = draw.choice([0.0, 0.5, 1.0], length, p=[0.3, 0.3, 0.4]).astype(np.float32)
        weights[0] = 0  # nothing predicts it
        ids = draw.integers(0, config.vocab_size, length, dtype=np.int32)
        documents.append(Document(ids, weights, np.zeros(length, dtype=np.int8)))
    return documents
