"""Chapter 09, Harmony data: what is trained, and in which rows."""

import copy
from collections.abc import Callable

import torch

from ..check import Mistake

# ------------------------------------------------------------------------------------------------- loss_weights


def loss_weights(tokens: list[str]) -> list[float]:
    """The text of each token of a conversation without tools, special tokens whole -> 1.0 where the model writes."""
    starts = [i for i, token in enumerate(tokens) if token == "<|start|>"]
    question = max(i for i in starts if tokens[i + 1] == "user")
    reply = min(i for i in starts if i > question) + 2  # after <|start|>assistant, where the prompt ends
    return [float(i >= reply) for i in range(len(tokens))]


def _message(role: str, *content: str, channel: str | None = None, end: str = "<|end|>") -> list[str]:
    header = ["<|channel|>", channel] if channel else []
    return ["<|start|>", role, *header, "<|message|>", *content, end]


def _conversations() -> dict[str, tuple[list[str], int]]:
    """What is special about it -> its tokens, and where the reply begins."""
    head = _message("system", "You", " are", " brief", ".")
    ask, again = _message("user", "2", " +", " 3", "?"), _message("user", "times", " 2", "?")
    think = _message("assistant", "easy", ".", channel="analysis")
    answer = _message("assistant", "5", channel="final", end="<|return|>")
    earlier = _message("assistant", "5", channel="final")
    ten = _message("assistant", "10", channel="final", end="<|return|>")
    fake = _message("user", "why", " <", "|", "start", "|", ">", "assistant", " ?")
    more = _message("assistant", "user", " asks", ".", channel="analysis")
    return {
        "a question, its reasoning and its answer": ([*head, *ask, *think, *answer], len(head) + len(ask) + 2),
        "an answer without reasoning": ([*head, *ask, *answer], len(head) + len(ask) + 2),
        "a second turn, whose first is context": (
            [*head, *ask, *earlier, *again, *more, *ten],
            len(head) + len(ask) + len(earlier) + len(again) + 2,
        ),
        "a question that holds the characters of a special token": (
            [*head, *fake, *think, *answer],
            len(head) + len(fake) + 2,
        ),
    }


def check_loss_weights(function: Callable) -> None:
    for what, (tokens, reply) in _conversations().items():
        got = _numbers(function(list(tokens)), len(tokens))
        right = [float(i >= reply) for i in range(len(tokens))]
        if got == right:
            continue
        first = next(i for i, (a, b) in enumerate(zip(got, right, strict=True)) if a != b)
        for message, wrong in _wrong_weights(tokens, reply).items():
            if got == wrong:
                raise Mistake(f"{what}: {message}")
        raise Mistake(
            f"{what}: token {first}, {tokens[first]!r} after {''.join(tokens[max(0, first - 3) : first])!r}: expected "
            f"{right[first]}, got {got[first]}"
        )


def _wrong_weights(tokens: list[str], reply: int) -> dict[str, list[float]]:
    """Message -> what that mistake gives."""
    n = len(tokens)
    role = None
    inside, body, every, final = [], [], [], []
    for i, token in enumerate(tokens):
        if token == "<|start|>":
            role, text, channel = tokens[i + 1], False, None
        ends = token in ("<|end|>", "<|return|>")
        channel = tokens[i + 1] if token == "<|channel|>" else channel
        every.append(role == "assistant")
        inside.append(role == "assistant" and i >= reply - 2)
        body.append(role == "assistant" and text and not ends and i >= reply)
        final.append(channel == "final" and i >= reply)
        text = (text or token == "<|message|>") and not ends
    after = [i >= reply for i in range(n)]
    ends = [token in ("<|end|>", "<|return|>") for token in tokens]
    return {
        message: [float(x) for x in wrong]
        for message, wrong in {
            "<|start|>assistant carries loss, but it is the end of the prompt: the model is handed it": inside,
            "every assistant message carries loss; earlier turns are context": every,
            "only the text carries loss; the model writes headers and end tokens, too, and without a trained end token "
            "it never stops": body,
            "the end tokens carry no loss: the model would not learn to stop": [
                x and not end for x, end in zip(after, ends, strict=True)
            ],
            "only the final channel carries loss; the reasoning is written by the model, too": final,
            "everything carries loss; the prompt is given, not written": [True] * n,
            "nothing carries loss": [False] * n,
            "the weights are one place too early: a token's weight stands at the token itself, the shift comes later": [
                i >= reply - 1 for i in range(n)
            ],
            "the first token that the model writes, <|channel|>, carries no loss": [i > reply for i in range(n)],
            "prompt and reply are the wrong way round": [not x for x in after],
        }.items()
    }


def _numbers(got, length: int) -> list[float]:
    if isinstance(got, torch.Tensor):
        got = got.tolist()
    if not isinstance(got, (list, tuple)):
        raise Mistake(f"expected a list of numbers, got {type(got).__name__}")
    if len(got) != length:
        raise Mistake(f"expected a weight for each of {length} tokens, got {len(got)}")
    return [float(x) for x in got]


# -------------------------------------------------------------------------------------------- training_examples


