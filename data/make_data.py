"""Make the data set and the tokenizer in this folder, from nothing but the sentence patterns below.

    uv run python data/make_data.py            # writes data/reasoning/*.jsonl and data/tokenizer/

Every row is one conversation about one small problem: `messages` (system, user, assistant with its `thinking`),
`language`, `kind` and `answer`, the last of which the end of the assistant's reply can be checked against.
"""

import argparse
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 42
ROWS = {"train": 4000, "test": 200}
VOCAB_SIZE = 1024
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
HARMONY_TEXTS = [
    "You are a helpful assistant.\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "# Instructions\n\n",
    *("system", "developer", "user", "assistant", "analysis", "commentary", "final", "low", "high"),
]

# Names are the same in every language; things are not.
NAMES = ["Ana", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Laura", "Marco"]
THINGS = {
    "English": ["apples", "books", "coins", "stamps", "marbles", "pencils"],
    "Spanish": ["manzanas", "libros", "monedas", "sellos", "canicas", "lápices"],
    "French": ["pommes", "livres", "pièces", "timbres", "billes", "crayons"],
    "German": ["Äpfel", "Bücher", "Münzen", "Marken", "Murmeln", "Stifte"],
    "Italian": ["mele", "libri", "monete", "francobolli", "biglie", "matite"],
}
DAYS = {
    "English": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "Spanish": ["lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"],
    "French": ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"],
    "German": ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
    "Italian": ["lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"],
}
# kind -> language -> (question, reasoning, reply). The reply ends with the answer and a full stop.
PATTERNS = {
    "story": {
        "English": (
            "{n} has {a} {t}, buys {b} more and gives {c} away. How many {t} does {n} have now?",
            "{n} starts with {a}. Buying adds: {a} + {b} = {s}. Giving takes away: {s} - {c} = {r}.",
            "{n} has {r} {t}. The answer is {r}.",
        ),
        "Spanish": (
            "{n} tiene {a} {t}, compra {b} más y regala {c}. ¿Cuántas cosas tiene {n} ahora?",
            "{n} empieza con {a}. Comprar suma: {a} + {b} = {s}. Regalar resta: {s} - {c} = {r}.",
            "{n} tiene {r} {t}. La respuesta es {r}.",
        ),
        "French": (
            "{n} a {a} {t}, en achète {b} et en donne {c}. Combien en a {n} maintenant ?",
            "{n} commence avec {a}. Acheter ajoute : {a} + {b} = {s}. Donner enlève : {s} - {c} = {r}.",
            "{n} a {r} {t}. La réponse est {r}.",
        ),
        "German": (
            "{n} hat {a} {t}, kauft {b} dazu und verschenkt {c}. Wie viele {t} hat {n} jetzt?",
            "{n} beginnt mit {a}. Kaufen zählt dazu: {a} + {b} = {s}. Verschenken zieht ab: {s} - {c} = {r}.",
            "{n} hat {r} {t}. Die Antwort ist {r}.",
        ),
        "Italian": (
            "{n} ha {a} {t}, ne compra {b} e ne regala {c}. Quante cose ha {n} adesso?",
            "{n} comincia con {a}. Comprare aggiunge: {a} + {b} = {s}. Regalare toglie: {s} - {c} = {r}.",
            "{n} ha {r} {t}. La risposta è {r}.",
        ),
    },
    "boxes": {
        "English": (
            "There are {a} boxes with {b} {t} each. How many {t} are there in all?",
            "Each box holds {b}, and there are {a} boxes: {a} * {b} = {r}.",
            "There are {r} {t} in all. The answer is {r}.",
        ),
        "Spanish": (
            "Hay {a} cajas con {b} {t} cada una. ¿Cuántas cosas hay en total?",
            "Cada caja tiene {b} y hay {a} cajas: {a} * {b} = {r}.",
            "Hay {r} {t} en total. La respuesta es {r}.",
        ),
        "French": (
            "Il y a {a} boîtes avec {b} {t} chacune. Combien y en a-t-il en tout ?",
            "Chaque boîte contient {b} et il y a {a} boîtes : {a} * {b} = {r}.",
            "Il y a {r} {t} en tout. La réponse est {r}.",
        ),
        "German": (
            "Es gibt {a} Kisten mit je {b} {t}. Wie viele {t} sind es insgesamt?",
            "Jede Kiste enthält {b}, und es gibt {a} Kisten: {a} * {b} = {r}.",
            "Es sind insgesamt {r} {t}. Die Antwort ist {r}.",
        ),
        "Italian": (
            "Ci sono {a} scatole con {b} {t} ciascuna. Quante cose ci sono in tutto?",
            "Ogni scatola ne contiene {b} e ci sono {a} scatole: {a} * {b} = {r}.",
            "Ci sono {r} {t} in tutto. La risposta è {r}.",
        ),
    },
    "ages": {
        "English": (
            "{n} is {a} years old. {m} is {b} years older than {n}. How old is {m}?",
            "{m} is older, so the years are added: {a} + {b} = {r}.",
            "{m} is {r} years old. The answer is {r}.",
        ),
        "Spanish": (
            "{n} tiene {a} años. {m} tiene {b} años más que {n}. ¿Cuántos años tiene {m}?",
            "{m} es mayor, así que los años se suman: {a} + {b} = {r}.",
            "{m} tiene {r} años. La respuesta es {r}.",
        ),
        "French": (
            "{n} a {a} ans. {m} a {b} ans de plus que {n}. Quel âge a {m} ?",
            "{m} est plus âgé, donc les années s'ajoutent : {a} + {b} = {r}.",
            "{m} a {r} ans. La réponse est {r}.",
        ),
        "German": (
            "{n} ist {a} Jahre alt. {m} ist {b} Jahre älter als {n}. Wie alt ist {m}?",
            "{m} ist älter, also werden die Jahre addiert: {a} + {b} = {r}.",
            "{m} ist {r} Jahre alt. Die Antwort ist {r}.",
        ),
        "Italian": (
            "{n} ha {a} anni. {m} ha {b} anni più di {n}. Quanti anni ha {m}?",
            "{m} è più grande, quindi gli anni si sommano: {a} + {b} = {r}.",
            "{m} ha {r} anni. La risposta è {r}.",
        ),
    },
    "sequence": {
        "English": (
            "Which number comes next: {a}, {p}, {q}, {s}?",
            "From {a} to {p} is {b}, and each step is the same: {s} + {b} = {r}.",
            "The next number is {r}. The answer is {r}.",
        ),
        "Spanish": (
            "¿Qué número sigue: {a}, {p}, {q}, {s}?",
            "De {a} a {p} hay {b} y cada paso es igual: {s} + {b} = {r}.",
            "El número siguiente es {r}. La respuesta es {r}.",
        ),
        "French": (
            "Quel nombre vient ensuite : {a}, {p}, {q}, {s} ?",
            "De {a} à {p} il y a {b} et chaque pas est le même : {s} + {b} = {r}.",
            "Le nombre suivant est {r}. La réponse est {r}.",
        ),
        "German": (
            "Welche Zahl kommt als Nächste: {a}, {p}, {q}, {s}?",
            "Von {a} bis {p} sind es {b}, und jeder Schritt ist gleich: {s} + {b} = {r}.",
            "Die nächste Zahl ist {r}. Die Antwort ist {r}.",
        ),
        "Italian": (
            "Quale numero viene dopo: {a}, {p}, {q}, {s}?",
            "Da {a} a {p} ci sono {b} e ogni passo è uguale: {s} + {b} = {r}.",
            "Il numero successivo è {r}. La risposta è {r}.",
        ),
    },
    "weekday": {
        "English": (
            "Today is {day}. Which day is it in {a} days?",
            "A week has 7 days, and {a} days leave {b} over. Counting {b} from {day} gives {r}.",
            "In {a} days it is {r}. The answer is {r}.",
        ),
        "Spanish": (
            "Hoy es {day}. ¿Qué día será dentro de {a} días?",
            "La semana tiene 7 días y de {a} días sobran {b}. Contando {b} desde {day} se llega a {r}.",
            "Dentro de {a} días será {r}. La respuesta es {r}.",
        ),
        "French": (
            "Aujourd'hui c'est {day}. Quel jour serons-nous dans {a} jours ?",
            "Une semaine a 7 jours et de {a} jours il reste {b}. En comptant {b} depuis {day} on arrive à {r}.",
            "Dans {a} jours nous serons {r}. La réponse est {r}.",
        ),
        "German": (
            "Heute ist {day}. Welcher Tag ist in {a} Tagen?",
            "Eine Woche hat 7 Tage, und von {a} Tagen bleiben {b} übrig. Von {day} aus {b} weiter ist {r}.",
            "In {a} Tagen ist {r}. Die Antwort ist {r}.",
        ),
        "Italian": (
            "Oggi è {day}. Che giorno sarà tra {a} giorni?",
            "Una settimana ha 7 giorni e di {a} giorni ne restano {b}. Contando {b} da {day} si arriva a {r}.",
            "Tra {a} giorni sarà {r}. La risposta è {r}.",
        ),
    },
}


def values(kind: str, language: str, rng: random.Random) -> dict[str, int | str]:
    """The numbers and words of one problem; `r` is its answer. Small numbers, so that a small model can add them."""
    n, m = rng.sample(NAMES, 2)
    v = {"n": n, "m": m, "t": rng.choice(THINGS[language]), "day": rng.choice(DAYS[language])}
    if kind == "story":
        v["a"], v["b"] = rng.randint(2, 9), rng.randint(2, 9)
        v["s"] = v["a"] + v["b"]
        v["c"] = rng.randint(1, 3)
        v["r"] = v["s"] - v["c"]
    elif kind == "boxes":
        v["a"], v["b"] = rng.randint(2, 9), rng.randint(2, 9)
        v["r"] = v["a"] * v["b"]
    elif kind == "ages":
        v["a"], v["b"] = rng.randint(3, 19), rng.randint(2, 9)
        v["r"] = v["a"] + v["b"]
    elif kind == "sequence":
        v["a"], v["b"] = rng.randint(1, 20), rng.randint(2, 5)
        v["p"], v["q"], v["s"], v["r"] = (v["a"] + step * v["b"] for step in (1, 2, 3, 4))
    elif kind == "weekday":
        v["a"] = rng.randint(8, 30)
        v["b"] = v["a"] % 7
        v["r"] = DAYS[language][(DAYS[language].index(v["day"]) + v["b"]) % 7]
    return v


def row(rng: random.Random) -> dict:
    kind, language = rng.choice(list(PATTERNS)), rng.choice(list(THINGS))
    v = values(kind, language, rng)
    question, reasoning, reply = (text.format(**v) for text in PATTERNS[kind][language])
    return {
        "messages": [
            {"role": "system", "content": f"reasoning language: {language}"},
            {"role": "user", "content": question},
            {"role": "assistant", "thinking": reasoning, "content": reply},
        ],
        "language": language,
        "kind": kind,
        "answer": str(v["r"]),
    }


def make_rows() -> dict[str, list[dict]]:
    """The splits. No question of the test split occurs in the train split, and none occurs twice."""
    rng, seen = random.Random(SEED), set()
    splits = {}
    for split in ("test", "train"):
        rows = []
        while len(rows) < ROWS[split]:
            candidate = row(rng)
            question = candidate["messages"][1]["content"]
            if question not in seen:
                seen.add(question)
                rows.append(candidate)
        splits[split] = rows
    return splits


def make_tokenizer(rows: list[dict]):
    """A byte-level BPE on the rows' text, digits one by one, with Harmony's special tokens and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (HERE / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    texts = [m[key] for r in rows for m in r["messages"] for key in ("thinking", "content") if m.get(key)]
    # The words that the template itself writes must be learned too, as often as it writes them.
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
    splits = make_rows()
    (output / "reasoning").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(output / "reasoning" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    make_tokenizer(splits["train"]).save_pretrained(output / "tokenizer")


if __name__ == "__main__":
    main()
