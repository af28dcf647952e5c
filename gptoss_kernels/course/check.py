"""Exercises: `attempt` checks a learner's function and hands back one to go on with."""

import importlib
from collections.abc import Callable


class Mistake(Exception):
    """A wrong attempt; the message names the likely mistake."""


def attempt(function: Callable, *, chapter: int, strict: bool = False) -> Callable:
    """Checks `function` and prints the verdict; returns it if it is right, otherwise the packaged solution.

    So a notebook runs to its end for someone who has solved nothing.

    Args:
        function: the learner's; its name says which exercise of the chapter it answers.
        chapter: the notebook's number; `gptoss_kernels.course.solutions.chapter_NN` holds the solution under the
            exercise's name and its checker as `check_<name>`, which raises `Mistake`.
        strict: raise what the check found instead of printing it.

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
    try:
        checker(function)
    except Exception as error:  # whatever a learner's function raises belongs in the verdict
        if strict:
            raise
        if isinstance(error, NotImplementedError):
            verdict = "not attempted yet"
        elif isinstance(error, Mistake):
            verdict = f"not yet: {error}"
        else:
            verdict = f"it raised {type(error).__name__}: {error}"
        print(f"✗ {name}: {verdict}. Going on with the packaged solution.")
        return getattr(solutions, name)
    print(f"✓ {name}: right. Going on with yours.")
    return function
