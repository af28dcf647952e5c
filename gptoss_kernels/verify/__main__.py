"""Checks a training set-up in a minute or two, before it trains.

  python -m gptoss_kernels.verify                                      this package, LoRA and all weights
  python -m gptoss_kernels.verify --config configs/sft_lora.yaml       a run as sft.py would train it
  python -m gptoss_kernels.verify --model openai/gpt-oss-20b           in the real shapes, two layers
  python -m gptoss_kernels.verify --stock --attention eager            what TRL and Transformers do by themselves

A table of PASS, FAIL and n.a. (not applicable, or not to be judged before something else is right), each with the
measured figure, its limit and what to do. Exit code 0: no FAIL. 1: at least one. 2: it could not be checked here.
Weights are random; a model's name or folder gives the shapes.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

ATTENTION = ("gptoss_triton", "gptoss_fa4", "eager", "flex_attention", "flash_attention_4")
EXPERTS = ("gptoss_triton", "grouped_mm", "eager", "sonicmoe")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_kernels.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a configuration of sft.py; only what that run uses is judged")
    add("--model", metavar="PATH|NAME", help="shapes; default: the configuration's, or a small gpt-oss")
    add("--attention", choices=ATTENTION, help="attn_implementation; default: the configuration's, or gptoss_triton")
    add("--experts", choices=EXPERTS, help="experts_implementation; the same")
    add("--train", choices=["lora", "full", "both"], help="without --config: what is trained; default: both in turn")
    add("--stock", action="store_true", help="TRL's own auxiliary loss, and no layer of this package but those named")
    add("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    add("--seed", type=int, default=0, help="of weights and tokens")
    add("--json", metavar="FILE|-", help="where the verdict goes as JSON; -: to stdout, and the table to stderr")
    options = parser.parse_args(argv)
    if options.config and options.train:
        parser.error("--train: the configuration says what is trained")
    if options.stock and not options.config:
        options.experts = options.experts or "grouped_mm"
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process checks on one GPU
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.json != "-":
        return check(options)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries say things while they are imported
        return check(options, stdout)


def check(options: argparse.Namespace, stdout=None) -> int:
    """The exit code. stdout: where JSON goes for "-"."""

    def say(text: str) -> None:
        print(text, flush=True)

    # Imported here, so that --help need not wait for them.
    try:
        from ..finetune.errors import SetupError
        from .combination import settings
        from .report import as_json, verify
    except ModuleNotFoundError as error:
        say(f'error: verify: {error.name} is not installed; pip install "gptoss-kernels[training]"')
        return 2
    trained = ["lora", "full"] if options.train in (None, "both") else [options.train]
    if options.config:
        trained = [None]
    verdicts = []
    try:
        for what in trained:
            with tempfile.TemporaryDirectory() as folder:
                arguments = settings(
                    folder,
                    config=options.config,
                    device=options.device,
                    model=options.model,
                    attention=options.attention,
                    experts=options.experts,
                    trained=what,
                )
            if verdicts:
                say("")
            strict = options.config is not None
            verdicts.append(verify(arguments, strict=strict, stock=options.stock, seed=options.seed, say=say))
    except SetupError as error:
        say(f"error: {error}")
        return 2
    if options.json:
        text = as_json(verdicts) + "\n"
        stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
