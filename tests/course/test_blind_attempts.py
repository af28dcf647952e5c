"""Wrong attempts by someone who had not seen the checkers: each is rejected, and with a hint wherever it returns."""

import importlib

import pytest

pytest.importorskip("triton")

from gptoss_kernels.course import check

from .blind_attempts import ATTEMPTS

# Not mistakes after all: int64 starts are compared with keys just as int32 ones are.
RIGHT = {"document_starts__2"}
# Meant for another number of dimensions than the box says: what they raise names the place better than a hint could.
RAISE = {"softmax_backward_with_sink__3": IndexError, "delta_with_lse__3": RuntimeError}


def checker(chapter, name):
    solutions = importlib.import_module(f"gptoss_kernels.course.solutions.chapter_{chapter:02d}")
    return getattr(solutions, f"check_{name}")


@pytest.mark.parametrize(
    ("chapter", "name", "attempt", "mistake"), ATTEMPTS, ids=[function.__name__ for _, _, function, _ in ATTEMPTS]
)
def test_is_rejected_with_a_hint(chapter, name, attempt, mistake):
    if attempt.__name__ in RIGHT:
        checker(chapter, name)(attempt)
        return
    with pytest.raises(RAISE.get(attempt.__name__, check.Mistake)) as caught:
        checker(chapter, name)(attempt)
    print(f"{name}: {mistake} -> {caught.value}")


def test_three_attempts_an_exercise():
    exercises = [(chapter, name) for chapter, name, _, _ in ATTEMPTS]
    assert all(exercises.count(exercise) == 3 for exercise in exercises)
