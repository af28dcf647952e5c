"""What can be known to be wrong before anything is loaded, each as one clear error."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from ..attention.fa4 import load_fa4
from ..integrations.transformers import FA4_NAME, NAME
from ..plan import memory
from .config import Arguments, TrainingArguments
from .engine import FSDP, asked_for, is_sharded
from .errors import SetupError
from .optimizer import IN_BACKWARD, NAMES, parse_arguments

# Values of `optim` that need a package of their own, by a part of their name.
OPTIMIZER_PACKAGES = {"bnb": "bitsandbytes", "8bit": "bitsandbytes", "paged": "bitsandbytes", "torchao": "torchao"}

# Settings of TRL's data preparation and loss that ours does not have: the values that mean the same here, and why.
UNSERVED = (
    ("packing_strategy", ("bfd",), "documents are packed whole, by best fit, and do not see each other"),
    ("truncation_mode", ("keep_start",), "what is beyond max_length is cut and counted"),
    ("completion_only_loss", (None, True), "prompts are not trained; rows with `text` are trained as a whole"),
    ("loss_type", ("nll",), "weighted losses are negative log-likelihoods"),
    ("label_smoothing_factor", (0,), "the logits that it needs are never built"),
    ("dataset_text_field", ("text",), "rename the column"),
    ("dataset_kwargs", (None,), "data are prepared here"),
    ("chat_template_path", (None,), "conversations are rendered as Harmony"),
    ("eos_token", (None,), "end_token says what ends a reply"),
    ("pad_token", (None,), "padding is the tokenizer's"),
    ("shuffle_dataset", (False,), "rows are drawn in another order each epoch anyway"),
)


def check_settings(arguments: Arguments) -> None:
    """Raises SetupError for settings that contradict each other or need a package that is not there."""
    model, training = arguments.model, arguments.training
    if model.model_name_or_path is None:
        raise SetupError("model_name_or_path: expected a name or a folder, got nothing")
    if model.load_in_8bit or model.load_in_4bit:
        raise SetupError(
            "load_in_8bit, load_in_4bit: not for gpt-oss, whose experts are no Linear layers and would stay as they are"
        )
    if model.base_weights == "mxfp4" and not model.use_peft:
        raise SetupError(
            "base_weights: mxfp4 weights are frozen; train adapters over them (use_peft), or all weights from bf16"
        )
    for key, served, what in UNSERVED:
        if (value := getattr(training, key)) not in served:
            raise SetupError(f"{key}: expected {' or '.join(map(repr, served))}, got {value!r}; {what}")
    joined = training.packing or training.eval_packing or training.padding_free
    if joined and training.pad_to_multiple_of is not None:
        raise SetupError("pad_to_multiple_of: packed rows have no padding; set it to null, or packing to false")
    if (training.packing or training.eval_packing) and training.max_length is None:
        raise SetupError("max_length: expected the length of a packed row in tokens, got nothing")
    # Transformers' gpt-oss attends across packed documents under eager and flex.
    exact = model.attn_implementation in (NAME, FA4_NAME) or "flash" in model.attn_implementation
    if joined and not exact:
        raise SetupError(
            f"attn_implementation: {model.attn_implementation!r} lets packed documents attend to each other; use "
            "'gptoss_triton', or set packing, eval_packing and padding_free to false"
        )
    if model.attn_implementation == FA4_NAME:
        evaluates = training.eval_strategy != "no" or training.eval_on_start
        rows = max(training.per_device_train_batch_size, training.per_device_eval_batch_size if evaluates else 1)
        if not joined and (rows > 1 or training.pad_to_multiple_of is not None):
            raise SetupError(
                f"attn_implementation: {FA4_NAME!r} has no padding mask, and rows would be padded; set packing or "
                f"padding_free to true, per_device_train_batch_size and per_device_eval_batch_size to 1 and "
                f"pad_to_multiple_of to null, or use {NAME!r}"
            )
        try:
            load_fa4()
        except RuntimeError as error:
            raise SetupError(f"attn_implementation: {FA4_NAME!r}: {error}") from error
    if training.activation_offloading and training.device.type != "cuda":
        raise SetupError(
            f"activation_offloading: expected a GPU, whose memory it relieves, got the device {training.device}"
        )
    for tracker in training.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise SetupError(f"report_to: {tracker} is not installed; install it, or set report_to to none")
    if training.push_to_hub and "checkpoint" in training.hub_strategy.value:
        raise SetupError(
            f"hub_strategy: expected end or every_save, got {training.hub_strategy.value!r}; a checkpoint is renamed "
            "when it is whole, and an upload might still read it under its first name"
        )
    if arguments.run.sample_prompt and is_sharded(training):
        raise SetupError(
            "sample_prompt: one process cannot generate with weights that are spread over several; leave it"
        )
    optimizer = str(getattr(training.optim, "value", training.optim))
    if optimizer in NAMES:
        check_own_optimizer(arguments)
        return
    for part, package in OPTIMIZER_PACKAGES.items():
        if part in optimizer and importlib.util.find_spec(package) is None:
            raise SetupError(f"optim: {optimizer} needs {package}, which is not installed")


def check_own_optimizer(arguments: Arguments) -> None:
    """Raises SetupError for settings with which this package's optimizer cannot work."""
    training, name = arguments.training, arguments.training.optim
    share = parse_arguments(training.optim_args).get("on_host", 0.0)
    if not 0 <= share <= 1 or (share and name != IN_BACKWARD):
        raise SetupError(f"optim_args: on_host is a share from 0 to 1, above 0 with optim {IN_BACKWARD}, got {share}")
    if training.fp16 or arguments.model.dtype == "float16":
        raise SetupError(f"optim: {name} trains bf16 or fp32 weights without loss scaling; got fp16")
    if asked_for(training) is not None:
        raise SetupError(f"optim: {name} steps whole tensors; ZeRO and FSDP need adamw_torch_fused")
    if name != IN_BACKWARD:
        return
    if training.world_size > 1:
        raise SetupError(
            f"optim: {name} is for one process: it takes a step before gradients are averaged over "
            f"{training.world_size}; use {NAMES[0]}"
        )
    if training.max_grad_norm:
        raise SetupError(
            f"max_grad_norm: {name} cannot clip by the norm of all gradients, which it never has together; set "
            f"max_grad_norm to 0, or optim to {NAMES[0]}, which keeps gradients (as large as the weights) until then"
        )


