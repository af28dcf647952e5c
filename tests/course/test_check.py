"""Every packaged solution passes its own checker; known mistakes get the message that names them."""

import importlib
import pkgutil

import pytest
import torch

from gptoss_kernels.course import check, solutions

EXERCISES = [
    (int(module.name.removeprefix("chapter_")), key.removeprefix("check_"))
    for module in pkgutil.iter_modules(solutions.__path__)
    for key in vars(importlib.import_module(f"{solutions.__name__}.{module.name}"))
    if key.startswith("check_")
]


@pytest.mark.parametrize(("chapter", "name"), EXERCISES)
def test_packaged_solution_is_right(chapter, name, capsys):
    solution = getattr(importlib.import_module(f"{solutions.__name__}.chapter_{chapter:02d}"), name)
    assert check.attempt(solution, chapter=chapter, strict=True) is solution
    assert capsys.readouterr().out.startswith(f"✓ {name}: right")


@pytest.mark.parametrize(("chapter", "name"), EXERCISES)
def test_stub_gets_the_packaged_solution(chapter, name, capsys):
    def stub(*args):
        raise NotImplementedError

    stub.__name__ = name
    solution = getattr(importlib.import_module(f"{solutions.__name__}.chapter_{chapter:02d}"), name)
    assert check.attempt(stub, chapter=chapter) is solution
    assert "not attempted yet" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):
        check.attempt(stub, chapter=chapter, strict=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores, sink: torch.sigmoid(torch.logsumexp(scores, -1) - sink), "the keys keep"),
        (lambda scores, sink: torch.exp(sink) / torch.exp(scores).sum(-1), "the sink itself counts too"),
        (lambda scores, sink: sink - torch.logaddexp(sink, torch.logsumexp(scores, -1)), "apply exp"),
        (lambda scores, sink: torch.sigmoid(sink - scores.sum(-1)), "torch.sum of the scores"),
        (lambda scores, sink: torch.sigmoid(sink - torch.logsumexp(scores.flatten(), 0)), "last dimension only"),
        (lambda scores, sink: torch.exp(sink) / (torch.exp(sink) + torch.exp(scores).sum(-1)), "overflow"),
        (lambda scores, sink: 0.5, "expected a tensor"),
        (lambda scores, sink: torch.zeros(3), "expected shape"),
        (lambda scores, sink: torch.full((5,), 0.5), "expected 0."),
    ],
)
def test_sink_share_names_the_mistake(wrong, message):
    wrong.__name__ = "sink_share"
    with pytest.raises(check.Mistake, match=message):
        check.attempt(wrong, chapter=0, strict=True)


def test_a_raising_attempt_is_told(capsys):
    def sink_share(scores, sink):
        return scores @ sink.nothing

    check.attempt(sink_share, chapter=0)
    assert "it raised AttributeError" in capsys.readouterr().out


def test_strict_by_environment(monkeypatch):
    def sink_share(scores, sink):
        raise NotImplementedError("your turn")

    monkeypatch.setenv("GPTOSS_STRICT", "1")
    with pytest.raises(NotImplementedError):
        check.attempt(sink_share, chapter=0)


def test_what_a_kernel_raises_in_the_interpreter_is_unwrapped(capsys):
    errors = pytest.importorskip("triton.runtime.errors")

    def sink_share(scores, sink):
        try:
            raise ZeroDivisionError("in the kernel")
        except ZeroDivisionError as error:
            raise errors.InterpreterError(repr(error)) from error

    check.attempt(sink_share, chapter=0)
    assert "it raised ZeroDivisionError: in the kernel" in capsys.readouterr().out

    def sink_share(scores, sink):
        raise errors.InterpreterError("AssertionError('your turn')") from AssertionError(check.STUB)

    check.attempt(sink_share, chapter=0)
    assert "not attempted yet" in capsys.readouterr().out


def test_unknown_exercise():
    def sink_shares(scores, sink):
        return sink

    message = r"function: expected one of chapter 0's exercises \['sink_share'\], got 'sink_shares'"
    with pytest.raises(ValueError, match=message):
        check.attempt(sink_shares, chapter=0)
