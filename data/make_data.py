"""Make the data set and the tokenizer in this folder, from nothing but the sentence patterns in sentences.py.

    uv run python data/make_data.py            # writes data/reasoning/*.jsonl and data/tokenizer/

Every row is one word problem of two steps, asked in one language and reasoned about in another, which the developer
message names. Its answer is a number that the end of the reply can be checked against.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sentences import FINAL, GAIN, HOW_MANY, LANGUAGES, LOSE, NAMES, REASONING, SENTENCES, SPLITS, THEN, THINGS

HERE = Path(__file__).resolve().parent
SEED = 42
ROWS = {"test": 400, "train": 5000}
VOCAB_SIZE = 1536
TOKENIZER_ROWS = 4000
# The slots of a question's sentences, by family; a family is drawn first, so that each is as frequent as the others.
FAMILIES = {
    "story": ("have gain gain ask", "have gain lose ask", "have lose gain ask", "have lose lose ask"),
    "boxes": ("boxes gain ask", "boxes lose ask"),
    "share": ("share gain ask", "share lose ask"),
    "compare": ("have more both", "have less both"),
    "shop": ("price pay change",),
}
# English is what the small model reasons in before finetuning: asked for half as often as each other language.
ASKED_FOR = [language for language in LANGUAGES for _ in range(1 if language == "English" else 2)]
# Harmony's special tokens, by the names that gpt-oss uses. Padding is not the end of a reply: a loss that masks
# padding would otherwise never teach the model to stop.
BOS, PAD, EOS = "<|startoftext|>", "<|endoftext|>", "<|return|>"
SPECIAL_TOKENS = [
    BOS,
    PAD,
    EOS,
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]
IDENTITIES = ("You are ChatGPT, a large language model trained by OpenAI.", "You are a helpful assistant.")
HARMONY_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
HARMONY_TEXTS = [
    *IDENTITIES,
    "\nKnowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n",
    HARMONY_CHANNELS,
    *(f"# Instructions\n\nreasoning language: {language}\n\n" for language in LANGUAGES),
    *("system", "developer", "user", "assistant", "analysis", "commentary", "final", "low", "high"),
]


@dataclass(frozen=True)
class Problem:
    """A word problem without its words.

    Attributes:
        kind: the slots of the question's sentences, with spaces between them.
        numbers: of each sentence, in the order of kind: none, one or two.
        steps: (slot of REASONING, p, q, o) of each sentence that is reasoned about.
        answer: what is asked for, 2 to 99; never one of the question's numbers.
    """

    kind: str
    numbers: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[str, int, int, int], ...]
    answer: int


def draw_problem(rng: random.Random) -> Problem:
    """A problem with small numbers: every number and every intermediate result is between 2 and 99."""
    while True:
        kind = rng.choice(FAMILIES[rng.choice(list(FAMILIES))])
        problem = _solve(kind, rng)
        values = [value for _, *step in problem.steps for value in step]
        copied = problem.answer in [number for sentence in problem.numbers for number in sentence]
        if not copied and 2 <= min(values) and max(values) <= 99:
            return problem


def _solve(kind: str, rng: random.Random) -> Problem:
    slots, numbers, steps, value = kind.split(), [], [], 0
    for slot in slots:
        if slot == "have":
            value = first = rng.randint(5, 50)
            numbers.append((value,))
            steps.append((slot, value, value, value))
        elif slot in ("boxes", "price", "share"):
            p, q = rng.randint(2, 9), rng.randint(2, 9 if slot != "share" else 12)
            value = q if slot == "share" else p * q
            p, q = (p * q, p) if slot == "share" else (p, q)
            numbers.append((p, q))
            steps.append((slot, p, q, value))
        elif slot in ("gain", "lose", "more", "less"):
            change = rng.randint(2, 30)
            result = value + change if slot in ("gain", "more") else value - change
            numbers.append((change,))
            steps.append((slot, value, change, result))
            value = result
        elif slot == "both":
            numbers.append(())
            steps.append((slot, first, value, first + value))
        elif slot == "pay":
            paid = rng.randint(value + 2, 99) if value < 97 else 99
            numbers.append((paid,))
        elif slot == "change":
            numbers.append(())
            steps.append((slot, paid, value, paid - value))
        else:
            numbers.append(())
    return Problem(kind, tuple(numbers), tuple(steps), steps[-1][3])


@dataclass(frozen=True)
class Words:
    """Who and what a problem is about; things is a place in the lists of THINGS."""

    n: str
    m: str
    things: int


def draw_words(rng: random.Random) -> Words:
    return Words(*rng.sample(NAMES, 2), rng.randrange(len(THINGS["English"])))


def write_sentence(
    wordings: list[str],
    slot: str,
    numbers: tuple[int, ...],
    words: Words,
    language: str,
    rng: random.Random,
    edit: Callable[[str], str] = str,
) -> str:
    """One of a slot's wordings, changed by `edit`, with its names, things, numbers and verb."""
    things = THINGS[language][words.things]
    how = f"{HOW_MANY[language][words.things]} {things}"
    x, y = (*numbers, None, None)[:2]
    verb = rng.choice((GAIN if slot == "gain" else LOSE)[language])
    wording, then = edit(rng.choice(wordings)), rng.choice(THEN[language])
    return wording.format(
        n=words.n, m=words.m, t=things, x=x, y=y, v=verb, Then=then, how=how, How=how[0].upper() + how[1:]
    )


