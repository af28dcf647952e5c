"""The look at what is trained: colours, brackets, escaping, document borders, counts, and the command."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gptoss_kernels.finetune import show
from gptoss_kernels.finetune.data import load_tokenizer
from gptoss_kernels.finetune.harmony import Encoded
from gptoss_kernels.finetune.packing import CHANNELS, Document, Report, build, truncate

ROOT = Path(__file__).resolve().parents[2]
# Text, channel and weight; a text in angle brackets and bars is a special token here.
QUESTION = [("<|start|>", "", 0.0), ("user", "", 0.0), ("<|message|>", "", 0.0), ("1 + 1?", "", 0.0)]
THINKING = [("<|channel|>", "analysis", 0.5), ("analysis", "analysis", 0.5), ("Two.", "analysis", 0.5)]
ANSWER = [("<|start|>", "final", 1.0), ("2", "final", 1.0), ("<|return|>", "final", 1.0)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("data/tokenizer", conversation_date="2025-06-28")


@pytest.fixture
def encode(tokenizer):
    """Makes an Encoded of pieces (text, channel, weight); `plain` turns the special tokens in them off."""

    def make(pieces, plain=False) -> Encoded:
        ids, weights, channels = [], [], []
        for text, channel, weight in pieces:
            if show.LOOKS_SPECIAL.fullmatch(text) and not plain:
                made = [tokenizer.convert_tokens_to_ids(text)]
            else:
                made = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            ids += made
            weights += [weight] * len(made)
            channels += [channel] * len(made)
        return Encoded(ids, weights, channels)

    return make


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Reader(HTMLParser):
    """Text, and the attributes of every <span> with a title, as a browser would read them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.tokens, self._title = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._title = dict(attrs) if tag == "span" and "title" in dict(attrs) else None
        if self._title:
            self.tokens.append([self._title, ""])

    def handle_data(self, data):
        if self._title:
            self.tokens[-1][1] += data

    def handle_endtag(self, tag):
        self._title = None


@pytest.fixture(autouse=True)
def terminal_of_many_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def printed(rows, tokenizer, file=None) -> str:
    file = file or io.StringIO()
    show.terminal(rows, tokenizer, file=file)
    return file.getvalue()


def styles(output: str) -> list[tuple[str, str]]:
    """(text, parameters of its escape sequence) of the coloured output, without the legend and the headers."""
    body = output.split("═══\n")[-1]
    return re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m|([^\x1b]+)", body, flags=re.DOTALL)


def packed(encoded, max_length):
    """The rows of `packing.build`, and the report."""
    documents = [
        Document(
            np.array(one.input_ids, dtype=np.int32),
            np.array([0.0, *one.weights[1:]], dtype=np.float32),
            np.array([CHANNELS.index(channel) for channel in one.channels], dtype=np.int8),
        )
        for one in encoded
    ]
    report = Report("train", conversations=len(encoded))
    return build(truncate(documents, max_length, report), True, report), report


def test_colour_is_the_channel_and_its_strength_the_weight(tokenizer, encode):
    half = [("<|start|>", "final", 0.5), ("3", "final", 0.5)]
    output = printed([encode(QUESTION + THINKING + ANSWER + half)], tokenizer, Terminal())
    found = [(plain or text, style) for style, text, plain in styles(output)]
    tint = {"analysis": "48;2;128;184;216", "final": "48;2;235;178;51", "half": "48;2;242;207;128"}
    assert found == [
        ("<|start|>", "1"),
        ("user", ""),
        ("<|message|>", "1"),
        ("1 + 1?", ""),
        ("<|channel|>", f"1;30;{tint['analysis']}"),
        ("analysisTwo.", f"30;{tint['analysis']}"),
        ("<|start|>", f"1;30;{tint['final']}"),
        ("2", f"30;{tint['final']}"),
        ("<|return|>", f"1;30;{tint['final']}"),
        ("<|start|>", f"1;30;{tint['half']}"),
        ("3", f"30;{tint['half']}"),
        ("\n", ""),
    ]
    legend = output.split("═══")[0]
    assert [name for name in ("analysis 0.5", "final 1", "final 0.5") if f" {name} " in legend] == re.findall(
        r"48;2;[\d;]+m (.*?) \x1b", legend
    )


