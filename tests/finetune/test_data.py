"""What is read, what is said about malformed rows, what the tokenizer must be, and the bigram baseline."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from gptoss_kernels.finetune import data as data_module
from gptoss_kernels.finetune.bigram import bigram_entropy
from gptoss_kernels.finetune.config import DataArguments
from gptoss_kernels.finetune.data import encode, load_splits, load_tokenizer, pin_template, prepare, read
from gptoss_kernels.finetune.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "thinking": "Two.", "content": "2"}]}
TRAINED = "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>"
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-06-28\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)


@pytest.fixture
def write(tmp_path):
    """Writes a file of lines, or of bytes, and returns its path."""

    def make(name: str, *lines) -> Path:
        path = tmp_path / name
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        path.write_bytes(b"\n".join(encoded) + b"\n")
        return path

    return make


@pytest.fixture
def texts(tokenizer):
    """The text of every example of a file or data set, and what of it is trained, by weight."""

    def make(name, **keys) -> list[tuple[str, dict[float, str]]]:
        data = DataArguments(dataset_name=str(name), **keys)
        train, _ = load_splits(data, held_out=False)
        result = []
        for document in encode(train, tokenizer, data):
            weights = sorted(set(document.loss_weights.tolist()) - {0.0})
            trained = {w: tokenizer.decode(document.input_ids[document.loss_weights == w]) for w in weights}
            result.append((tokenizer.decode(document.input_ids), trained))
        return result

    return make


# ------------------------------------------------------------------------------------------------------ the tokenizer


def test_tokenizer_has_harmonys_tokens_and_loses_nothing(tokenizer):
    names = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call")
    for name in names:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"<|{name}|>")) == [f"<|{name}|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|return|>")
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("¿Cuántas cosas? Ça, c'est 3,14 €.", "\t日本語\n  two  spaces", "Äpfel 42"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_tokenizers_that_cannot_be_used(tmp_path):
    for name, said in ((str(tmp_path), "cannot load"), ("data/no-such", "there is no folder data/no-such")):
        with pytest.raises(SetupError, match=f"tokenizer_name: {said}"):
            load_tokenizer(name, conversation_date="2025-06-28")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # the rendering needs none
    tokenizer.save_pretrained(tmp_path / "same")
    with pytest.raises(SetupError, match="another one for padding"):
        load_tokenizer(str(tmp_path / "same"), conversation_date="2025-06-28")
    for path in (tmp_path / "same").glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<|channel|>", "<|chanel|>"), encoding="utf-8")
    with pytest.raises(SetupError, match=r"expected Harmony's special tokens, .* lacks <\|channel\|>"):
        load_tokenizer(str(tmp_path / "same"), conversation_date="2025-06-28")


# ------------------------------------------------------------------------------------------------------ kinds of rows


def test_conversation(write, texts):
    path = write("rows.jsonl", json.dumps(GOOD | {"answer": 3}))
    ((text, trained),) = texts(path)
    assert text == f"{SYSTEM}<|start|>user<|message|>1 + 1?<|end|><|start|>assistant{TRAINED}"
    assert trained == {1.0: TRAINED}
    ((_, trained),) = texts(path, channel_weights={"analysis": 0.5, "final": 2.0}, end_token="end")
    assert trained == {
        0.5: "<|channel|>analysis<|message|>Two.<|end|>",
        2.0: "<|start|>assistant<|channel|>final<|message|>2<|end|>",
    }
    ((text, _),) = texts(path, reasoning_effort="high", conversation_date="2024-01-31")
    assert "Current date: 2024-01-31\n\nReasoning: high" in text


def test_turns(write, texts):
    path = write("rows.jsonl", json.dumps({"messages": GOOD["messages"] * 2}))
    both = texts(path)
    assert len(both) == 2 and [trained for _, trained in both] == [{1.0: TRAINED}] * 2
    assert both[1][0].count("Two.") == 1, "earlier reasoning is gone"
    assert texts(path, train_turns="last") == both[1:]


def test_a_rows_own_settings(write, texts):
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    rows = [
        GOOD | {"reasoning_effort": "low", "tools": json.dumps(tools)},
        GOOD | {"reasoning_effort": None, "tools": None},
        GOOD | {"chat_template_kwargs": {"reasoning_effort": "high"}, "tools": tools},
    ]
    first, second, third = (text for text, _ in texts(write("rows.jsonl", *map(json.dumps, rows))))
    assert "Reasoning: low" in first and "Reasoning: medium" in second and "Reasoning: high" in third
    assert "type add" in first and "type add" not in second and "type add" in third


def test_prompt_and_completion_of_messages(write, texts):
    earlier = [*GOOD["messages"], {"role": "user", "content": "2 + 2?"}]
    row = {"prompt": earlier, "completion": [{"role": "assistant", "thinking": "Four.", "content": "4"}]}
    ((_, trained),) = texts(write("rows.jsonl", json.dumps(row)))
    assert trained == {1.0: TRAINED.replace("Two", "Four").replace(">2<", ">4<")}


def test_plain_text(write, texts):
    first, *_ = texts(write("a.jsonl", *(json.dumps({"text": text}) for text in ("1+2=3", "two"))))
    assert first == ("1+2=3<|return|>", {1.0: "+2=3<|return|>"}), "nothing predicts the first token"
    ((text, trained),) = texts(write("b.jsonl", json.dumps({"prompt": "2 + 2 =", "completion": " 4<|return|>"})))
    assert text == "2 + 2 = 4<|return|>" and trained == {1.0: " 4<|return|>"}


def test_special_tokens_in_text_are_text(write, texts, tokenizer):
    said = "Is <|end|><|start|>assistant a trick?"
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "Yes: <|return|>"}]}
    path = write("rows.jsonl", json.dumps(row))
    data = DataArguments(dataset_name=str(path))
    (document,) = encode(load_splits(data, held_out=False)[0], tokenizer, data)
    ids = Counter(document.input_ids.tolist())
    assert said in tokenizer.decode(document.input_ids)
    counts = {name: ids[tokenizer.convert_tokens_to_ids(f"<|{name}|>")] for name in ("start", "end", "return")}
    assert counts == {"start": 3, "end": 2, "return": 1}
    (document,) = encode(_split({"text": "a <|end|> b"}), tokenizer, DataArguments())
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in document.input_ids


def _split(*rows) -> data_module.Split:
    return data_module.Split("train", list(rows), [f"row {n}" for n in range(len(rows))])


# Multilingual-Thinking's columns, with made-up content.
COLUMNS = {
    "reasoning_language": "French",
    "developer": "You are a pirate.",
    "user": "Was ist 1 + 1?",
    "analysis": "Un et un font deux.",
    "final": "Zwei, arr.",
    "messages": [
        {"role": "system", "content": "reasoning language: French\n\nYou are a pirate.", "thinking": None},
        {"role": "user", "content": "Was ist 1 + 1?", "thinking": None},
        {"role": "assistant", "content": "Zwei, arr.", "thinking": "Un et un font deux."},
    ],
}


def test_multilingual_thinking_by_name(monkeypatch, texts):
    name = "HuggingFaceH4/Multilingual-Thinking"
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([COLUMNS] * 3)

    monkeypatch.setattr(data_module, "load_dataset", load)
    found = texts(name)
    assert asked == [((name, None), {"split": "train"})] and len(found) == 3
    text, trained = found[0]
    assert "# Instructions\n\nreasoning language: French\n\nYou are a pirate.\n\n<|end|>" in text
    assert trained == {1.0: TRAINED.replace("Two.", "Un et un font deux.").replace(">2<", ">Zwei, arr.<")}


def test_columns_are_a_conversation(write, texts, tmp_path):
    whole = texts(write("whole.jsonl", json.dumps(COLUMNS)))
    columns = {key: value for key, value in COLUMNS.items() if key != "messages"}
    assert texts(write("columns.jsonl", json.dumps(columns))) == whole
    with open(tmp_path / "columns.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerow(columns)
    assert texts(tmp_path / "columns.csv") == whole


def test_csv_with_json_line_breaks_and_a_long_cell(write, texts, tmp_path):
    long = 'a, "b"\n' * 20_000  # more than the reader's usual limit
    messages = [{"role": "user", "content": long}, {"role": "assistant", "content": "Ja\nnein"}]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "reasoning_effort"], [json.dumps(messages), ""], [json.dumps(messages), "low"]])
    first, second = texts(tmp_path / "rows.csv")
    assert long in first[0] and "Reasoning: medium" in first[0] and "Reasoning: low" in second[0]
    assert "Ja\nnein" in first[1][1.0]
    plain = write("plain.csv", "text", '"two', 'lines"')
    assert texts(plain)[0][0] == "two\nlines<|return|>"


# ----------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "expected a JSON object in UTF-8: Expecting property name"),
        (b'{"text": "\xff"}', "expected a JSON object in UTF-8: 'utf-8' codec can't decode byte 0xff in position 10"),
        ("[" * 100_000, "expected a JSON object in UTF-8"),
        ("[]", "expected a JSON object, got list"),
        ('{"conversation": []}', "expected `messages`, or `prompt` and `completion`, or `user` and `final`, or `text`"),
        ('{"text": "another kind"}', "expected messages as above, got ['text']"),
        ('{"messages": []}', "messages: expected a list of messages that is not empty, got []"),
        ('{"messages": null}', "messages: expected a list of messages that is not empty, got nothing"),
        ('{"messages": "hi"}', "messages: expected a list of messages"),
        ('{"messages": ["hi"]}', "messages[0]: expected an object with role and content, got 'hi'"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "messages[0].role: expected system"),
        ('{"messages": [{"content": "hi"}]}', "messages[0].role: expected system"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content: expected a string, got 3"),
        ('{"messages": [{"role": "user", "content": " "}]}', "messages[0].content: expected text that is not empty"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content: expected valid Unicode"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "messages: expected a user message and the assistant's"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "channel": "x"}]}',
            "messages[1].channel: expected analysis, commentary or final, got 'x'",
        ),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "thinking": 1}]}',
            "messages[1].thinking: expected a string, got 1",
        ),
        (json.dumps(GOOD | {"reasoning_effort": "huge"}), "reasoning_effort: expected low, medium or high, got 'huge'"),
        (json.dumps(GOOD | {"chat_template_kwargs": {"x": 1}}), "chat_template_kwargs: expected reasoning_effort and"),
        (json.dumps(GOOD | {"tools": "["}), "tools: expected a list or its JSON"),
    ],
)
def test_malformed_row(write, tokenizer, line, said):
    path = write("rows.jsonl", json.dumps(GOOD), line, "", json.dumps(GOOD))
    data = DataArguments(dataset_name=str(path))
    with pytest.raises(SetupError) as error:
        encode(load_splits(data, held_out=False)[0], tokenizer, data)
    assert str(error.value).startswith(f"{path}, line 2: ") and said in str(error.value)

    data = DataArguments(dataset_name=str(path), bad_rows="skip")
    split, _ = load_splits(data, held_out=False)
    assert len(encode(split, tokenizer, data)) == 2
    assert len(split.skipped) == 1 and split.skipped[0].startswith(f"{path}, line 2: ") and said in split.skipped[0]
    assert split.places == [f"{path}, line 1", f"{path}, line 4"] and split.rows == [GOOD, GOOD]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": 3}, "text: expected a string, got 3"),
        ({"text": ""}, "text: expected a string that is not empty"),
        ({"text": "a\ud800"}, "text: expected valid UTF-8, got something else at character 1"),
        ({"text": "<|start|>user<|message|>hi<|end|>"}, "got a rendered conversation; give its messages"),
        ({"prompt": "a", "completion": None}, "expected two strings or two lists of messages, got one of each"),
        ({"prompt": "a", "completion": ""}, "completion: expected a string that is not empty"),
        ({"prompt": "a", "completion": GOOD["messages"]}, "prompt, completion: expected two strings or two lists"),
        ({"prompt": GOOD["messages"][:1], "completion": []}, "completion: expected a list of messages that is not"),
        ({"user": "a", "final": ""}, "final: expected a string that is not empty, got ''"),
        ({"user": None, "final": "b"}, "user: expected a string that is not empty, got None"),
    ],
)
def test_malformed_row_of_another_kind(tokenizer, row, said):
    with pytest.raises(SetupError) as error:
        encode(_split(row), tokenizer, DataArguments())
    assert str(error.value).startswith("row 0: ") and said in str(error.value)


@pytest.mark.parametrize(
    "line, said",
    [
        ("a,b,c", "expected 2 cells, got 3"),
        ("a", "expected 2 cells, got 1"),
        ('"a"b,c', "expected comma-separated values"),
        (b",\xff", "text: expected valid UTF-8"),
        ("[,a", "tools: expected JSON, got '['"),
    ],
)
def test_malformed_line_of_a_csv_file(write, line, said):
    path = write("rows.csv", "tools,text", ',"two', 'lines"', line, ",last")
    with pytest.raises(SetupError) as error:
        read(path)
    assert f"rows.csv, line 4: {said}" in str(error.value)
    split = read(path, bad_rows="skip")
    assert [row["text"] for row in split.rows] == ["two\nlines", "last"] and len(split.skipped) == 1
    assert split.places == [f"{path}, line 2", f"{path}, line 5"]


def test_nothing_is_left(write, settings, tokenizer):
    path = write("rows.jsonl", "{", "[]")
    with pytest.raises(SetupError, match=r"holds no rows but bad ones, the first of them .*line 1"):
        read(path, bad_rows="skip")
    path = write("rows.jsonl", json.dumps({"messages": [GOOD["messages"][0], {"role": "assistant", "content": "2"}]}))
    arguments = settings(dataset_name=str(path), channel_weights='{"analysis": 1}')
    split, _ = load_splits(arguments.data, held_out=False)
    with pytest.raises(SetupError, match="(?s)nothing of the train split .*left out: 1 examples without a token"):
        prepare(split, tokenizer, arguments, packing=True)


def test_plain_text_has_no_assistant(write, settings, tokenizer):
    path = write("rows.jsonl", json.dumps({"text": "one two"}))
    for key in ("assistant_only_loss", "completion_only_loss"):
        arguments = settings(dataset_name=str(path), **{key: "true"})
        split, _ = load_splits(arguments.data, held_out=False)
        with pytest.raises(SetupError, match=f"{key}: expected conversations .*, got rows of `text`"):
            prepare(split, tokenizer, arguments, packing=True)


# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"dataset_name": None}, "dataset_name: expected a .jsonl or .csv file"),
        ({"dataset_name": "no/such.jsonl"}, "there is no file or folder no/such.jsonl"),
        ({"dataset_name": "data/reasonig"}, "there is no file or folder data/reasonig"),
        ({"dataset_name": "data/reasoning", "dataset_test_split": "dev"}, "dev.jsonl (or .csv) is missing; "),
        ({"dataset_name": "data/reasoning/train.jsonl"}, "set test_split_size"),
        ({"dataset_name": "data/reasoning", "test_split_size": 1.5}, "test_split_size: expected a share"),
    ],
)
def test_missing_data(keys, said):
    with pytest.raises(SetupError) as error:
        load_splits(DataArguments(**keys), held_out=True)
    assert said in str(error.value)


def test_files_without_rows(tmp_path):
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(SetupError, match="holds no rows"):
            read(tmp_path / name)


def test_splits(dataset):
    train, test = load_splits(DataArguments(dataset_name=dataset), held_out=True)
    assert (len(train.rows), len(test.rows)) == (120, 30)
    assert load_splits(DataArguments(dataset_name=dataset), held_out=False)[1] is None
    one_file = DataArguments(dataset_name=f"{dataset}/train.jsonl", test_split_size=0.25)
    train, test = load_splits(one_file, held_out=True)
    assert (len(train.rows), len(test.rows)) == (90, 30) and not set(train.places) & set(test.places)
    assert load_splits(one_file, held_out=True)[1].places == test.places
    assert load_splits(one_file, held_out=True, seed=1)[1].places != test.places


def test_prepared_rows(settings, tokenizer):
    arguments = settings(max_length=256)
    split, _ = load_splits(arguments.data, held_out=False)
    dataset, report = prepare(split, tokenizer, arguments, packing=True)
    assert report.conversations == 120 and report.packed and report.rows == len(dataset)
    assert sum(len(row["seq_lengths"]) for row in dataset) == report.examples
    for row in dataset:
        assert len(row["input_ids"]) == len(row["loss_weights"]) == len(row["channels"]) == row["seq_lengths"].sum()
        assert len(row["input_ids"]) <= 256
        trained = row["loss_weights"] > 0
        assert set(row["channels"][trained]) <= {1, 3} and not row["channels"][~trained].all()


def test_show_is_the_one_command():
    for argv in ([], ["--config", "configs/sft_tiny.yaml"]):
        with pytest.raises(SystemExit, match="gptoss_kernels.finetune.data show --config FILE"):
            data_module.main(argv)


# --------------------------------------------------------------------------------------------------------- the bigram


def test_bigram_entropy_equals_a_count_by_hand():
    # Two documents in the first row; the test row's last token is not scored, its fifth follows an unseen token.
    train = Dataset.from_list(
        [
            {"input_ids": [1, 2, 3, 1, 2], "loss_weights": [0.0, 1, 1, 0, 0], "seq_lengths": [3, 2]},
            {"input_ids": [2, 3, 3], "loss_weights": [0.0, 1, 1], "seq_lengths": [3]},
        ]
    )
    ids, weights = [1, 2, 2, 4, 3, 3], [0.0, 0.5, 0, 1, 2, 0]
    test = Dataset.from_list([{"input_ids": ids, "loss_weights": weights, "seq_lengths": [2, 4]}])

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
    scored = ((0.5, 1, 2), (1, 2, 4), (2, 4, 3))
    expected = -sum(w * math.log(bigram(a, b)) for w, a, b in scored) / 3.5
    assert math.isclose(bigram_entropy(train, test), expected, rel_tol=1e-12)
