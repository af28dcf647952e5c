"""What `show.source` displays is the package's own text, and a region that is gone is an error."""

import inspect

import pytest

pytest.importorskip("IPython", reason="the course extra")

from gptoss_kernels import flash_attention
from gptoss_kernels.attention import masks, reference
from gptoss_kernels.course import show


@pytest.fixture
def shown(monkeypatch):
    texts = []
    monkeypatch.setattr(show, "display", lambda markdown: texts.append(markdown.data))
    return texts


def test_a_function(shown):
    show.source(flash_attention)
    (text,) = shown
    assert text.startswith("`gptoss_kernels/attention/api.py`, lines ")
    assert inspect.getsource(flash_attention).rstrip() in text


def test_a_region_with_its_lines(shown):
    show.source(reference.attention_reference, "grouped = ", "masked_fill(~allowed")
    (text,) = shown
    head, *lines = text.removesuffix("\n```").splitlines()
    first, last = map(int, head.rsplit(" ", 1)[1].split("–"))
    file = inspect.getsource(reference).splitlines()
    assert [line.strip() for line in file[first - 1 : last]] == [line.strip() for line in lines[1:]]
    assert lines[1].startswith("grouped = ")  # dedented


def test_a_triton_kernel_and_a_module(shown):
    pytest.importorskip("triton")
    show.source(masks.first_key)
    show.source(masks, "LOG2E", "LOG2E")
    assert shown[0].splitlines()[2] == "@triton.jit" and "LOG2E = tl.constexpr" in shown[1]


@pytest.mark.parametrize("region", [("no such text",), ("grouped = ", "no such text")])
def test_a_region_that_is_gone(shown, region):
    with pytest.raises(ValueError, match="no line contains 'no such text'"):
        show.source(reference.attention_reference, *region)
    assert not shown