@pytest.mark.parametrize("why", ["no terminal", "NO_COLOR", "16 colours", "dumb"])
def test_without_colour_brackets_name_channel_and_weight(tokenizer, encode, monkeypatch, why):
    if why == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    if why == "16 colours":
        monkeypatch.setenv("COLORTERM", "")
        monkeypatch.setenv("TERM", "xterm-16color")
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    file = io.StringIO() if why == "no terminal" else Terminal()
    output = printed([encode(QUESTION + THINKING + ANSWER)], tokenizer, file)
    assert "\x1b" not in output
    assert output.splitlines()[-1] == (
        "<|start|>user<|message|>1 + 1?⟦analysis 0.5│<|channel|>analysisTwo.⟧⟦final 1│<|start|>2<|return|>⟧"
    )


def test_text_that_looks_like_a_special_token_is_told_from_one(tokenizer, encode):
    pieces = [("say ", "", 0.0), ("<|end|>", "", 0.0)]
    assert printed([encode(pieces)], tokenizer).splitlines()[-1] == "say <|end|>"
    assert printed([encode(pieces, plain=True)], tokenizer).splitlines()[-1] == "say \\<|end|>"
    assert ("", "", "say <|end|>\n") in styles(printed([encode(pieces, plain=True)], tokenizer, Terminal()))
    for plain in (False, True):
        page = Reader(show.html([encode(pieces, plain)], tokenizer).body)
        assert any("outline" in attributes.get("style", "") for attributes, _ in page.tokens) is not plain


def test_nothing_in_the_data_steers_the_terminal_or_is_invisible(tokenizer, encode):
    output = printed(
        [encode([("a\x1b[2J\x07\r\x9b\u202eb\u200bc\x00d\te\n  f [red]g[/red] :smile:", "", 0.0)])], tokenizer
    )
    assert output.split("═══\n")[-1] == ("a\\x1b[2J\\x07\\r\\x9b\\u202eb\\u200bc\\x00d⇥e↵\n  f [red]g[/red] :smile:\n")


def test_long_lines_are_left_to_the_terminal_and_nothing_is_trimmed(tokenizer, encode):
    text = "word " * 100 + " " * 50
    assert printed([encode([(text, "", 0.0)])], tokenizer).split("═══\n")[-1] == text + "\n"


def test_characters_of_several_tokens_are_shown_whole(tokenizer, encode):
    text = "né 😀, 日本"
    document = encode([("x", "", 0.0), (text, "final", 1.0)])
    assert len(tokenizer("😀").input_ids) > 1
    (cells,) = show.documents(document, tokenizer)
    assert "".join(cell.text for cell in cells) == "x" + text
    assert [i for cell in cells for i in cell.ids] == document.input_ids
    assert [cell.position for cell in cells] == np.cumsum([0, *(len(cell.ids) for cell in cells[:-1])]).tolist()
    # Half a character, as truncation leaves it, and what follows it.
    broken = Encoded(tokenizer("😀").input_ids[:-1] + tokenizer("ab").input_ids, [0.0] * 99, [""] * 99)
    (cells,) = show.documents(broken, tokenizer)
    assert [i for cell in cells for i in cell.ids] == broken.input_ids
    assert cells[0].text == "\ufffd" and "".join(cell.text for cell in cells).endswith("ab")


def test_packed_documents_have_borders_and_positions_of_their_own(tokenizer, encode):
    one, two = encode(QUESTION + ANSWER), encode([("hello", "", 1.0)])
    rows, _ = packed([one, two], 64)
    assert len(rows) == 1
    lines = printed(list(rows), tokenizer).splitlines()
    sizes = len(one.input_ids), len(two.input_ids)
    assert f"═══ row 1 of 1: {sum(sizes)} tokens, 2 documents ═══" in lines
    border = lines.index(f"─── document 2 of 2: {sizes[1]} tokens ───")
    assert lines[border - 2 : border] == [
        f"─── document 1 of 2: {sizes[0]} tokens ───",
        "<|start|>user<|message|>1 + 1?⟦final 1│<|start|>2<|return|>⟧",
    ]
    # Nothing predicts the first token, so the weight that it was given does not count.
    first, rest = (tokenizer.decode(ids) for ids in (two.input_ids[:1], two.input_ids[1:]))
    assert lines[border + 1] == printed([two], tokenizer).splitlines()[-1] == f"{first}⟦text 1│{rest}⟧"
    page = show.html(list(rows), tokenizer).body
    assert page.count("document 1 of 2") == page.count("document 2 of 2") == 1
    assert page.count("position 0") == 2 and f"position {max(sizes)}" not in page