def check_processes(wanted: int | None, running: int, gpus: int) -> None:
    """Raises SetupError where a distributed configuration did not take effect.

    Args:
        wanted: processes that the configuration is for; None: as many as Accelerate's own default file asks for, if
            there is one, else any number.
        running: processes that run.
        gpus: GPUs that each of them sees.
    """
    if wanted is None and running == 1 and Path(default_config_file).is_file():
        # Written by `accelerate config`, and without effect on a plain `python sft.py`.
        wanted = load_config_from_file(None).num_processes
    if wanted is not None and wanted != running:
        raise SetupError(
            f"num_processes: this configuration is for {wanted}, and {running} is running; start it with `accelerate "
            f"launch --config_file configs/zero3.yaml --num_processes {wanted} sft.py ...`, or set --num_processes "
            f"{running} if that is meant"
        )
    if running == 1 and gpus > 1:
        raise SetupError(
            f"one process sees {gpus} GPUs and would use them badly: choose one with CUDA_VISIBLE_DEVICES=0, or start "
            f"one process a GPU with `accelerate launch --num_processes {gpus} sft.py ...`"
        )


def find_checkpoint(output_dir: str, resume: str | None, overwrite: bool, say: Callable = print) -> str | None:
    """The checkpoint to go on from, or None to start; nothing that an earlier run left is lost without being told to.

    Args:
        output_dir: the run's folder.
        resume: "true" for the last complete checkpoint in output_dir, a checkpoint's folder, or "false" or None.
        overwrite: delete the checkpoints of an earlier run.
        say: how to tell that this happens.

    Raises:
        SetupError: there is nothing to resume from; or an earlier run is there, and neither was asked for.
    """
    output = Path(output_dir)
    checkpoints = sorted(
        (p for p in output.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()),
        key=lambda p: int(p.name.rpartition("-")[2]),
    )
    wanted = (resume or "false").lower()
    if wanted == "true":
        # trainer_state.json is written last: without it, the run was cut off while it saved.
        complete = [p for p in checkpoints if (p / "trainer_state.json").is_file()]
        if not complete:
            raise SetupError(f"resume_from_checkpoint: {output_dir} holds no complete checkpoint")
        return str(complete[-1])
    if wanted != "false":
        if not (Path(resume) / "trainer_state.json").is_file():
            raise SetupError(f"resume_from_checkpoint: {resume} is no complete checkpoint (no trainer_state.json)")
        return resume
    results = [*checkpoints, *output.glob("*.safetensors")]
    if results and not overwrite:
        raise SetupError(
            f"output_dir: {output_dir} holds an earlier run ({', '.join(p.name for p in results[-3:])}); go on with it "
            "by --resume_from_checkpoint true, choose another --output_dir, or start anew with --overwrite true"
        )
    if results:
        say(f"overwrite: the earlier run in {output_dir} is replaced")
    for path in checkpoints:
        shutil.rmtree(path, ignore_errors=True)  # another rank may be at it too
    return None