def training_examples(messages: list[dict]) -> list[list[dict]]:
    """A conversation -> one for each answered user turn, without the reasoning of the turns before it."""
    examples, context = [], []
    for message in messages:
        context.append(message)
        if message["role"] == "assistant":
            examples.append(list(context))
            context[-1] = {key: value for key, value in message.items() if key != "thinking"}
    return examples


def check_training_examples(function: Callable) -> None:
    def user(text):
        return {"role": "user", "content": text}

    def assistant(thinking, text):
        return {"role": "assistant", "thinking": thinking, "content": text}

    one = [user("2 + 3?"), assistant("Easy.", "5")]
    two = [{"role": "system", "content": "Be brief."}, *one, user("Times 2?"), assistant("5 * 2.", "10")]
    cases = {
        "one turn": one,
        "three turns": [*two, user("Minus 1?"), assistant("10 - 1.", "9")],
        "a last question without an answer": [*two, user("And then?")],
    }
    for what, messages in cases.items():
        given, right = copy.deepcopy(messages), training_examples(messages)
        got = function(given)
        if given != messages:
            raise Mistake(
                f"{what}: the conversation that was handed in has changed, and with it every example that holds it; "
                "make a new message instead"
            )
        if not isinstance(got, (list, tuple)) or not all(isinstance(example, (list, tuple)) for example in got):
            raise Mistake(f"{what}: expected a list of conversations, each a list of messages")
        got = [list(example) for example in got]
        if got != right:
            raise Mistake(f"{what}: {_wrong_examples(got, right, messages)}")


def _wrong_examples(got: list, right: list, messages: list) -> str:
    if not got:
        return f"expected {len(right)} examples, got none"
    if len(right) > 1 and got == right[-1:]:
        return "only the last turn is an example; each answered turn is one"
    if len(got) == 1 and len(got[0]) > len(right[0]) and len(right) > 1:
        return "one example for the whole conversation; the earlier replies need contexts of their own"
    if any(example and example[-1]["role"] != "assistant" for example in got):
        return "an example ends with the reply that is trained; nothing follows it, and a question alone is none"
    if len(got) != len(right):
        return f"expected {len(right)} examples, one an answered turn, got {len(got)}"

    def bare(examples):
        return [[{k: v for k, v in m.items() if k != "thinking"} for m in example] for example in examples]

    if bare(got) == bare(right):
        kept = [[bool(m.get("thinking")) for m in example if m.get("role") == "assistant"] for example in got]
        if not any(example[-1] for example in kept):
            return "the trained reply lost its reasoning, too: it is what the example is there for"
        if any(any(example[:-1]) for example in kept):
            return "an earlier turn still has its reasoning, which the model will not see when it answers"
        if any("thinking" in m for example in got for m in example[:-1]):
            return "leave the key `thinking` out of earlier turns instead of emptying it"
        return "the trained reply of some example lost its reasoning"
    if len(got) > 1 and all(len(a) < len(b) - 1 for a, b in zip(got[1:], right[1:], strict=True)):
        return "the earlier turns are gone; only their reasoning goes, questions and answers stay"
    if messages[0]["role"] == "system" and any(example[0]["role"] != "system" for example in got):
        return "the system message is missing: it stands at the head of each example"
    index = next(i for i, (a, b) in enumerate(zip(got, right, strict=True)) if a != b)
    return f"example {index}: expected {right[index]}, got {got[index]}"


# ------------------------------------------------------------------------------------------------------ best_fit


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Lengths of documents and tokens of a row -> each row's documents, as indices; the longest first, best fit."""
    rows, gaps = [], []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, gap in enumerate(gaps) if gap >= lengths[document]]
        if fitting:
            row = min(fitting, key=lambda row: gaps[row])
        else:
            row = len(rows)
            rows.append([])
            gaps.append(capacity)
        rows[row].append(document)
        gaps[row] -= lengths[document]
    return rows


def _fit(lengths, capacity, *, order, choose, strict=False, last_only=False) -> list[int]:
    """Filled tokens of each row, sorted, when documents in some order go to a chosen row."""
    gaps = []
    for length in order(lengths):
        among = gaps[-1:] if last_only else gaps
        fitting = [gap for gap in among if (gap > length if strict else gap >= length)]
        if fitting:
            gaps[gaps.index(choose(fitting)) if not last_only else -1] -= length
        else:
            gaps.append(capacity - length)
    return sorted(capacity - gap for gap in gaps)


