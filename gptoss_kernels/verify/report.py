"""Runs all checks on a combination, and shows what they found."""

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from ..backends import default_backend
from ..finetune.config import Arguments
from ..finetune.errors import SetupError
from ..integrations.transformers import NAME
from ..provenance import provenance
from .checks import FAIL, PASS, Row, run_checks
from .combination import combine
from .stack import Stack


@dataclass
class Verdict:
    """What the checks of one combination found.

    heading: what was checked, two lines. device: "cpu" or "cuda". seconds: of building and checking it.
    """

    heading: str
    device: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAIL]

    @property
    def passed(self) -> bool:
        return not self.failures

    def summary(self) -> str:
        counts = [sum(row.status == status for row in self.rows) for status in (PASS, FAIL)]
        return f"{counts[0]} PASS, {counts[1]} FAIL, {len(self.rows) - sum(counts)} n.a., {self.seconds:.0f} s"


def verify(
    arguments: Arguments,
    *,
    strict: bool = True,
    stock: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Checks a run's combination on a small model of the same shapes, with random weights.

    Args:
        arguments: as `config.parse` reads them; not changed.
        strict: judge only what the run uses (its form of batches); otherwise packing and padding both.
        stock: the loss and layers as TRL and Transformers have them by themselves.
        seed: of weights, tokens and loss weights: the same seed gives the same inputs on one kind of device.
        say: gets the heading, and the table's lines as they are found.

    Returns:
        The verdict. The state of torch's random generators is as it was before.

    Raises:
        SetupError: the combination cannot be built here (a package or a GPU is missing), or is not one that is checked.
    """
    start = time.perf_counter()
    devices = [arguments.training.device] if arguments.training.device.type == "cuda" else []
    with contextlib.ExitStack() as context:
        folder = context.enter_context(tempfile.TemporaryDirectory())
        context.enter_context(torch.random.fork_rng(devices))
        context.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of what the run itself will warn about
        context.enter_context(_without_tf32())
        try:
            combination = combine(arguments, folder, strict=strict, stock=stock, seed=seed)
            say(heading := _heading(combination))
            stack = Stack(combination)
        except SetupError:
            raise
        except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, OSError) as error:
            raise SetupError(f"verify: this combination does not run here: {_line(error)}") from error
        verdict = Verdict(heading, stack.device.type)
        verdict.rows = run_checks(stack, lambda row: say(_line_of(row)))
    verdict.seconds = time.perf_counter() - start
    say(f"{verdict.summary()}")
    return verdict


def before_training(arguments: Arguments, say: Callable[[str], None] = print) -> None:
    """Checks the run that is about to start.

    Raises:
        SetupError: a check failed, or none can be made.
    """
    verdict = verify(arguments, say=say)
    if verdict.failures:
        names = ", ".join(row.check for row in verdict.failures)
        raise SetupError(f"verify: {names} failed (see the table above); without verify the run would start anyway")


def as_json(verdicts: list[Verdict]) -> str:
    """Verdicts with where they come from, as one JSON object."""
    device = torch.device(verdicts[0].device)
    return json.dumps(
        {
            "passed": all(verdict.passed for verdict in verdicts),
            "provenance": provenance(device),
            "verdicts": [
                {
                    "heading": verdict.heading,
                    "passed": verdict.passed,
                    "seconds": round(verdict.seconds, 1),
                    "checks": [asdict(row) for row in verdict.rows],
                }
                for verdict in verdicts
            ],
        },
        indent=1,
    )


@contextlib.contextmanager
def _without_tf32():
    """Products in fp32 are in fp32: what is compared with is made of them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _heading(combination) -> str:
    args, trainer = combination.arguments.model, combination.trainer
    device, dtype = trainer.args.device, trainer.model.dtype
    if trainer.args.bf16 and dtype != torch.bfloat16:
        dtype = f"{dtype}, autocast to torch.bfloat16"
    attention = args.attn_implementation
    queries = torch.empty(0, device=device, dtype=torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype)
    if attention == NAME:
        attention += f" ({default_backend(queries)})"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    trained = f"LoRA r={args.lora_r}" if args.use_peft else "all weights"
    form = "packed rows" if combination.joined else "padded rows"
    config = trainer.model.config
    shapes = (
        f"{combination.name}, random weights, {config.num_hidden_layers} layers, {config.num_local_experts} experts, "
        f"window {config.sliding_window}"
    )
    return (
        f"attention {attention}, experts {args.experts_implementation or 'by default'}, {trained}, {form}, "
        f"{'MXFP4 experts, ' if args.base_weights == 'mxfp4' else ''}{str(dtype).replace('torch.', '')} on {where}\n"
        f"{'; '.join([shapes, *combination.notes])}"
    )


def _line_of(row: Row) -> str:
    line = f"{row.status:4}  {row.check:18}  {row.measured}"
    line += f"  (limit {row.limit})" if row.limit and row.status else ""
    return f"{line}\n      -> {row.advice}" if row.advice else line


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
