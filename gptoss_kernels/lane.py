"""Which of Triton's modes this process is in: compiled for a GPU, interpreted on the CPU, or no Triton at all.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process is one or the other for good.
"""

import importlib.metadata
import importlib.util
import os
import sys

from packaging.version import Version


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


_TRITON = _find_triton()  # once, here: torch.compile cannot trace the search


def triton_available() -> bool:
    """Whether Triton can be imported (it has no wheels for macOS and Windows)."""
    return _TRITON


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def triton_mode() -> str | None:
    """How this process loaded Triton: "interpreter" or "compiler"; None if it has not been loaded yet."""
    language = sys.modules.get("triton.language")
    if language is None:
        return None
    # Triton decorates its own library (`sum`, `cdiv`, …) on import, in the mode that the process then keeps.
    return "interpreter" if type(language.sum).__name__ == "InterpretedFunction" else "compiler"


def check_lane(interpreted: bool) -> None:
    """Raises RuntimeError where TRITON_INTERPRET has changed since the kernels were decorated for the interpreter, or
    not for it."""
    if interpreting() != interpreted:
        was, now = ("on", "off") if interpreted else ("off", "on")
        raise RuntimeError(
            f"TRITON_INTERPRET was {was} when Triton was loaded and is {now} now: a process is one or the other; set "
            "it before anything imports Triton (transformers' models do), or restart"
        )


def interpreter_problem(triton: str | None = None, numpy: str | None = None) -> str | None:
    """Why Triton's interpreter would fail with these versions (default: the installed ones), with the remedy."""
    triton, numpy = triton or version("triton"), numpy or version("numpy")
    if triton and numpy and Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return (
            f"Triton's interpreter: expected numpy < 2.4 with Triton {triton}, or a newer Triton; got numpy {numpy}, "
            'with which its loops fail. Remedy: pip install "numpy<2.4"'
        )
    return None


def version(package: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
