"""Wrong attempts at chapter 09's exercises get the message that names them; other ways to be right are accepted."""

import copy
from itertools import accumulate

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_09


def rejected(function, name, message):
    function.__name__ = name
    with pytest.raises(check.Mistake, match=message):
        check.attempt(function, chapter=9, strict=True)


def accepted(function, name):
    function.__name__ = name
    assert check.attempt(function, chapter=9, strict=True) is function


@pytest.mark.parametrize("name", ["loss_weights", "training_examples", "best_fit", "boundaries"])
def test_the_solution_is_accepted(name):
    accepted(getattr(chapter_09, name), name)


# ------------------------------------------------------------------------------------------------- loss_weights


def reply_at(tokens):
    return chapter_09.loss_weights(tokens).index(1.0)


def assistants(tokens):
    role, found = None, []
    for i, token in enumerate(tokens):
        role = tokens[i + 1] if token == "<|start|>" else role
        found.append(float(role == "assistant"))
    return found


def content_only(tokens):
    inside, found = False, []
    for i, token in enumerate(tokens):
        inside = inside and token not in ("<|end|>", "<|return|>")
        found.append(float(inside and i >= reply_at(tokens)))
        inside = inside or token == "<|message|>"
    return found


def by_the_text(tokens):
    """Looks for the characters, which a question may hold as well."""
    for i in range(len(tokens)):
        if "".join(tokens[: i + 1]).endswith("<|start|>assistant"):
            return [float(j > i) for j in range(len(tokens))]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t: [float(i >= reply_at(t) - 2) for i in range(len(t))], "the end of the prompt"),
        (lambda t: [float(i >= reply_at(t) - 1) for i in range(len(t))], "one place too early"),
        (lambda t: [float(i > reply_at(t)) for i in range(len(t))], "the first token that the model writes"),
        (content_only, "only the text carries loss"),
        (
            lambda t: [float(i >= reply_at(t) and x not in ("<|end|>", "<|return|>")) for i, x in enumerate(t)],
            "would not learn to stop",
        ),
        (
            lambda t: [float(i >= len(t) - 1 - t[::-1].index("<|channel|>")) for i in range(len(t))],
            "only the final channel",
        ),
        (lambda t: [1.0] * len(t), "everything carries loss"),
        (lambda t: [0.0] * len(t), "nothing carries loss"),
        (lambda t: [1 - w for w in chapter_09.loss_weights(t)], "the wrong way round"),
        (assistants, "the end of the prompt"),
        (
            lambda t: [w * (i >= t.index("assistant") + 1) for i, w in enumerate(assistants(t))],
            "a second turn, whose first is context",
        ),
        (by_the_text, "a second turn"),
        (
            lambda t: by_the_text(t) if "|" in t else chapter_09.loss_weights(t),
            "a question that holds the characters of a special token",
        ),
        (lambda t: chapter_09.loss_weights(t)[1:], r"expected a weight for each of \d+ tokens, got"),
        (lambda t: reply_at(t), "expected a list of numbers, got int"),
        (lambda t: [2 * w for w in chapter_09.loss_weights(t)], "expected 1.0, got 2.0"),
    ],
)
def test_loss_weights(wrong, message):
    rejected(lambda tokens: wrong(tokens), "loss_weights", message)


def test_loss_weights_in_other_words():
    def backwards(tokens):
        weights, seen = [], False
        for i in reversed(range(len(tokens))):
            role = tokens[i + 1 : i + 2] if tokens[i] == "<|start|>" else []
            seen = seen or role == ["user"]
            weights.append(not seen)
        weights.reverse()
        first = weights.index(True)
        at = first + tokens[first:].index("<|start|>")
        return torch.tensor([i > at + 1 for i in range(len(tokens))])

    accepted(backwards, "loss_weights")


# -------------------------------------------------------------------------------------------- training_examples

right = chapter_09.training_examples


def without(messages, *keys):
    return [{k: v for k, v in m.items() if k not in keys} for m in messages]


def in_place(messages):
    examples = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            examples.append(copy.deepcopy(messages[: i + 1]))
            message.pop("thinking")
    return examples


def emptied(messages):
    return [
        [{**m, "thinking": ""} if m["role"] == "assistant" and i < len(e) - 1 else m for i, m in enumerate(e)]
        for e in right(messages)
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: [m[: i + 1] for i, x in enumerate(m) if x["role"] == "assistant"], "still has its reasoning"),
        (lambda m: [without(e, "thinking") for e in right(m)], "the trained reply lost its reasoning"),
        (lambda m: right(m)[-1:], "only the last turn"),
        (lambda m: [m], "one example for the whole conversation"),
        (in_place, "has changed"),
        (emptied, "leave the key"),
        (lambda m: [e[-2:] for e in right(m)], "the earlier turns are gone"),
        (lambda m: [[x for x in e if x["role"] != "system"] for e in right(m)], "system message is missing"),
        (lambda m: right(m) + ([m] if m[-1]["role"] == "user" else []), "ends with the reply that is trained"),
        (lambda m: right(m)[:1], "expected 3 examples"),
        (lambda m: [], "expected 1 examples, got none"),
        (lambda m: None, "expected a list of conversations"),
        (lambda m: [x for e in right(m) for x in e], "expected a list of conversations"),
        (lambda m: [e[:-1] + without(e[-1:], "content") for e in right(m)], "example 0: expected"),
    ],
)
def test_training_examples(wrong, message):
    rejected(lambda messages: wrong(messages), "training_examples", message)


