"""The shipped data and tokenizer, what is said about malformed rows, and the bigram baseline."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from gptoss_kernels.finetune.config import DataArguments
from gptoss_kernels.finetune.data import bigram_entropy, load_splits, load_tokenizer, pin_template, read_rows
from gptoss_kernels.finetune.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "thinking": "Two.", "content": "2"}]}
SYSTEM = (
    "<|start|>system<|message|>You are a helpful assistant.\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("data/tokenizer", conversation_date="2025-06-28")


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_data", ROOT / "data" / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped(split: str) -> list[dict]:
    return [json.loads(line) for line in open(ROOT / "data" / "reasoning" / f"{split}.jsonl", encoding="utf-8")]


def test_shipped_rows_are_what_the_script_makes(maker):
    assert maker.make_rows() == {split: shipped(split) for split in ("test", "train")}


def test_shipped_rows_are_checkable_and_held_out():
    questions = {split: [row["messages"][1]["content"] for row in shipped(split)] for split in ("train", "test")}
    assert not set(questions["train"]) & set(questions["test"])
    rows = shipped("train") + shipped("test")
    assert len({row["language"] for row in rows}) == 5 and len({row["kind"] for row in rows}) == 5
    for row in rows:
        system, user, assistant = row["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert system["content"] == f"reasoning language: {row['language']}"
        assert assistant["content"].endswith(f" {row['answer']}.") and row["answer"] in assistant["thinking"]


def test_answers_are_right():
    # Recomputed from the question's own numbers, not from the script's values.
    for row in shipped("test"):
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in row["messages"][1]["content"]).split()]
        if row["kind"] == "story":
            expected = numbers[0] + numbers[1] - numbers[2]
        elif row["kind"] == "boxes":
            expected = numbers[0] * numbers[1]
        elif row["kind"] == "ages":
            expected = numbers[0] + numbers[1]
        elif row["kind"] == "sequence":
            expected = numbers[-1] + numbers[1] - numbers[0]
        else:
            continue
        assert int(row["answer"]) == expected


def test_shipped_files_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 3_000_000


def test_tokenizer_has_harmonys_tokens_and_loses_nothing(tokenizer):
    names = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call")
    for name in names:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"<|{name}|>")) == [f"<|{name}|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|return|>")
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("¿Cuántas cosas? Ça, c'est 3,14 €.", "\t日本語\n  two  spaces", "Äpfel 42"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_renders_harmony(tokenizer):
    system = {"role": "system", "content": "reasoning language: English"}
    asked = SYSTEM + (
        "<|start|>developer<|message|># Instructions\n\nreasoning language: English<|end|>"
        "<|start|>user<|message|>1 + 1?<|end|>"
    )
    messages = [system, *GOOD["messages"]]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == asked + (
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2<|return|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == asked + "<|start|>assistant"
    other = tokenizer.apply_chat_template(
        messages, tokenize=False, reasoning_effort="high", conversation_date="2024-01-31"
    )
    assert "Current date: 2024-01-31\n\nReasoning: high" in other


def test_template_drops_the_reasoning_of_earlier_turns_and_its_loss(tokenizer):
    messages = GOOD["messages"] + [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "thinking": "Four.", "content": "4"},
    ]
    output = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.decode(output["input_ids"])
    assert "Two." not in text and "<|channel|>final<|message|>2<|end|>" in text
    trained = [i for i, on in zip(output["input_ids"], output["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == (
        "<|channel|>analysis<|message|>Four.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


def test_gpt_oss_template_is_pinned_and_takes_null(tokenizer):
    from trl.chat_template_utils import gptoss_chat_template

    template = pin_template(gptoss_chat_template, "2020-02-29")
    messages = [
        {"role": "user", "content": "1 + 1?", "thinking": None},
        {"role": "assistant", "content": "2", "thinking": None},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "Current date: 2020-02-29\n" in text and "strftime_now" not in template
    assert (
        text.endswith("<|start|>assistant<|channel|>final<|message|>2<|return|>") and "analysis<|message|>" not in text
    )
    messages[1]["thinking"] = "Two."
    assert "analysis<|message|>Two.<|end|>" in tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: expected a JSON object, got list"),
        ('{"conversation": []}', "line 2: expected `messages`, or `prompt` and `completion`, or `text`"),
        ('{"messages": []}', "line 2: messages: expected a list of messages that is not empty"),
        ('{"messages": "hi"}', "line 2: messages: expected a list of messages"),
        ('{"messages": ["hi"]}', "line 2: messages[0]: expected an object with role and content, got str"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "messages[0].role: expected one of system"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content: expected a string, got 3"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "the last role to be 'assistant', got 'user'"),
        (
            '{"messages": [{"role": "assistant", "content": "hi", "thinking": 1}]}',
            "messages[0].thinking: expected a string or null, got 1",
        ),
        ('{"text": "another kind"}', "line 2: expected messages as above"),
        ('{"text": 3}', "line 2: text: expected a string"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "line 2: prompt, completion"),
    ],
)
def test_malformed_row(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(SetupError, match="rows.jsonl, line 2") as error:
        read_rows(path)
    assert said in str(error.value)


def test_well_formed_rows_of_each_kind(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in (GOOD, {"text": "hi"}, {"prompt": "a", "completion": "b"}):
        path.write_text(json.dumps(row | {"answer": 3}) + "\n\n" + json.dumps(row) + "\n")
        assert read_rows(path) == [row, row]


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"dataset_name": None}, "dataset_name: expected a .jsonl file"),
        ({"dataset_name": "no/such.jsonl"}, "there is no file or folder no/such.jsonl"),
        ({"dataset_name": "data/reasonig"}, "there is no file or folder data/reasonig"),
        ({"dataset_name": "data/reasoning", "dataset_test_split": "dev"}, "dev.jsonl is missing; "),
        ({"dataset_name": "data/reasoning/train.jsonl"}, "set test_split_size"),
        ({"dataset_name": "data/reasoning", "test_split_size": 1.5}, "test_split_size: expected a share"),
    ],
)
def test_missing_data(keys, said):
    with pytest.raises(SetupError) as error:
        load_splits(DataArguments(**keys), held_out=True)
    assert said in str(error.value)


def test_empty_file(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(SetupError, match="holds no rows"):
        load_splits(DataArguments(dataset_name=str(tmp_path)), held_out=False)


def test_splits(dataset):
    train, test = load_splits(DataArguments(dataset_name=dataset, reasoning_effort="high"), held_out=True)
    assert (len(train), len(test)) == (120, 30) and train.column_names == ["messages", "chat_template_kwargs"]
    assert train[0]["chat_template_kwargs"] == {"reasoning_effort": "high", "conversation_date": "2025-06-28"}
    assert load_splits(DataArguments(dataset_name=dataset), held_out=False)[1] is None
    one_file = DataArguments(dataset_name=f"{dataset}/train.jsonl", test_split_size=0.25)
    train, test = load_splits(one_file, held_out=True)
    assert (len(train), len(test)) == (90, 30)


def test_tokenizers_that_cannot_be_used(tmp_path):
    with pytest.raises(SetupError, match="tokenizer_name: cannot load"):
        load_tokenizer(str(tmp_path), conversation_date="2025-06-28")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "same")
    with pytest.raises(SetupError, match="another one for padding"):
        load_tokenizer(str(tmp_path / "same"), conversation_date="2025-06-28")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(SetupError, match="no chat template"):
        load_tokenizer(str(tmp_path / "plain"), conversation_date="2025-06-28")


def test_bigram_entropy_equals_a_count_by_hand():
    # Two documents in the first row; the last token of the test row is masked, its fifth follows an unseen token.
    train = Dataset.from_list(
        [
            {"input_ids": [1, 2, 3, 1, 2], "labels": [1, 2, 3, 1, 2], "seq_lengths": [3, 2]},
            {"input_ids": [2, 3, 3], "labels": [2, 3, 3], "seq_lengths": [3]},
        ]
    )
    ids = [1, 2, 2, 4, 3, 3]
    test = Dataset.from_list([{"input_ids": ids, "labels": [*ids[:-1], -100], "seq_lengths": [2, 4]}])

    steps = [(1, 2), (2, 3), (1, 2), (2, 3), (3, 3)]
    pairs, before, after = Counter(steps), Counter(a for a, _ in steps), Counter(b for _, b in steps)
    vocabulary = range(5)

    def unigram(b):
        return (after[b] + 1) / (len(steps) + len(vocabulary))

    def bigram(a, b):
        if a not in before:
            return unigram(b)
        kinds = len({y for x, y in pairs if x == a})
        return (pairs[a, b] + kinds * unigram(b)) / (before[a] + kinds)

    for a in vocabulary:
        assert math.isclose(sum(bigram(a, b) for b in vocabulary), 1)
    expected = -sum(math.log(bigram(a, b)) for a, b in ((1, 2), (2, 4), (4, 3))) / 3
    assert math.isclose(bigram_entropy(train, test), expected, rel_tol=1e-12)
