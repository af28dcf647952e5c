"""A finetuning run from its settings to the saved result."""

import contextlib
import copy
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer, get_peft_config

from gptoss_kernels import patch_gpt_oss
from gptoss_kernels.backends import default_backend
from gptoss_kernels.integrations.mxfp4 import packed_parameters

from . import optimizer, saving
from .bigram import bigram_entropy
from .config import Arguments, TrainingArguments
from .data import SHIPPED_DATA, SHIPPED_TOKENIZER, load_splits, load_tokenizer, prepare
from .engine import FSDP, Sharding, asked_for, check_engine, is_sharded, numel, receives_weights
from .errors import SetupError
from .loss import fuse_loss
from .model import (
    build_random,
    build_random_zero3,
    build_unfilled,
    build_without_weights,
    census,
    count_packed_bytes,
    count_parameters,
    fill_fsdp2,
    load_checkpoint,
    load_config,
    load_packed,
)
from .packing import Collator
from .preflight import (
    check_host_memory,
    check_memory,
    check_processes,
    check_settings,
    find_checkpoint,
    gradient_bytes,
    host_bytes,
    kept_dtype,
    memory_floor,
    optimizer_state_bytes,
)
from .recompute import Recomputation
from .report import Speed, plot_loss, write_log
from .sample import reply

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Result:
    """Losses in nats per held-out token; None where there is no held-out split or nothing was measured."""

    first_loss: float | None
    last_loss: float | None
    bigram: float | None
    tokens_per_second: float
    peak_memory: int


