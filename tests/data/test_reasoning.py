"""The word problems: right, reproducible, worded otherwise in the test split, and not to be had by copying."""

import collections
import random
import re
from pathlib import Path

import corpus
import make_data
import pytest
import score
import sentences
from transformers import AutoTokenizer

from gptoss_kernels.finetune.harmony import Rendering, encode, render

DATA = Path(__file__).resolve().parents[2] / "data"
# A reader's own list of what the verbs do, not the one that the data was made from.
GIVES = """buys finds receives wins collects compra encuentra recibe gana recoge achète trouve reçoit gagne ramasse
    kauft findet bekommt gewinnt sammelt trova riceve vince raccoglie""".split()
TAKES = """gives loses sells lends throws regala pierde vende presta tira donne perd vend prête jette verschenkt
    verliert verkauft verleiht zerstört perde butta""".split()
SHARED = "equal|same number|igual|mismo número|égales|même nombre|gleich|uguali|stesso numero"
FEWER = r"\b(fewer|menos|moins|weniger|meno)\b"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: score.read_rows(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "tokenizer")


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def solve(question: str) -> int:
    """The answer, from the question's words alone."""
    numbers = numbers_in(question)
    if re.search(r"\beuros?\b", question, re.IGNORECASE):
        items, price, paid = numbers
        return paid - items * price
    if len({name for name in sentences.NAMES if re.search(rf"\b{name}\b", question)}) == 2:
        first, change = numbers
        return 2 * first + (-change if re.search(FEWER, question) else change)
    base, value = [], None
    for sentence in re.split(r"(?<=[.?])\s", question):
        inside, words = numbers_in(sentence), set(re.findall(r"\w+", sentence))
        gives, takes = words & set(GIVES), words & set(TAKES)
        if len(inside) == 1 and (gives or takes):
            assert not (gives and takes), sentence
            if value is None:
                value = total(base, question)
            value += inside[0] if gives else -inside[0]
        else:
            assert value is None or not inside, sentence
            base += inside
    return value


def total(base: list[int], question: str) -> int:
    if len(base) == 1:
        return base[0]
    first, second = base
    if re.search(SHARED, question):
        assert first % second == 0
        return first // second
    return first * second


def test_answers_are_right(splits):
    for row in splits["train"] + splits["test"]:
        assert solve(row["user"]) == int(row["answer"]), row["user"]


def test_every_step_is_right_and_leads_to_the_answer(splits):
    for row in splits["train"] + splits["test"]:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["analysis"])
        for left, sign, right, result in steps:
            a, b = int(left), int(right)
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign], row["analysis"]
        assert len(steps) == 2 and steps[-1][-1] == row["answer"]
        assert numbers_in(row["analysis"])[-1] == int(row["answer"]) and row["final"].endswith(f" {row['answer']}.")