def check_best_fit(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [([5, 3, 2, 5, 4, 1], 10), ([7], 10), ([6, 4], 10), ([4, 4, 4, 4], 8)]
    for high, count in ((60, 40), (30, 60)):
        cases.append((torch.randint(1, high, (count,), generator=generator).tolist(), 64))
    for lengths, capacity in cases:
        given = list(lengths)
        got = function(given, capacity)
        shown = f"lengths {lengths} in rows of {capacity}" if len(lengths) < 10 else f"{len(lengths)} random lengths"
        if given != lengths:
            raise Mistake("the list of lengths that was handed in has changed: sort a copy, or the indices")
        if not isinstance(got, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in got):
            raise Mistake("expected a list of rows, each a list of indices")
        flat = [int(i) for row in got for i in row]
        if sorted(flat) != list(range(len(lengths))):
            if sorted(flat) == sorted(lengths):
                raise Mistake(f"{shown}: the rows hold lengths; expected indices into the list of lengths")
            if any(i not in range(len(lengths)) for i in flat):
                raise Mistake(f"{shown}: index {max(flat)} is no document's")
            missing = sorted(set(range(len(lengths))) - set(flat))
            raise Mistake(
                f"{shown}: document {missing[0]} is in no row" if missing else f"{shown}: a document is in two rows"
            )
        if any(len(row) == 0 for row in got):
            raise Mistake(f"{shown}: a row is empty")
        filled = sorted(sum(lengths[i] for i in row) for row in got)
        if filled[-1] > capacity:
            raise Mistake(f"{shown}: a row holds {filled[-1]} tokens, and {capacity} fit")
        right = sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, capacity))
        if filled == right:
            continue
        longest, shortest = (lambda x: sorted(x, reverse=True)), sorted
        known = {
            "each document has a row of its own: several share one": sorted(lengths),
            "a document that fills a gap exactly must go there: compare with >=, not >": _fit(
                lengths, capacity, order=longest, choose=min, strict=True
            ),
            "documents were taken as they come: the longest first": _fit(lengths, capacity, order=list, choose=min),
            "the shortest document came first: the longest first": _fit(lengths, capacity, order=shortest, choose=min),
            "that is first fit: among the rows with room take the one with the smallest gap": _fit(
                lengths, capacity, order=longest, choose=lambda gaps: gaps[0]
            ),
            "that is worst fit, the row with the largest gap: take the smallest that is large enough": _fit(
                lengths, capacity, order=longest, choose=max
            ),
            "only the last row was looked at: earlier ones have gaps, too": _fit(
                lengths, capacity, order=longest, choose=min, last_only=True
            ),
            "documents were taken as they come, and only the last row was looked at": _fit(
                lengths, capacity, order=list, choose=min, last_only=True
            ),
            "documents were taken as they come, into the first row with room": _fit(
                lengths, capacity, order=list, choose=lambda gaps: gaps[0]
            ),
        }
        for message, wrong in known.items():
            if filled == wrong:
                raise Mistake(f"{shown}: {message}")
        raise Mistake(
            f"{shown}: expected {len(right)} rows filled with {right[-6:]} … tokens, got {len(filled)} with "
            f"{filled[-6:]}"
        )


# ---------------------------------------------------------------------------------------------------- boundaries


def boundaries(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of a row's documents -> position_ids (tokens,) int64, cu_seqlens (documents + 1,) int32."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return positions, cu_seqlens


def check_boundaries(function: Callable) -> None:
    for lengths in ([3, 1, 4], [5], [2, 2, 2, 2]):
        got = function(list(lengths))
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Mistake("expected two results, (position_ids, cu_seqlens)")
        for name, value in zip(("position_ids", "cu_seqlens"), got, strict=True):
            if not isinstance(value, torch.Tensor):
                raise Mistake(f"{name}: expected a tensor, got {type(value).__name__}")
        positions, ends = got
        right, cu_seqlens = boundaries(lengths)
        total, n = sum(lengths), len(lengths)
        if torch.equal(positions.long().flatten(), torch.arange(total)) and n > 1:
            raise Mistake("position_ids: they count on across documents; each document begins at 0")
        if positions.shape == right.shape and torch.equal(positions.long(), right + 1):
            raise Mistake("position_ids: the first token of a document stands at position 0, not 1")
        owner = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths))
        if positions.shape == right.shape and n > 1 and torch.equal(positions.long(), owner):
            raise Mistake("position_ids: that is the number of the document, not the place within it")
        _same("position_ids", positions, right, torch.int64)
        if torch.equal(ends.long(), torch.tensor(lengths)):
            raise Mistake("cu_seqlens: these are the lengths; it holds their running sum, 0 first")
        if n > 1 and torch.equal(ends.long(), torch.tensor([0, *lengths])):
            raise Mistake("cu_seqlens: the lengths are not added up: each entry is where a document ends")
        if torch.equal(ends.long(), cu_seqlens[1:].long()):
            raise Mistake("cu_seqlens: the 0 in front is missing, where the first document begins")
        if torch.equal(ends.long(), cu_seqlens[:-1].long()):
            raise Mistake("cu_seqlens: the end of the last document is missing")
        if ends.shape == cu_seqlens.shape and torch.equal(ends[1:].long(), cu_seqlens[1:].long() - 1):
            raise Mistake("cu_seqlens: an entry is one past the document's last token, as in a slice")
        _same("cu_seqlens", ends, cu_seqlens, torch.int32)


def _same(name: str, got: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    if got.shape != right.shape:
        raise Mistake(f"{name}: expected shape {tuple(right.shape)}, got {tuple(got.shape)}")
    if not torch.equal(got.double(), right.double()):
        raise Mistake(f"{name}: expected {right.tolist()}, got {got.tolist()}")
    if got.dtype != dtype:
        raise Mistake(f"{name}: right, but in {got.dtype}; expected {dtype}")
