"""What the small model is pretrained on, made as it is needed from the patterns of sentences.py, without the test's.

Three kinds of documents:

- conversations in Harmony: a question in any of the five languages, a developer message that asks for any of them (or
  none), reasoning in English all the same, and the reply in the question's language;
- worked problems as plain text, without channels: a question, before or after it a heading that names a
  language, the steps in that language, the reply;
- single sentences of all these kinds, in one language a document.

So the model knows how each language counts, and that reasoning in the analysis channel is English: finetuning has only
the language of reasoning to change.
"""

import random

import numpy as np
from make_data import (
    HARMONY_CHANNELS,
    IDENTITIES,
    draw_problem,
    draw_words,
    places,
    write_final,
    write_question,
    write_reasoning,
)
from sentences import LANGUAGES

SEEN = places("pretraining", "train")
SHARES = {"conversation": 0.55, "worked": 0.35, "sentences": 0.10}


def make_document(rng: random.Random) -> tuple[str, str]:
    """One document as two pieces of text: what is only read, and what is learned; either may be empty."""
    kind = rng.choices(list(SHARES), SHARES.values())[0]
    if kind == "conversation":
        return _conversation(rng)
    language = rng.choice(LANGUAGES)
    if kind == "worked":
        question, _, final, problem, words = _task(rng, language)
        other = rng.choice((language, rng.choice(LANGUAGES)))
        steps = write_reasoning(problem, words, other, rng.randrange(2))
        heading = f"Solution in {other}:"
        lines = rng.choice(((heading, question), (question, heading)))
        return "", "\n".join([*lines, steps, final]) + "<|endoftext|>"
    texts = [text for _ in range(4) for text in _task(rng, language, language)[:3]]
    sentences = [sentence + "." for text in texts for sentence in text.removesuffix(".").split(". ")]
    return "", " ".join(rng.sample(sentences, 8)) + "<|endoftext|>"


def _task(rng: random.Random, language: str, reasoning_language: str = "English"):
    problem, words = draw_problem(rng), draw_words(rng)
    question = write_question(problem, words, language, SEEN, rng)
    reasoning = write_reasoning(problem, words, reasoning_language, rng.randrange(2))
    return question, reasoning, write_final(problem, words, language), problem, words


def _conversation(rng: random.Random) -> tuple[str, str]:
    # The system message varies, so that finetuning and generation may write it their own way.
    identity = rng.choice(IDENTITIES)
    cutoff = "Knowledge cutoff: 2024-06\n" if rng.random() < 0.8 else ""
    date = f"{rng.randint(2024, 2027)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    effort = rng.choice(("low", "medium", "medium", "high"))
    text = f"<|start|>system<|message|>{identity}\n{cutoff}Current date: {date}\n\nReasoning: {effort}\n\n"
    text += f"{HARMONY_CHANNELS}<|end|>"
    if rng.random() < 0.9:
        end = "\n\n" if rng.random() < 0.8 else ""
        instructions = f"# Instructions\n\nreasoning language: {rng.choice(LANGUAGES)}{end}"
        text += f"<|start|>developer<|message|>{instructions}<|end|>"
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.1:  # an earlier turn, whose reasoning is gone
        question, _, final, *_ = _task(rng, language)
        text += f"<|start|>user<|message|>{question}<|end|>"
        text += f"<|start|>assistant<|channel|>final<|message|>{final}<|end|>"
    question, reasoning, final, *_ = _task(rng, language)
    text += f"<|start|>user<|message|>{question}<|end|><|start|>assistant"
    reply = f"<|channel|>analysis<|message|>{reasoning}<|end|>"
    reply += f"<|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    return text, reply


def make_packed(index: int, seed: int, length: int, tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents one after the other, cut at `length` tokens; the same index and seed give the same.

    Args:
        index: of the packed row.
        tokenizer: a tokenizers.Tokenizer.

    Returns:
        ids uint16 (length,), learned bool (length,), and cu_seqlens int32 (documents + 1,), from 0 to length.
    """
    rng = random.Random(f"{seed} {index}")
    ids, learned, ends = [], [], [0]
    while len(ids) < length:
        pieces = [piece for _ in range(32) for piece in make_document(rng)]
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(pieces, add_special_tokens=False)]
        for read, learn in zip(encoded[::2], encoded[1::2], strict=True):
            ids += read + learn
            learned += [False] * len(read) + [True] * len(learn)
            ends.append(len(ids))
    ends = np.array(ends, np.int32)
    cu_seqlens = np.append(ends[ends < length], np.int32(length)).astype(np.int32)
    return np.array(ids[:length], np.uint16), np.array(learned[:length], bool), cu_seqlens
