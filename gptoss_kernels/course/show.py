"""Shows the package's own source in a notebook, so that what is read is what runs."""

import inspect
import textwrap
from pathlib import Path

from IPython.display import Markdown, display

ROOT = Path(__file__).parents[2]


def source(thing, start: str | None = None, end: str | None = None) -> None:
    """Displays the source of a function, class, module or Triton kernel of the package, or a part of it.

    Args:
        thing: what `inspect.getsource` takes, or a @triton.jit function.
        start: the first line shown is the first that contains this text; default the first of all.
        end: the last line shown is the first after it that contains this text; default the last of all.

    Raises:
        ValueError: no line contains `start`, or none after it `end`.
    """
    thing = inspect.unwrap(getattr(thing, "fn", thing))  # what @triton.jit and other decorators wrap
    lines, first = inspect.getsourcelines(thing)
    begin = _find(lines, start, 0, "start", thing) if start else 0
    stop = _find(lines, end, begin, "end", thing) if end else len(lines) - 1
    first = max(first, 1) + begin
    file = Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()
    shown = textwrap.dedent("".join(lines[begin : stop + 1])).rstrip()
    display(Markdown(f"`{file}`, lines {first}–{first + stop - begin}\n```python\n{shown}\n```"))


def _find(lines: list[str], text: str, begin: int, name: str, thing) -> int:
    for index in range(begin, len(lines)):
        if text in lines[index]:
            return index
    raise ValueError(f"{name}: expected text in the source of {thing.__name__}, no line contains {text!r}")