def kept_dtype(training: TrainingArguments, dtype: torch.dtype) -> torch.dtype:
    """Of the weights between steps: FSDP in mixed precision keeps fp32 ones, whatever was loaded."""
    return torch.float32 if asked_for(training) == FSDP and (training.bf16 or training.fp16) else dtype


def offloads_optimizer(training: TrainingArguments) -> bool:
    """Whether DeepSpeed keeps gradients and optimizer states in the host's memory."""
    plugin = training.deepspeed_plugin
    return plugin is not None and plugin.offload_optimizer_device == "cpu"


def moments_on_host(training: TrainingArguments) -> float:
    """Share of this package's optimizer's moments that waits in the host's memory."""
    return parse_arguments(training.optim_args).get("on_host", 0.0) if training.optim in NAMES else 0.0


def optimizer_state_bytes(training: TrainingArguments, dtype: torch.dtype) -> float:
    """Bytes that the optimizer keeps on the GPU per trained parameter, at the least."""
    name = str(getattr(training.optim, "value", training.optim))
    if offloads_optimizer(training):
        return 0
    plugin = training.deepspeed_plugin
    # DeepSpeed keeps fp32 weights and moments, unless it is told to keep bf16 ones (and then no second weights).
    masters = plugin is not None and not plugin.deepspeed_config.get("bf16", {}).get("bf16_optimizer_states", False)
    states = memory.state_bytes(name, dtype.itemsize, sharded=masters)
    return states * (1 - moments_on_host(training))


def gradient_bytes(training: TrainingArguments, dtype: torch.dtype) -> int:
    """Bytes of gradient that exist together on the GPU per trained parameter: none if each is used at once."""
    if offloads_optimizer(training):
        return 0
    name = str(getattr(training.optim, "value", training.optim))
    return memory.gradient_bytes(name, training.gradient_accumulation_steps, dtype.itemsize)


def host_bytes(training: TrainingArguments, trainable: int) -> int:
    """Bytes that a run needs in the memory of all hosts together, the loading of the model not counted.

    DeepSpeed's offloaded optimizer (0.19, zero/stage3.py) keeps fp32 weights, both moments and fp32 gradients there,
    and the 16-bit gradients that it makes those of: 18 bytes a trained parameter. This package's optimizer keeps the
    8-bit codes of both moments there, of the share that it is told.
    """
    return 18 * trainable if offloads_optimizer(training) else int(2 * moments_on_host(training) * trainable)


def memory_floor(
    parameters: int,
    trainable: int,
    parameter_bytes: int,
    state_bytes: float,
    processes: int = 1,
    gradient_bytes: int | None = None,
) -> int:
    """Bytes a GPU needs at the very least: weights, gradients and optimizer states, no activation counted.

    Args:
        parameters: number of parameters of the model.
        trainable: number of trained ones (adapters included).
        parameter_bytes: bytes of a parameter.
        state_bytes: bytes that the optimizer keeps per trained parameter.
        processes: over how many GPUs all of it is spread (ZeRO-3, FSDP).
        gradient_bytes: bytes of gradient kept per trained parameter. Default: parameter_bytes.
    """
    gradient_bytes = parameter_bytes if gradient_bytes is None else gradient_bytes
    total = parameters * parameter_bytes + trainable * (gradient_bytes + state_bytes)
    return int(-(-total // processes))


def check_host_memory(needed: int, total: int) -> None:
    """Raises SetupError where `needed` bytes are more than a host's `total` ones."""
    if needed > total:
        raise SetupError(
            f"offload_optimizer_device, optim_args: this host needs at least {needed / 2**30:,.0f} GiB for gradients "
            f"and optimizer states, and has {total / 2**30:,.0f} GiB; take more hosts, or adapters (use_peft; "
            "base_weights mxfp4)"
        )


def check_memory(needed: int, free: int, advice: str) -> None:
    """Raises SetupError where `needed` bytes are more than `free` ones."""
    if needed > free:
        raise SetupError(
            f"the GPU is too small: weights, gradients and optimizer states need at least {needed / 2**30:.1f} GiB "
            f"before any activation, and {free / 2**30:.1f} GiB are free; {advice}"
        )
