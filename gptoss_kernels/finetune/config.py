"""Every setting of a finetuning run: dataclasses, and a parser that lets no unknown key and no wrong value through."""

import difflib
import json
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from . import engine, optimizer
from .harmony import Rendering

# What PEFT is told of each part: linear layers for attention, parameters for the others.
LORA_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "router": ["mlp.router.weight"],
}


@dataclass
class ModelArguments(ModelConfig):
    """Which model, how it is loaded, and its adapters: TRL's ModelConfig and a few keys more."""

    attn_implementation: str = field(
        default="gptoss_triton",
        metadata={
            "help": "Attention: gptoss_triton, gptoss_fa4 (FlashAttention-4, where it is installed, for rows without "
            "padding), or any name that Transformers knows. Packing needs an exact one."
        },
    )
    experts_implementation: str | None = field(
        default="gptoss_triton",
        metadata={"help": "Mixture of experts: gptoss_triton, or any name that Transformers knows; none: its choice."},
    )
    fused_layers: bool = field(
        default=True,
        metadata={
            "help": "RMSNorm, rotary embedding, plain LoRA and the loss through this package's kernels, where they run "
            "on Triton. The numbers are the same but for rounding."
        },
    )
    model_init: str = field(
        default="pretrained",
        metadata={
            "help": "'pretrained' loads a checkpoint; 'random' builds the shapes of configs/models/NAME.json (or of "
            "the config.json that model_name_or_path points to) without one, on the GPU if there is one.",
            "choices": ["pretrained", "random"],
        },
    )
    base_weights: str = field(
        default="bf16",
        metadata={
            "help": "The experts' weights under adapters: 'bf16' dequantizes an MXFP4 checkpoint on load; 'mxfp4' "
            "keeps it as it is, a quarter of the memory, and dequantizes a layer when it computes. The numbers are the "
            "same.",
            "choices": ["mxfp4", "bf16"],
        },
    )
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which parts get adapters: attention (q, k, v, o), experts (both projections, an adapter for each "
            "expert), router. In the place of lora_target_modules and lora_target_parameters.",
            "choices": ["attention", "experts", "router"],
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer, a name or a folder. Default: the model's own; data/tokenizer for random ones."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_targets is None:
            return
        for key in ("lora_target_modules", "lora_target_parameters"):
            if getattr(self, key) is not None:
                raise ValueError(f"lora_targets: expected without {key}, which names the same, got both")
        parameters = [
            name for part in ("experts", "router") if part in self.lora_targets for name in LORA_TARGETS[part]
        ]
        if parameters and self.lora_dropout:
            raise ValueError(
                f"lora_dropout: expected 0 with adapters on experts or router (PEFT has none), got {self.lora_dropout}"
            )
        self.lora_target_modules = LORA_TARGETS["attention"] if "attention" in self.lora_targets else None
        self.lora_target_parameters = parameters or None


@dataclass
class DataArguments:
    """Which conversations, and how they are rendered."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl or .csv file, a folder with SPLIT.jsonl or SPLIT.csv files, or the name of a data set on "
            "the Hub. Rows hold `messages`, or `prompt` and `completion`, or `user` and `final`, or `text`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share of the train split to hold out, for data without a test split. Between 0 and 1."},
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "What a malformed row does: error stops before training and says where it is; skip leaves it out, "
            "counted and reported.",
            "choices": ["error", "skip"],
        },
    )
    channel_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Weight of a token's loss by its channel, for instance {analysis: 0.5, final: 1.0}; a channel left "
            "out weighs 0. Default: 1 for analysis, commentary and final."
        },
    )
    train_turns: str = field(
        default="all",
        metadata={
            "help": "Which of the assistant's turns are trained: all, each an example of its own in the context that "
            "it would really have had (no reasoning of earlier turns), or the last one.",
            "choices": ["all", "last"],
        },
    )
    end_token: str = field(
        default="return",
        metadata={
            "help": "What ends a trained turn: return, after which generation stops, or end, as in the history.",
            "choices": ["return", "end"],
        },
    )
    reasoning_effort: str = field(
        default="medium",
        metadata={
            "help": "Reasoning effort in the system message; a row's own `reasoning_effort` wins.",
            "choices": ["low", "medium", "high"],
        },
    )
    conversation_date: str = field(
        default="2025-06-28",
        metadata={"help": "Date in the system message. Fixed, so that a run trains on the same text tomorrow."},
    )

    def __post_init__(self):
        if isinstance(self.channel_weights, str):  # as the command line has it
            self.channel_weights = json.loads(self.channel_weights)
        self.rendering()  # raises what is wrong with it

    def rendering(self) -> Rendering:
        """How conversations become text and loss weights."""
        weights = {} if self.channel_weights is None else {"channel_weights": self.channel_weights}
        return Rendering(
            turns=self.train_turns,
            end_token=self.end_token,
            reasoning_effort=self.reasoning_effort,
            conversation_date=self.conversation_date,
            **weights,
        )


@dataclass
class RunArguments:
    """What happens around the training loop."""

    num_processes: int | None = field(
        default=None,
        metadata={"help": "Number of processes this configuration is for; another number is an error. Default: any."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start anew where output_dir holds an earlier run, and delete its checkpoints."},
    )
    recomputation: str = field(
        default="auto",
        metadata={
            "help": "With gradient_checkpointing, what is computed again: lean: all but the routing; fast: nothing; "
            "auto: as little as the GPU's memory allows: attention is kept first, then the experts, then whole layers.",
            "choices": ["lean", "auto", "fast"],
        },
    )
    sample_prompt: str | None = field(
        default=None, metadata={"help": "Question to answer before and after training, as a look at the model."}
    )
    sample_system: str | None = field(default=None, metadata={"help": "System prompt that goes with sample_prompt."})
    sample_tokens: int = field(default=128, metadata={"help": "Longest sample, in tokens."})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's SFTConfig with two more optimizers, and no auxiliary router loss unless it is asked for."""

    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "Optimizer: any name that Transformers knows; adamw_8bit_sr: AdamW with moments in 8 bits and bf16 "
            "weights rounded stochastically; adamw_8bit_sr_in_backward: the same, applied in the backward pass, so "
            "that gradients never exist together (one process, max_grad_norm 0)."
        },
    )

    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the router's load-balancing loss. 0 turns it off, whatever the checkpoint's config "
            "says (gpt-oss's carries 0.9, which would swamp the loss)."
        },
    )

    def __post_init__(self):
        engine.check_hardware(self)
        own = self.optim if self.optim in optimizer.NAMES else None
        if own is not None:
            self.optim = "adamw_torch"  # Transformers takes no name but its own
        super().__post_init__()
        if own is not None:
            self.optim = own


