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
from functools import partial

import numpy as np
from make_data import (
    HARMONY_CHANNELS,
    IDENTITIES,
    Problem,
    Words,
    draw_problem,
    draw_words,
    find_wordings,
    write_final,
    write_reasoning,
    write_sentence,
)
from more_sentences import CUES, FILLERS, MORE_SENTENCES
from sentences import LANGUAGES

WORDINGS = {
    language: {slot: find_wordings(language, slot, ("pretraining", "train")) + more for slot, more in slots.items()}
    for language, slots in MORE_SENTENCES.items()
}
PUNCTUATION = ".,;:?!¿¡"
CUE_WORDS = {language: set(cues.lower().split()) for language, cues in CUES.items()}
# Words that decide nothing; a noisy question has some of them where they do not belong.
WORDS = {
    language: sorted(
        {
            bare
            for wordings in slots.values()
            for word in " ".join(wordings).split()
            if "{" not in word and (bare := word.strip(PUNCTUATION)) and bare.lower() not in CUE_WORDS[language]
        }
    )
    for language, slots in WORDINGS.items()
}
SYLLABLES = [a + b + c for a in "bcdfglmnprstv" for b in "aeiou" for c in ("", "n", "r", "s", "t")]
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
    question = _question(problem, words, language, rng)
    reasoning = write_reasoning(problem, words, reasoning_language, rng.randrange(2))
    return question, reasoning, write_final(problem, words, language), problem, words


def _question(problem: Problem, words: Words, language: str, rng: random.Random) -> str:
    """A question, which may be harder to read than those of the data set.

    In six of ten, words that decide nothing are dropped, or replaced by others or by words that do not exist, or such
    words are added. In three of twenty, each sentence but the last has a language of its own. Some have sentences in
    between that say nothing.
    """
    noise = rng.uniform(0.3, 1.5) if rng.random() < 0.6 else 0.0
    mixed, slots, sentences = rng.random() < 0.15, problem.kind.split(), []
    for slot, numbers in zip(slots, problem.numbers, strict=True):
        tongue = rng.choice(LANGUAGES) if mixed and slot != slots[-1] else language
        edit = partial(_disturb, language=tongue, noise=noise, rng=rng)
        sentences.append(write_sentence(WORDINGS[tongue][slot], slot, numbers, words, tongue, rng, edit))
        if rng.random() < 0.08:
            sentences.append(write_sentence(FILLERS[tongue], "filler", (), words, tongue, rng))
    return " ".join(sentences)


def _disturb(wording: str, language: str, noise: float, rng: random.Random) -> str:
    if not noise:
        return wording
    words = []
    for word in wording.split(" "):
        if rng.random() < 0.06 * noise:
            words.append(_other_word(language, rng))
        bare = word.strip(PUNCTUATION)
        chance = 1.0 if "{" in word or not bare or bare.lower() in CUE_WORDS[language] else rng.random()
        if chance < 0.12 * noise:
            words.append(word.replace(bare, _other_word(language, rng)))
        elif chance >= 0.18 * noise:
            words.append(word)
    return " ".join(words)


def _other_word(language: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(WORDS[language])
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))


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
