"""The scripts in data/ import each other by their plain names, as they do when one of them is run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    """Models run through PyTorch here; the kernels' numbers have tests of their own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