class Words:
    """A tokenizer of whole words, as large vocabularies have them for HTML."""

    added_tokens_decoder = {}
    words = ("<script>", "alert('&amp;')", "</script>", ' "', " <!--", "</div></span>", "&lt;", "\x00")

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids)


def test_html_escapes_everything():
    count = len(Words.words)
    page = Reader(show.html([Encoded(list(range(count)), [1.0] * count, ["final"] * count)], Words()).page())
    assert "script" not in page.tags and page.tags.count("div") == 2
    assert [text for _, text in page.tokens] == [*Words.words[:-1], "\\x00"]


def test_html_says_id_weight_channel_and_position(tokenizer, encode):
    document = encode(QUESTION + THINKING + ANSWER)
    page = Reader(show.html([document], tokenizer)._repr_html_())
    assert [attributes["title"] for attributes, _ in page.tokens] == [
        f"id {i}, weight {weight:g}, channel {channel or 'none'}, position {position}"
        for position, (i, weight, channel) in enumerate(
            zip(document.input_ids, document.weights, document.channels, strict=True)
        )
    ]
    alpha = [re.search(r"rgba\((.*),(.*)\)", attributes.get("style", "")) for attributes, _ in page.tokens]
    found = {(document.channels[i], match.groups()) for i, match in enumerate(alpha) if match}
    assert found == {("analysis", ("0,114,178", "0.32")), ("final", ("230,159,0", "0.52"))}
    assert [bool(match) for match in alpha] == [weight > 0 for weight in document.weights]


def test_statistics_of_rows_counted_by_hand():
    def document(length, **trained):
        weights, channels = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.int8)
        at = 1
        for channel, (count, weight) in trained.items():
            weights[at : at + count] = weight
            channels[at : at + count] = CHANNELS.index(channel)
            at += count
        return Document(np.arange(length, dtype=np.int32), weights, channels)

    documents = [
        document(10, analysis=(4, 0.5), final=(2, 1.0)),
        document(6, final=(5, 1.0)),
        document(4),  # nothing trained: left out
        document(30, commentary=(2, 2.0), analysis=(20, 0.5)),  # 14 beyond 16, of them 7 trained
    ]
    report = Report("train", conversations=3, skipped=["line 2: bad"])
    rows = build(truncate(documents, 16, report), True, report)
    found = show.statistics(rows, report)
    assert found.trained == {"analysis": 4 + 13, "commentary": 2, "final": 2 + 5}
    assert found.weight == {"analysis": 8.5, "commentary": 4.0, "final": 7.0}
    assert found.lengths == (4, 8.0, pytest.approx(27.0), 30)
    assert str(found).splitlines() == [
        "conversations            3  1 more skipped as bad rows",
        "examples                 3  1 more left out, of which nothing would be trained",
        "truncated                1  longer than 16 tokens; 14 tokens cut",
        "rows                     2  packed, 100.0% filled",
        "tokens                  32  an example: min 4, median 8, 95% 27, max 30",
        "trained                 26  81.2% of the tokens",
        "  analysis              17  53.1% of the tokens, 43.6% of all weight",
        "  commentary             2  6.2% of the tokens, 20.5% of all weight",
        "  final                  7  21.9% of the tokens, 35.9% of all weight",
    ]