class Trainer(SFTTrainer):
    """SFTTrainer for data that `data.prepare` made, in which each token's loss has a weight.

    A checkpoint appears whole or not at all, and older ones are deleted after that.

    The loss is sum(weight * -log p) / sum(weight), over all tokens of an optimizer step (its micro-batches and
    processes) or, held out, of the whole split: a mean over batches would weigh a short one up.

    Args:
        args: its packing, eval_packing and padding_free say whether a batch is one joined row or padded rows.
        train_dataset, eval_dataset: rows of `packing.build`.
        processing_class: the tokenizer.
        kwargs: model, peft_config, callbacks, as in SFTTrainer.

    Raises:
        SetupError: context or sequence parallelism is on.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        **kwargs,
    ):
        join = bool(args.packing or args.eval_packing or args.padding_free)
        collator = Collator(processing_class.pad_token_id, join, None if join else args.pad_to_multiple_of)
        args = copy.copy(args)  # TRL's own packing takes no other collator, and its labels have no weights
        args.packing = args.padding_free = args.assistant_only_loss = False
        args.eval_packing, args.dataset_kwargs = None, {"skip_prepare_dataset": True}
        self._unfinished = False
        super().__init__(
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and self.args.bf16:
            # Accelerate's policy rounds what the model returns, each token's log-probability too, to bf16.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise SetupError(
                "parallelism_config: context and sequence parallelism neither keep packed documents apart nor carry "
                "loss weights"
            )

    def _get_output_dir(self, trial=None):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, saving.UNFINISHED) if self._unfinished else folder

    @contextlib.contextmanager
    def _beside(self, what: str):
        """A place beside the run's results to save to, one for all processes: gives its path, and empties it after.

        Raises:
            SetupError: something could not be written.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            saving.clear(folder)
            (folder / saving.UNFINISHED).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            yield folder / saving.UNFINISHED
        except saving.ERRORS as error:
            raise SetupError(
                f"output_dir: cannot save {what} to {folder} ({' '.join(str(error).split())}); what was saved before "
                "is as it was"
            ) from error
        finally:
            if self.args.should_save:
                saving.clear(folder)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial):
        name, limit = f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        place = Path(self._get_output_dir(trial)) / name
        with self._beside(name) as unfinished:
            self._unfinished, self.args.save_total_limit = True, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished, self.args.save_total_limit = False, limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_global_step:
                    best = place.with_name(f"checkpoint-{self.state.best_global_step}")
                    if best == place or best.is_dir():
                        self.state.best_model_checkpoint = str(best)
                        self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
                saving.rename_folder(unfinished / name, place)
        if self.args.should_save:
            rotate_checkpoints(str(place.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self._unfinished and self.is_fsdp_enabled and self.args.should_save:
            # A sharded checkpoint holds weights alone: with these beside them, merged ones are a model.
            for part in (self.model.config, self.model.generation_config, self.processing_class):
                part.save_pretrained(output_dir)

    def save_result(self) -> None:
        """Saves the model and its tokenizer to output_dir, each file in one step.

        Raises:
            SetupError: something could not be written.
        """
        with self._beside("the model") as unfinished:
            if self.is_fsdp_enabled:
                # FSDP trains fp32 copies of the weights; gathered on the first process, they get their own dtype back.
                state = self.accelerator.get_state_dict(self.model)
                state = {name: x.to(self._dtypes.get(name, x.dtype)) for name, x in state.items()}
                self._save(str(unfinished), state_dict=state)
            else:
                self.save_model(str(unfinished), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                saving.rename_files(unfinished, Path(self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.optim in optimizer.NAMES:
            model = self.model if model is None else model
            self.optimizer = optimizer.build(self.args, model.named_parameters(), self.get_decay_parameter_names(model))
            return self.optimizer
        return super().create_optimizer(model)

    def _in_backward(self) -> optimizer.AdamW8bit | None:
        """The optimizer, if it takes its steps in the backward pass."""
        own = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate has wrapped it
        return own if isinstance(own, optimizer.AdamW8bit) and own.in_backward else None

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, which Transformers would follow by one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if (own := self._in_backward()) is not None:
            own.accumulating = not self.accelerator.sync_gradients
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and (own := self._in_backward()) is not None:
            return own.grad_norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "loss_weights", "seq_lengths"]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """The sum of all weights in the step; None where there is no batch."""
        if not batch_samples:
            return None
        total = sum(batch["loss_weights"].sum() for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total / self.get_tp_size()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        weights = inputs.pop("loss_weights")[:, 1:]
        total = weights.sum() if num_items_in_batch is None else num_items_in_batch

        def weighted(**kwargs):
            """The model, whose log-probabilities come out with their shares of the step's weight."""
            output = model(**kwargs)
            if "log_probs" in output:
                # TRL divides by the number of labels, or by what it is told.
                count = output.label_mask.sum() if num_items_in_batch is None else 1
                output.log_probs = output.log_probs * (weights * (count / total))
            return output

        output = super().compute_loss(
            weighted, inputs, return_outputs, num_items_in_batch=None if num_items_in_batch is None else 1
        )
        if not self.model.training:
            loss = output[0] if return_outputs else output
            self._held_out = self._held_out + torch.stack([loss.detach().double() * total, total.double()])
        return output

    def evaluate(self, *args, **kwargs):
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        return super().evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "eval_loss" in logs:
            loss, weight = self.accelerator.reduce(self._held_out, "sum").tolist()
            logs["eval_loss"] = loss / weight
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Speed):
                    logs.update(callback.entries(self.state))
        super().log(logs, start_time)


def run(arguments: Arguments, callbacks: tuple[TrainerCallback, ...] = (), save: bool = True) -> Result:
    """Trains, and writes the model, its tokenizer, `log.jsonl` and `loss.png` to output_dir.

    Args:
        arguments: from `config.parse`.
        callbacks: more of them, for the trainer.
        save: False leaves the model and its tokenizer out, where only speed and memory matter.

    Raises:
        SetupError: whatever can be known to be wrong before the first step.
    """
    model_args, data_args, run_args, training = arguments.model, arguments.data, arguments.run, arguments.training
    check_engine(training)
    check_settings(arguments)
    check_processes(run_args.num_processes, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count())
    main = training.process_index == 0
    say = print if main else lambda *_: None
    checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint, run_args.overwrite, say)
    if run_args.verify:
        from ..verify import before_training  # it builds its trainer with this module

        before_training(arguments, say)

    random = model_args.model_init == "random"
    if random:
        use_shipped(arguments, say)
    set_seed(training.seed)
    tokenizer = load_tokenizer(
        model_args.tokenizer_name or model_args.model_name_or_path,
        conversation_date=data_args.conversation_date,
        revision="main" if model_args.tokenizer_name else model_args.model_revision,
    )
    held_out = training.eval_strategy != "no" or training.eval_on_start
    progress = main and not training.disable_tqdm
    train_split, test_split = load_splits(data_args, held_out=held_out, seed=training.seed, progress=progress)
    train_data, report = prepare(train_split, tokenizer, arguments, packing=training.packing, progress=progress)
    say(f"data: {data_args.dataset_name}\n  {report}")
    test_data = None
    if test_split is not None:
        packing = training.packing if training.eval_packing is None else training.eval_packing
        test_data, report = prepare(test_split, tokenizer, arguments, packing=packing, progress=progress)
        say(f"  {report}")
    model = make_model(arguments, tokenizer)

    speed = Speed(model)
    trainer = make_trainer(arguments, model, tokenizer, train_data, test_data, (speed, Sharding(), *callbacks))
    queries = torch.empty(0, device=training.device, dtype=torch.bfloat16 if training.bf16 else model.dtype)
    attention = f"attention {model_args.attn_implementation}"
    if model_args.attn_implementation == "gptoss_triton":
        attention += f" (backend {default_backend(queries)})"
    trained = sum(map(numel, filter(lambda p: p.requires_grad, trainer.model.parameters())))
    parameters = sum(map(numel, model.parameters())) + packed_parameters(model)
    say(f"model: {model_args.model_name_or_path}, {parameters:,} parameters, {trained:,} trained")
    say(f"trained: {', '.join(f'{part} {count:,}' for part, count in census(trainer.model).items())}")
    say(f"{attention}, {queries.dtype}, on {training.device}")
    bigram = bigram_entropy(train_data, test_data) if test_data else None

    def sample(when: str) -> None:
        if run_args.sample_prompt and main:
            text = reply(
                trainer.accelerator.unwrap_model(trainer.model),
                tokenizer,
                run_args.sample_prompt,
                system=run_args.sample_system,
                max_new_tokens=run_args.sample_tokens,
                rendering=data_args.rendering(),
            )
            say(f"\nsample {when} training\n  prompt: {run_args.sample_prompt}\n  reply:  {text}\n")

    sample("before")
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    steps_evaluated = {entry["step"] for entry in history if "eval_loss" in entry}
    if test_data and trainer.state.global_step not in steps_evaluated:
        trainer.evaluate()
    if save:
        trainer.save_result()
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    started = training.eval_on_start and evaluations
    result = Result(
        first_loss=evaluations[0] if started else None,
        last_loss=evaluations[-1] if evaluations else None,
        bigram=bigram,
        tokens_per_second=speed.tokens_per_second(),
        peak_memory=speed.peak_memory(),
    )
    if main:
        output = Path(training.output_dir)
        write_log(history, output / "log.jsonl")
        plot_loss(history, output / "loss.png", bigram=bigram)
    sample("after")
    summarize(result, attention, say)
    say(f"saved: {training.output_dir} ({'model, tokenizer, ' * save}loss.png, log.jsonl)")
    return result


def make_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The run's model, on the device where it will be trained unless ZeRO-3 or FSDP will spread it.

    Raises:
        SetupError: the model is no gpt-oss, it does not fit the tokenizer, the data or the GPU, or cannot be read.
    """
    args, training = arguments.model, arguments.training
    random = args.model_init == "random"
    name = args.model_name_or_path
    config = load_config(name, random=random, revision=args.model_revision)
    if config.model_type != "gpt_oss":
        raise SetupError(f"model_name_or_path: expected a gpt_oss model, {name} is a {config.model_type}")
    if len(tokenizer) > config.vocab_size:
        raise SetupError(
            f"tokenizer_name: {len(tokenizer)} tokens do not fit the model's vocabulary of {config.vocab_size}"
        )
    if (training.max_length or 0) > config.max_position_embeddings:
        raise SetupError(
            f"max_length: {name} knows {config.max_position_embeddings} positions, got {training.max_length}"
        )
    sharded = is_sharded(training)
    if random and sharded and args.use_peft:
        raise SetupError("model_init: random weights under adapters are made on one GPU; ZeRO-3 and FSDP spread others")
    packed = args.base_weights == "mxfp4"
    if packed and sharded:
        raise SetupError("base_weights: mxfp4 weights are not spread over GPUs; ZeRO-3 and FSDP need bf16")
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else getattr(config, "dtype", None) or torch.bfloat16
    if training.device.type == "cuda":
        parameters, kept = count_parameters(config), kept_dtype(training, dtype)
        trainable = 0 if args.use_peft else parameters
        hosts = training.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_host_memory(host_bytes(training, trainable) // hosts, psutil.virtual_memory().total)
        check_memory(
            count_packed_bytes(config, dtype)
            if packed
            else memory_floor(
                parameters,
                trainable,
                kept.itemsize,
                optimizer_state_bytes(training, kept),
                training.world_size if sharded else 1,
                gradient_bytes(training, kept),
            ),
            torch.cuda.mem_get_info(training.device)[0],
            "take a larger GPU, more of them with configs/zero3.yaml, or adapters (use_peft; base_weights mxfp4)",
        )
    implementations = {"attn_implementation": args.attn_implementation}
    if args.experts_implementation is not None:
        implementations["experts_implementation"] = args.experts_implementation
    if random:
        for token in ("bos", "eos", "pad"):
            setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
        if asked_for(training) == FSDP:
            return build_without_weights(config, training.device, dtype, **implementations)  # make_trainer fills it
        if sharded:
            return build_random_zero3(config, training.device, dtype, training.seed, **implementations)
        return build_random(config, training.device, dtype, training.seed, packed, **implementations)
    if packed:
        return load_packed(
            name,
            config,
            dtype=args.dtype if args.dtype == "auto" else dtype,
            revision=args.model_revision,
            device=training.device,
            **implementations,
        )
    if receives_weights(training) and not args.use_peft:
        # Transformers would dequantize MXFP4 on every process, and Accelerate copy it to fp32: 117 GiB each for 20b. In
        # the dtype that FSDP2 keeps, nothing has to be copied.
        return build_unfilled(config, kept_dtype(training, dtype), **implementations)
    return load_checkpoint(
        name,
        config,
        dtype=args.dtype if args.dtype == "auto" else dtype,
        revision=args.model_revision,
        device_map={"": training.device} if training.device.type == "cuda" and not sharded else None,
        **implementations,
        **(training.model_init_kwargs or {}),
    )


def make_trainer(
    arguments: Arguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    test_data: Dataset | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Trainer:
    """The run's trainer: the model of `make_model` with adapters, kernels, loss and recomputation as asked for."""
    model_args, training = arguments.model, arguments.training
    # What Trainer counts as tokens: padding excluded, whatever the collator.
    training.include_num_input_tokens_seen = "non_padding"
    training.model_init_kwargs = None  # make_model has used them
    if model_args.base_weights == "mxfp4":
        training.ddp_broadcast_buffers = False  # the packed weights are buffers, and nobody changes them
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_data,
        eval_dataset=test_data,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=list(callbacks),
    )
    if model_args.fused_layers:
        patch_gpt_oss(trainer.model, attention=False, experts=False)
        fuse_loss(model)
    elif model_args.base_weights == "mxfp4":  # PEFT's own adapters on experts need dense ones
        patch_gpt_oss(trainer.model, attention=False, experts=False, rms_norm=False, rope=False)
    if training.gradient_checkpointing and (training.gradient_checkpointing_kwargs or {}).get("use_reentrant") is False:
        tokens = training.per_device_train_batch_size * (training.max_length or model.config.max_position_embeddings)
        trainer.add_callback(Recomputation(model, arguments.run.recomputation, tokens))
    if model_args.model_init == "random" and asked_for(training) == FSDP:
        fill_fsdp2(model, trainer.accelerator, training.seed)
    return trainer


def use_shipped(arguments: Arguments, say) -> None:
    """Random weights know no language: give them the small tokenizer and data set that need no download."""
    given, model, data = arguments.on_command_line, arguments.model, arguments.data
    if model.tokenizer_name is None:
        model.tokenizer_name = SHIPPED_TOKENIZER
        say(f"model_init=random: tokenizer {SHIPPED_TOKENIZER} (--tokenizer_name chooses another)")
    # A file that asks for random weights chose its data for them; here the command line asked, and the file did not.
    if "model_init" in given and "dataset_name" not in given and data.dataset_name != SHIPPED_DATA:
        say(f"model_init=random: data set {SHIPPED_DATA} instead of {data.dataset_name} (--dataset_name keeps it)")
        data.dataset_name, data.dataset_config, data.test_split_size = SHIPPED_DATA, None, None
        data.dataset_train_split, data.dataset_test_split = "train", "test"


def summarize(result: Result, attention: str, say) -> None:
    unit = "nats per token"
    if result.last_loss is not None:
        start = "" if result.first_loss is None else f"{result.first_loss:.4f} at the start, "
        say(f"held-out loss: {start}{result.last_loss:.4f} at the end ({unit})")
        say(f"held-out bigram entropy: {result.bigram:.4f} ({unit}, Witten-Bell smoothing, same tokens)")
        if result.last_loss >= result.bigram:
            say("WARNING: the held-out loss did not get below the bigram entropy: train longer, or look at the data")
    memory = f"peak memory {result.peak_memory / 2**30:.2f} GiB"
    say(f"speed: {result.tokens_per_second:,.0f} tokens/s, {memory}, {attention}")