@dataclass
class Arguments:
    """All settings of a run, and the names of those that were given on the command line."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: TrainingArguments
    on_command_line: frozenset[str] = frozenset()


GROUPS = {"model": ModelArguments, "data": DataArguments, "run": RunArguments, "training": TrainingArguments}

# Keys of earlier versions, which the nearest name would explain wrongly.
RENAMED = {
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of all steps",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "overwrite",
}


def parse(argv: list[str]) -> Arguments:
    """Settings from `--config FILE` and `--key value` or `--key=value`, the command line winning.

    Args:
        argv: the command line without the program's name.

    Raises:
        SystemExit: with code 2 and one line on stderr that names the key, for an unknown, misspelt, abbreviated or
            repeated key, a value of the wrong type, one that is not among the choices, an unreadable file, or
            settings that contradict each other.
    """
    parser = _Parser()
    given = parser.keys_of(argv)
    config_file = parser.parse_known_args(argv)[0].config
    tokens, from_file = [], set()
    if config_file is not None:
        parser.source = f"{config_file}: "
        tokens = parser.tokens_from_yaml(config_file)
        parser.parse_args(tokens)
        from_file = parser.keys_of(tokens)
    parser.source = ""
    if "output_dir" not in given | from_file:
        parser.error("output_dir: expected a folder for the result, got nothing")
    try:
        *groups, _ = parser.parse_args_into_dataclasses([*tokens, *argv], look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:  # from the dataclasses' own checks
        parser.error(" ".join(str(error).split()))
    arguments = Arguments(**dict(zip(GROUPS, groups, strict=True)), on_command_line=frozenset(given))
    return arguments


class _Parser(TrlParser):
    """TrlParser without its leniency: no abbreviations, and YAML values checked like those of the command line."""

    def __init__(self):
        super().__init__(
            list(GROUPS.values()), prog="sft.py", allow_abbrev=False, add_help=False, conflict_handler="error"
        )
        self.add_argument("--config", default=None, metavar="FILE", help="YAML file with any of the keys below")
        self.source = ""
        self._keys = {name: group for group in GROUPS.values() for name in (f.name for f in fields(group) if f.init)}

    def error(self, message: str) -> typing.NoReturn:
        # One line: argparse's usage message would list some 150 keys first.
        self.exit(2, f"sft.py: error: {self.source}{message}\n")

    def keys_of(self, argv: list[str]) -> set[str]:
        """The keys named on a command line, all of them known."""
        given = set()
        for token in argv:
            if not token.startswith("--"):
                continue
            option = token.partition("=")[0]
            if option not in self._option_string_actions:
                self._unknown(option[2:].replace("-", "_"), "--")
            given.add(self._option_string_actions[option].dest)
        return given

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected {' '.join(rest)!r}: expected --key value or --key=value")
        for name in namespace.__dict__:
            value = getattr(namespace, name)
            if name in self._keys and isinstance(value, str) and dict in _accepted(self._keys[name], name):
                self._check_json(name, value)
        return namespace, rest

    def tokens_from_yaml(self, path: str) -> list[str]:
        """A YAML file's keys as command-line tokens, so that one parser checks both."""
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        except OSError as error:
            self.source = ""
            self.error(f"config: cannot read {path}: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(" ".join(str(error).split()))
        if not isinstance(content, dict):
            self.error(f"expected a mapping of keys to values, got {type(content).__name__}")
        tokens = []
        for key, value in content.items():
            if key not in self._keys:
                self._unknown(str(key), "")
            tokens += self._tokens(key, value)
        return tokens

    def _tokens(self, key: str, value) -> list[str]:
        accepted = _accepted(self._keys[key], key)
        if value is None:
            if type(None) not in accepted:
                self.error(f"{key}: expected a value, got null")
            # "none" is how TrlParser spells None where a string could not be meant.
            return [] if self.get_default(key) is None else [f"--{key}=none"]
        if isinstance(value, dict):
            if dict not in accepted:
                self.error(f"{key}: expected a single value, got a mapping")
            return [f"--{key}={json.dumps(value)}"]
        if isinstance(value, list):
            action = self._option_string_actions[f"--{key}"]
            if action.nargs != "+" or any(isinstance(item, (dict, list)) for item in value) or not value:
                self.error(
                    f"{key}: expected {'a list of values' if action.nargs == '+' else 'a single value'}, got {value}"
                )
            return [f"--{key}", *(_text(item) for item in value)]
        if isinstance(value, (bool, int, float)) and dict in accepted:
            self.error(f"{key}: expected a mapping, got {value!r}")
        if isinstance(value, bool) and bool not in accepted and str not in accepted:
            self.error(f"{key}: expected {_names(accepted)}, got {value!r}")
        return [f"--{key}={_text(value)}"]

    def _check_json(self, key: str, value: str) -> None:
        if Path(value).is_file():
            return  # deepspeed, fsdp_config and accelerator_config may name one
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            self.error(f"{key}: expected a JSON object, got {value!r}")

    def _unknown(self, key: str, dashes: str) -> typing.NoReturn:
        if key in RENAMED:
            self.error(f"unknown key {dashes}{key}: it is now {RENAMED[key]}")
        near = difflib.get_close_matches(key, [*self._keys, "config"], n=1, cutoff=0.0)
        self.error(f"unknown key {dashes}{key}; the nearest valid one is {dashes}{near[0]}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; plain YAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _accepted(group: type, key: str) -> set[type]:
    """The plain types that a key's annotation allows."""
    hint = typing.get_type_hints(group)[key]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {typing.get_origin(option) or option for option in options}


def _names(accepted: set[type]) -> str:
    return " or ".join(sorted(t.__name__ for t in accepted if t is not type(None)))


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text() -> str:
    """Every key with its default, one block a group."""
    lines = []
    for group in GROUPS.values():
        lines.append(f"\n{group.__name__}")
        for f in fields(group):
            if f.init:
                text = " ".join(str(f.metadata.get("help", "")).split())
                lines.append(f"  {f.name}: {text}")
    return "\n".join(lines)
