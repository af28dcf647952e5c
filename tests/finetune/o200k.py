"""gpt-oss's own vocabulary, built from the ranks in the `bpe-openai` wheel: no hub needed."""

import base64
import gzip
from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Source of the pattern and the ids: OpenAI's tiktoken (o200k_base) and openai-harmony (its special tokens).
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
SIZE = 201_088


def ranks_file() -> bytes:
    """o200k_base.tiktoken: a line for each token, its bytes in base 64 and its rank."""
    return gzip.decompress((files("bpe_openai") / "data" / "o200k_base.tiktoken.gz").read_bytes())


def write_ranks(folder: Path) -> Path:
    """The folder, with the file that openai-harmony looks for where TIKTOKEN_ENCODINGS_BASE points."""
    (folder / "o200k_base.tiktoken").write_bytes(ranks_file())
    return folder


@cache
def build() -> PreTrainedTokenizerFast:
    """gpt-oss's tokenizer: 201,088 ids, without a chat template. A few seconds."""
    ranks = {}
    for line in ranks_file().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = bytes_to_unicode()
    written = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    # tiktoken merges any two neighbours that make a token, lowest rank first: so each way to split a token is a merge.
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = {number: name for name, number in SPECIAL.items()}
    tokenizer.add_special_tokens(
        [
            AddedToken(names.get(number, f"<|reserved_{number}|>"), special=True, normalized=False)
            for number in range(len(ranks), SIZE)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|return|>", pad_token="<|endoftext|>"
    )