def write_question(problem: Problem, words: Words, language: str, splits: tuple[str, ...], rng) -> str:
    """The question in wordings of the splits."""
    return " ".join(
        write_sentence(find_wordings(language, slot, splits), slot, numbers, words, language, rng)
        for slot, numbers in zip(problem.kind.split(), problem.numbers, strict=True)
    )


def find_wordings(language: str, slot: str, splits: tuple[str, ...]) -> list[str]:
    return [wording for split in splits for wording in SENTENCES[language][slot][SPLITS[split]]]


def write_reasoning(problem: Problem, words: Words, language: str, style: int) -> str:
    """The steps to the answer in one of the two styles of REASONING."""
    patterns = REASONING[language]
    lines = [patterns[slot][style].format(n=words.n, m=words.m, p=p, q=q, o=o) for slot, p, q, o in problem.steps]
    return " ".join([*lines, patterns["end"][style].format(o=problem.answer)])


def write_final(problem: Problem, words: Words, language: str) -> str:
    """The reply; it ends with the answer and a full stop."""
    pattern = FINAL[language][problem.kind.split()[-1]]
    return pattern.format(n=words.n, m=words.m, t=THINGS[language][words.things], o=problem.answer)


def make_row(rng: random.Random, *splits: str) -> dict:
    """A row in the columns of Multilingual-Thinking, and what a checker needs."""
    problem, words = draw_problem(rng), draw_words(rng)
    language, reasoning_language = rng.choice(LANGUAGES), rng.choice(ASKED_FOR)
    developer = f"reasoning language: {reasoning_language}"
    user = write_question(problem, words, language, splits, rng)
    analysis = write_reasoning(problem, words, reasoning_language, rng.randrange(2))
    final = write_final(problem, words, language)
    return {
        "reasoning_language": reasoning_language,
        "developer": developer,
        "user": user,
        "analysis": analysis,
        "final": final,
        "messages": [
            {"role": "system", "content": developer},
            {"role": "user", "content": user},
            {"role": "assistant", "content": final, "thinking": analysis},
        ],
        "language": language,
        "kind": problem.kind,
        "answer": str(problem.answer),
    }


def make_rows() -> dict[str, list[dict]]:
    """The splits; no question occurs twice."""
    rng, seen = random.Random(SEED), set()
    splits = {}
    for split, size in ROWS.items():
        rows = []
        while len(rows) < size:
            row = make_row(rng, split)
            if row["user"] not in seen:
                seen.add(row["user"])
                rows.append(row)
        splits[split] = rows
    return splits


def make_tokenizer():
    """A byte-level BPE on what pretraining shows, digits one by one, with Harmony's special tokens and template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (HERE / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    rng = random.Random(SEED)
    rows = [make_row(rng, "pretraining", "train") for _ in range(TOKENIZER_ROWS)]
    texts = [row[column] for row in rows for column in ("user", "analysis", "final")]
    # The words that templates write must be learned too, as often as they write them.
    texts += HARMONY_TEXTS * len(rows)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),  # digits one by one, each with the space before it
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = template
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into (default: this one)")
    output = parser.parse_args().output
    (output / "reasoning").mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows().items():
        with open(output / "reasoning" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    make_tokenizer().save_pretrained(output / "tokenizer")


if __name__ == "__main__":
    main()
