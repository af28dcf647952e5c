"""What notebook 09 writes by hand against the package; it defines no kernel."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("trl", reason="chapter 09 needs the training extra")

sys.path.insert(0, str(Path(__file__).parent))
import extract
from transformers import AutoTokenizer

from gptoss_kernels.finetune import harmony, packing


@pytest.fixture(scope="module")
def notebook():
    return extract.load("09_harmony_data")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(extract.ROOT / "data" / "tokenizer")


def conversation(turns, generator):
    """A conversation with reasoning in some of its replies; questions that look like special tokens among them."""
    words = ["two", "<|start|>assistant", "<|end|>", "user", "assistant", "and", "é", "\n"]

    def text():
        return "x " + " ".join(generator.choices(words[5:] if role == "assistant" else words, k=4))

    messages = [{"role": "system", "content": "Be brief."}] if generator.random() < 0.5 else []
    for _ in range(turns):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": text()})
        if generator.random() < 0.7:
            messages[-1]["thinking"] = text()
    return messages


@pytest.mark.parametrize("seed", range(20))
def test_masks_and_examples_are_the_packages(notebook, tokenizer, seed):
    generator = random.Random(seed)
    messages = conversation(1 + seed % 4, generator)
    rendered = harmony.render({"messages": messages}, harmony.Rendering())
    own = notebook.training_examples(messages)
    assert len(own) == len(rendered) == 1 + seed % 4
    for example, wanted in zip(own, rendered, strict=True):
        (again,) = harmony.render({"messages": example}, harmony.Rendering(turns="last"))
        encoded = harmony.encode(wanted, tokenizer)
        assert harmony.text(again) == harmony.text(wanted)
        assert notebook.loss_weights([tokenizer.decode([i]) for i in encoded.input_ids]) == encoded.weights


@pytest.mark.parametrize("seed", range(10))
def test_packing_and_boundaries_are_the_packages(notebook, seed):
    lengths = torch.randint(1, 90, (50,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, theirs = notebook.best_fit(lengths, 100), packing.pack(lengths, 100)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(
        sum(lengths[i] for i in row) for row in theirs
    )
    assert len(notebook.as_they_come(lengths, 100)) >= len(rows)
    documents = [packing.Document(*(torch.ones(n).numpy() for _ in range(3))) for n in lengths[:7]]
    report = packing.Report("train")
    kept = packing.truncate(documents, 1000, report)
    batch = packing.Collator(0, join=True)([packing.build(kept, True, report)[0]])
    order = packing.pack(lengths[:7], 1000)[0]
    positions, cu_seqlens = notebook.boundaries([lengths[i] for i in order])
    assert torch.equal(batch["position_ids"][0], positions) and torch.equal(batch["cu_seq_lens_q"], cu_seqlens)


def test_the_shipped_example_becomes_conversations(notebook):
    import csv

    with open(extract.ROOT / notebook.OWN, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        messages = notebook.conversation(row)
        json.dumps(messages)
        assert [m["role"] for m in messages] == ["system", "user", "assistant"] and messages[-1]["thinking"]
        assert len(harmony.render({"messages": messages}, harmony.Rendering())) == 1
