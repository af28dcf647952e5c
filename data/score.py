"""Score models on the held-out problems: right answers, and reasoning in the language that was asked for.

    uv run python data/score.py data/tiny-gpt-oss outputs/sft_tiny

Each argument is a folder with a model, or with a LoRA adapter beside whose name the model stands. The language is
judged by py3langid, which had no part in making the data; digits are taken out first.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import gptoss_kernels  # noqa: E402, F401  (registers attn_implementation="gptoss_triton")
from gptoss_kernels.finetune.harmony import Rendering, prompt  # noqa: E402

CODES = {"en": "English", "es": "Spanish", "fr": "French", "de": "German", "it": "Italian"}
REPLY = re.compile(
    r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>"
    r"<\|start\|>assistant<\|channel\|>final<\|message\|>(.*?)<\|return\|>",
    re.DOTALL,
)


@dataclass(frozen=True)
class Reply:
    """What a model answered; analysis and final are None where the text is not a whole Harmony reply."""

    text: str
    analysis: str | None
    final: str | None


def read_rows(split: str = "test", folder: Path = HERE / "reasoning") -> list[dict]:
    """The rows of a split, as make_data.py wrote them."""
    with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ask(model, tokenizer, rows: Sequence[dict], *, batch_size: int = 50, max_new_tokens: int = 96) -> list[Reply]:
    """The model's greedy replies to the rows' questions, in their order, with a progress bar.

    Args:
        model: a causal language model of Transformers; its device is used.
        rows: with `messages`, whose last is the reply that is asked for.
        max_new_tokens: longest reply; those of the data set have up to 78.
    """
    from gptoss_kernels.finetune.sample import replies  # which needs TRL and PEFT

    prompts = [prompt(row["messages"][:-1], Rendering()) for row in rows]
    texts = replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [parse_reply(text) for text in texts]


def parse_reply(text: str) -> Reply:
    """A reply's channels."""
    match = REPLY.fullmatch(text)
    return Reply(text, *(match.groups() if match else (None, None)))


def is_right(row: dict, reply: Reply) -> bool:
    """Whether the last number of the final channel is the row's answer."""
    numbers = re.findall(r"\d+", reply.final or "")
    return bool(numbers) and numbers[-1] == row["answer"]


def language_of(text: str | None) -> str | None:
    """The language of a text as py3langid sees it among all that it knows; None for none of the five."""
    import py3langid

    return CODES.get(py3langid.classify(re.sub(r"\d+", "", text))[0]) if text else None


def score(rows: Sequence[dict], replies: Sequence[Reply]) -> dict[str, float]:
    """Shares, 0 to 1: `answers` right, reasoning in the language `asked` for, and both of them, `X answers` and
    `X asked`, for the rows that ask for reasoning in the language X. Without py3langid the languages are left out."""
    shares = {"answers": _share(map(is_right, rows, replies))}
    try:
        asked = [row["reasoning_language"] == language_of(r.analysis) for row, r in zip(rows, replies, strict=True)]
    except ModuleNotFoundError:
        print("py3langid is not installed: the language of reasoning is not judged")
        return shares
    shares["asked"] = _share(asked)
    for language in CODES.values():
        at = [i for i, row in enumerate(rows) if row["reasoning_language"] == language]
        shares[f"{language} answers"] = _share(is_right(rows[i], replies[i]) for i in at)
        shares[f"{language} asked"] = _share(asked[i] for i in at)
    return shares


def _share(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def table(scores: dict[str, dict[str, float]]) -> str:
    """The scores of several models as a Markdown table: right answers / reasoning in the language asked for."""
    columns = ["all", *CODES.values()]
    lines = ["| answers / language, % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, shares in scores.items():
        cells = []
        for column in columns:
            prefix = "" if column == "all" else f"{column} "
            pair = (shares.get(f"{prefix}answers"), shares.get(f"{prefix}asked"))
            cells.append(" / ".join("–" if share is None else f"{100 * share:.1f}" for share in pair))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load(path: Path, device: str):
    """The model and tokenizer of a folder, in fp32 on a CPU; an adapter is put on the model that it names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = path / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto" if device == "cuda" else torch.float32, attn_implementation="gptoss_triton"
    )
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path))
    return model.to(device), AutoTokenizer.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders that pretrain.py or sft.py wrote")
    parser.add_argument("--rows", type=int, help="ask only that many problems (default: all 400)")
    parser.add_argument("--batch_size", type=int, default=50, help="problems at a time (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, help="print that many replies a model")
    args = parser.parse_args()
    rows = read_rows()[: args.rows]
    scores = {}
    for path in args.models:
        model, tokenizer = load(path, "cuda" if torch.cuda.is_available() else "cpu")
        replies = ask(model, tokenizer, rows, batch_size=args.batch_size)
        for row, reply in list(zip(rows, replies, strict=True))[: args.show]:
            print(f"{row['developer']} | {row['user']}\n  -> {reply.text}")
        scores[str(path)] = score(rows, replies)
    print(table(scores))


if __name__ == "__main__":
    main()
