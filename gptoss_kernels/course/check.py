"""Exercises: `attempt` checks a learner's function and hands back one to go on with."""

import importlib
import os
from collections.abc import Callable

STUB = "your turn"  # a stub raises NotImplementedError; in a kernel, which cannot, tl.static_assert(False, STUB)


class Mistake(Exception):
    """A wrong attempt; the message names the likely mistake."""


def attempt(function: Callable, *, chapter: int, strict: bool | None = None) -> Callable:
    """Checks `function` and prints the verdict; returns it if it is right, otherwise the packaged solution.

    So a notebook runs to its end for someone who has solved nothing.

    Args:
        function: the learner's, a Triton kernel too; its name says which exercise of the chapter it answers.
        chapter: the notebook's number; `gptoss_kernels.course.solutions.chapter_NN` holds the solution under the
            exercise's name and its checker as `check_<name>`, which raises `Mistake`.
        strict: raise what the check found instead of printing it; default: whether GPTOSS_STRICT=1 is set.

    Raises:
        ValueError: the chapter has no exercise of that name.
        Mistake, or what `function` itself raised: under strict.
    """
    solutions = importlib.import_module(f".solutions.chapter_{chapter:02d}", __package__)
    name = function.__name__
    checker = getattr(solutions, f"check_{name}", None)
    if checker is None:
        exercises = sorted(key.removeprefix("check_") for key in vars(solutions) if key.startswith("check_"))
        raise ValueError(f"function: expected one of chapter {chapter}'s exercises {exercises}, got {name!r}")
    if strict is None:
        strict = os.environ.get("GPTOSS_STRICT") == "1"
    try:
        checker(function)
    except Exception as error:  # whatever a learner's function raises belongs in the verdict
        if strict:
            raise
        cause = _cause(error)
        if isinstance(cause, NotImplementedError) or STUB in str(error):
            verdict = "not attempted yet"
        elif isinstance(error, Mistake):
            verdict = f"not yet: {error}"
        else:
            verdict = f"it raised {type(cause).__name__}: {cause}"
        print(f"✗ {name}: {verdict}. Going on with the packaged solution.")
        return getattr(solutions, name)
    print(f"✓ {name}: right. Going on with yours.")
    return function


def _cause(error: Exception) -> BaseException:
    """What Triton's interpreter met inside a kernel, where it wraps it; otherwise the error itself."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error