def test_training_examples_in_other_words():
    def sliced(messages):
        ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        return tuple((*without(messages[:i], "thinking"), messages[i]) for i in ends)

    accepted(sliced, "training_examples")


# ------------------------------------------------------------------------------------------------------ best_fit


def fit(order, choose, fits=lambda gap, n: gap >= n, last_only=False):
    def attempt(lengths, capacity):
        rows, gaps = [], []
        for i in order(lengths):
            among = range(len(rows))[-1:] if last_only else range(len(rows))
            fitting = [r for r in among if fits(gaps[r], lengths[i])]
            if not fitting:
                rows.append([])
                gaps.append(capacity)
                fitting = [len(rows) - 1]
            row = choose(fitting, gaps)
            rows[row].append(i)
            gaps[row] -= lengths[i]
        return rows

    return attempt


def longest(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def smallest_gap(fitting, gaps):
    return min(fitting, key=lambda r: gaps[r])


def sorts_what_it_was_given(lengths, capacity):
    rows = chapter_09.best_fit(lengths, capacity)
    lengths.sort(reverse=True)
    return rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (fit(lambda x: range(len(x)), smallest_gap), "taken as they come: the longest first"),
        (fit(lambda x: longest(x)[::-1], smallest_gap), "the shortest document came first"),
        (fit(longest, lambda f, g: f[0]), "that is first fit"),
        (fit(longest, lambda f, g: max(f, key=lambda r: g[r])), "that is worst fit"),
        (fit(longest, smallest_gap, lambda gap, n: gap > n), "compare with >=, not >"),
        (fit(longest, smallest_gap, last_only=True), "only the last row was looked at"),
        (fit(lambda x: range(len(x)), smallest_gap, last_only=True), "as they come, and only the last row"),
        (fit(lambda x: range(len(x)), lambda f, g: f[0]), "as they come"),
        (fit(longest, smallest_gap, lambda gap, n: gap > 0), "a row holds"),
        (lambda x, c: [[i] for i in range(len(x))], "a row of its own"),
        (lambda x, c: [[x[i] for i in row] for row in chapter_09.best_fit(x, c)], "the rows hold lengths"),
        (lambda x, c: [row[:1] for row in chapter_09.best_fit(x, c)], "is in no row"),
        (lambda x, c: [*chapter_09.best_fit(x, c), [0]], "in two rows"),
        (lambda x, c: [*chapter_09.best_fit(x, c), []], "a row is empty"),
        (lambda x, c: len(chapter_09.best_fit(x, c)), "expected a list of rows"),
        (sorts_what_it_was_given, "has changed"),
    ],
)
def test_best_fit(wrong, message):
    rejected(lambda lengths, capacity: wrong(lengths, capacity), "best_fit", message)


def test_best_fit_in_other_words():
    from gptoss_kernels.finetune.packing import pack

    accepted(lambda lengths, capacity: pack(lengths, capacity), "best_fit")
    accepted(fit(longest, lambda f, g: min(reversed(f), key=lambda r: g[r])), "best_fit")


# ---------------------------------------------------------------------------------------------------- boundaries


def made(positions=None, ends=None):
    def attempt(lengths):
        p, c = chapter_09.boundaries(lengths)
        return (positions(p, lengths) if positions else p), (ends(c, lengths) if ends else c)

    return attempt


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (made(positions=lambda p, n: torch.arange(sum(n))), "count on across documents"),
        (made(positions=lambda p, n: p + 1), "position 0, not 1"),
        (
            made(positions=lambda p, n: torch.arange(len(n)).repeat_interleave(torch.tensor(n))),
            "number of the document",
        ),
        (made(positions=lambda p, n: p[None]), r"position_ids: expected shape \(8,\), got \(1, 8\)"),
        (made(positions=lambda p, n: p.tolist()), "position_ids: expected a tensor, got list"),
        (made(positions=lambda p, n: p.int()), "expected torch.int64"),
        (made(ends=lambda c, n: torch.tensor(n)), "these are the lengths"),
        (made(ends=lambda c, n: torch.tensor([0, *n])), "not added up"),
        (made(ends=lambda c, n: c[1:]), "the 0 in front is missing"),
        (made(ends=lambda c, n: c[:-1]), "the end of the last document is missing"),
        (made(ends=lambda c, n: torch.cat([c[:1], c[1:] - 1])), "one past the document's last token"),
        (made(ends=lambda c, n: c.long()), "expected torch.int32"),
        (lambda n: chapter_09.boundaries(n)[1], "expected two results"),
        (lambda n: chapter_09.boundaries(n)[::-1], "position_ids: expected shape"),
    ],
)
def test_boundaries(wrong, message):
    rejected(lambda lengths: wrong(lengths), "boundaries", message)


def test_boundaries_in_other_words():
    def plain(lengths):
        positions = [i for n in lengths for i in range(n)]
        return [torch.tensor(positions), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)]

    accepted(plain, "boundaries")