@pytest.mark.parametrize(
    "lengths, scales",
    [
        ([5], "linear linear"),
        (range(50, 250), "linear linear"),
        ([1, 20], "log linear"),
        ([7] * 50 + [9], "linear log"),
    ],
)
def test_histogram_holds_every_length_and_marks_max_length(lengths, scales):
    figure = show.length_histogram(lengths, max_length=8)
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == len(lengths)
    for bar in axes.patches:
        inside = [n for n in lengths if bar.get_x() < n < bar.get_x() + bar.get_width()]
        assert bar.get_height() == len(inside)
    assert f"{axes.get_xscale()} {axes.get_yscale()}" == scales
    assert axes.get_xlabel() == "length of an example (tokens)" and axes.get_ylabel() == "examples (count)"
    (line,) = axes.lines
    assert list(line.get_xdata()) == [8, 8]
    longer = sum(n > 8 for n in lengths)
    assert line.get_label().startswith(f"max_length 8: {longer} example{'' if longer == 1 else 's'} longer")


@pytest.fixture
def run(shapes, dataset, tmp_path):
    """The arguments of a run on 120 of the shipped rows, and what is added to them."""

    def make(*more) -> list[str]:
        settings = {
            "model_name_or_path": shapes,
            "model_init": "random",
            "dataset_name": dataset,
            "output_dir": tmp_path / "run",
            "packing": "true",
            "max_length": 768,
            "disable_tqdm": "true",
        }
        return [f"--{key}={value}" for key, value in settings.items()] + list(more)

    return make


def test_the_command_shows_what_training_gets(run, settings, tmp_path, capsys):
    page, image = tmp_path / "rows.html", tmp_path / "lengths.png"
    show.main(run("--rows=2", "--html", str(page), "--histogram", str(image)))
    output = capsys.readouterr().out
    arguments = settings(max_length=768)
    tokenizer, rows, report = show.load(arguments, say=lambda text: None)
    assert str(show.statistics(rows, report)) in output
    drawn = re.search(r"rows (\d+), (\d+) of (\d+), drawn by seed 42", output)
    assert int(drawn[3]) == len(rows) < report.conversations == 120
    wanted = [rows[int(drawn[i]) - 1] for i in (1, 2)]
    assert output[output.index("loss: ") :].startswith(printed(wanted, tokenizer))
    assert (
        page.read_text(encoding="utf-8")
        == show.html(wanted, tokenizer, statistics=show.statistics(rows, report)).page()
    )
    assert image.read_bytes().startswith(b"\x89PNG")


def test_settings_on_the_command_line_count(run, capsys):
    show.main(run("--rows=1", "--end_token=end", "--channel_weights", '{"final": 0.25}'))
    shown = capsys.readouterr().out.split("document 1 of")[1]
    assert "⟦final 0.25│<|start|>assistant<|channel|>final<|message|>" in shown
    assert "<|end|>⟧" in shown and "<|return|>" not in shown and "⟦analysis" not in shown


def test_looking_needs_no_gpu(run, dataset, capsys):
    given = ["--config", str(ROOT / "configs" / "sft_lora.yaml"), "--tokenizer_name", "data/tokenizer"]
    show.main([*given, "--dataset_name", dataset, "--rows=0", "--disable_tqdm=true"])
    output = capsys.readouterr().out
    assert "conversations          120" in output and "loss:" not in output


@pytest.mark.parametrize(
    "more, code, message",
    [
        (["--row=1"], 2, "unknown key --row"),
        (["--rows=-1"], 2, "--rows: expected a number of rows, 0 or more, got '-1'"),
        (["--dataset_name=missing.jsonl"], f"{show.COMMAND}: error: dataset_name", ""),
        (["--html=missing/rows.html"], f"{show.COMMAND}: error: [Errno 2]", ""),
        (["--histogram=lengths.nothing"], f"{show.COMMAND}: error: histogram", ""),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, more, code, message, capsys):
    with pytest.raises(SystemExit) as error:
        show.main(run(*more))
    assert str(error.value.code).startswith(str(code))
    assert message in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(run):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *show.COMMAND.split()[1:], *run()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert process.stdout.readline().startswith("model_init=random: tokenizer data/tokenizer")
    process.stdout.close()
    error = process.stderr.read()
    assert "Traceback" not in error and "BrokenPipe" not in error
    assert process.wait() in (0, 1)