def test_rows_are_what_the_script_makes(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_data.py", "--output", str(tmp_path)])
    make_data.main()
    for split in ("train", "test"):
        path = Path("reasoning") / f"{split}.jsonl"
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes()
    made, shipped = (AutoTokenizer.from_pretrained(folder / "tokenizer") for folder in (tmp_path, DATA))
    assert made.get_vocab() == shipped.get_vocab() and made.chat_template == shipped.chat_template


def test_columns_and_sizes(splits):
    assert len(splits["train"]) >= 5000 and len(splits["test"]) >= 300
    for row in splits["train"] + splits["test"]:
        assert list(row)[:6] == ["reasoning_language", "developer", "user", "analysis", "final", "messages"]
        assert row["messages"] == [
            {"role": "system", "content": row["developer"]},
            {"role": "user", "content": row["user"]},
            {"role": "assistant", "content": row["final"], "thinking": row["analysis"]},
        ]
        assert row["developer"] == f"reasoning language: {row['reasoning_language']}"
    for rows in splits.values():
        pairs = collections.Counter((row["language"], row["reasoning_language"]) for row in rows)
        assert len(pairs) == 25 and len({row["kind"] for row in rows}) == 11
        english = sum(row["reasoning_language"] == "English" for row in rows) / len(rows)
        assert english < 0.2, "a model that always reasons in English is right less often than that"


def pattern_of(sentence: str) -> str:
    """A sentence without what all wordings share: names, numbers, things, verbs and words of time."""
    words = [*sentences.NAMES]
    for table in (sentences.THINGS, sentences.GAIN, sentences.LOSE, sentences.THEN, sentences.HOW_MANY):
        words += [word for language in table.values() for word in language]
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(r"\d+", "#", re.sub(rf"\b({alternatives})\b", "_", sentence))


def patterns_in(text: str) -> set[str]:
    return {pattern_of(sentence) for sentence in re.split(r"(?<=[.?!])\s", text)}


def test_wordings_of_the_test_split_are_shown_nowhere_else(splits):
    places = [set(range(8)[split]) for split in sentences.SPLITS.values()]
    assert set.union(*places) == set(range(8)) and sum(map(len, places)) == 8
    for language, slots in sentences.SENTENCES.items():
        wordings = [wording for slot in slots.values() for wording in slot]
        assert len(wordings) == 12 * 8, language
        shared = {slots["gain"][0]} & {slots["lose"][0]}  # the verb decides
        assert len(set(wordings)) == len(wordings) - len(shared), language
        for slot, eight in slots.items():
            shown = corpus.WORDINGS[language][slot]
            assert not set(eight[sentences.SPLITS["test"]]) & set(shown), (language, slot)
            assert set(eight) - set(eight[sentences.SPLITS["test"]]) <= set(shown) and len(shown) >= 20

    test = set().union(*(patterns_in(row["user"]) for row in splits["test"]))
    assert len(test) > 5 * 12
    assert not test & set().union(*(patterns_in(row["user"]) for row in splits["train"]))
    rng = random.Random(0)
    seen = set()
    for _ in range(6000):
        seen |= patterns_in(re.sub(r"<\|\w+\|>|\n", " ", "".join(corpus.make_document(rng))))
    assert not test & seen
    train = set().union(*(patterns_in(row["user"]) for row in splits["train"]))
    assert len(train & seen) > 0.9 * len(train), "the comparison would find a wording that is shown"


def test_no_question_occurs_twice(splits):
    questions = [row["user"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_guessing_and_copying_score_below_5_percent(splits):
    rows = splits["test"]
    constant = collections.Counter(row["answer"] for row in splits["train"] + rows)
    best = max(sum(row["answer"] == answer for row in rows) for answer in constant)
    assert best / len(rows) < 0.05
    numbers = [numbers_in(row["user"]) for row in rows]
    for place in (*range(3), -1, -2):
        copied = sum(
            str(found[place]) == row["answer"] for found, row in zip(numbers, rows, strict=True) if found[place:]
        )
        assert copied / len(rows) < 0.05
    any_number = sum(int(row["answer"]) in found for found, row in zip(numbers, rows, strict=True))
    assert any_number / len(rows) <= 0.05


def test_reasoning_is_in_the_language_asked_for(splits):
    for row in splits["test"] + splits["train"][:500]:
        assert score.language_of(row["analysis"]) == row["reasoning_language"], row["analysis"]
        assert len(re.findall(r"\.( |$)", row["analysis"])) >= 2


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_has_harmonys_tokens_and_loses_nothing(tokenizer, splits):
    for token in make_data.SPECIAL_TOKENS:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(token)) == [token]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
    )
    assert len(tokenizer) == make_data.VOCAB_SIZE
    texts = ["¿Cuántas cosas? Ça, c'est 3,14 €.", "\t日本語\n  two  spaces", "Äpfel 42"]
    texts += [row[column] for row in splits["test"][:100] for column in ("user", "analysis", "final")]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [token.strip("Ġ") for token in tokenizer.tokenize("12 + 345")] == ["1", "2", "+", "3", "4", "5"]


def test_chat_template_says_what_training_says(tokenizer, splits):
    for row in splits["test"][:50]:
        (example,) = render(row, Rendering())
        text = "".join(span.text for span in example)
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == text
        assert tokenizer.apply_chat_template(row["messages"]).input_ids == encode(example, tokenizer).input_ids


def test_folder_is_small():
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size < 12_000_000


# ----------------------------------------------------------------------------------------------------------- scoring


def harmony(analysis: str, final: str) -> score.Reply:
    return score.parse_reply(
        f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    )


def test_scores_of_known_replies(splits):
    rows = splits["test"]
    shares = score.score(rows, [harmony(row["analysis"], row["final"]) for row in rows])
    assert set(shares.values()) == {1.0}
    english = "At the beginning there is something, and then we calculate."
    shares = score.score(rows, [harmony(english, "The answer is 1.") for _ in rows])
    assert shares["answers"] == 0 and shares["English asked"] == 1 and shares["German asked"] == 0
    assert shares["asked"] == sum(row["reasoning_language"] == "English" for row in rows) / len(rows)
    half = [harmony(row["analysis"], row["final"] if i % 2 else "?") for i, row in enumerate(rows)]
    assert score.score(rows, half)["answers"] == 0.5
    assert "| all | English |" in score.table({"a model": shares}) and "| a model | 0.0 / " in score.table(
        {"a model": shares}
    )


@pytest.mark.parametrize(
    "text",
    ["", "The answer is 5.", "<|channel|>final<|message|>5.<|return|>", "<|channel|>analysis<|message|>5 is it."],
)
def test_a_reply_that_is_not_whole_is_wrong(text):
    reply = score.parse_reply(text)
    assert reply.final is None and not score.is_right({"answer": "5"}, reply)
    assert score.language_of(reply.analysis) is None


def test_answer_is_the_last_number_of_the_reply_alone():
    assert score.is_right({"answer": "5"}, harmony("7", "Of 12 there are 5."))
    assert not score.is_right({"answer": "5"}, harmony("5", "There are 5 or 15."))
    assert not score.is_right({"answer": "5"}, harmony("5", "There are some."))
