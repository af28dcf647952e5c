"""Results that a checkpointed layer keeps, so that recomputing the layer does not compute them again.

torch's selective checkpointing asks a policy for every operator of a layer, which costs the host more time than a GPU
needs for some of them. Here the few operators that are worth keeping ask for themselves.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

_thread = threading.local()


class Tape:
    """What one layer keeps between its forward pass and its recomputation.

    names: of the results that are kept, out of "attention", "experts" and "routing".
    """

    def __init__(self, names: frozenset[str]):
        self.names = names
        self.results: dict[str, list[tuple]] = {name: [] for name in names}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        for results in self.results.values():
            results.clear()
        with _current(self, None):
            yield

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        with _current(self, dict.fromkeys(self.names, 0)):
            yield


@contextlib.contextmanager
def _current(tape: Tape, positions: dict[str, int] | None) -> Iterator[None]:
    before = getattr(_thread, "current", None)
    _thread.current = tape, positions
    try:
        yield
    finally:
        _thread.current = before


def kept(name: str, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """compute()'s tensors; in the recomputation of a layer that keeps `name`, those of its forward pass.

    Raises:
        RuntimeError: one of them was changed in place since.
    """
    current = getattr(_thread, "current", None)
    if current is None or name not in current[0].names:
        return compute()
    tape, positions = current
    if positions is None:
        results = compute()
        tape.results[name].append(tuple((x.detach(), x._version) for x in results))
        return results
    entry = tape.results[name][positions[name]]
    positions[name] += 1
    if any(x._version != version for x, version in entry):
        raise RuntimeError(f"{name}: a result that was kept for the backward pass was changed in place")
    return tuple(x.detach() for x, _ in entry)


def contexts(names: frozenset[str]) -> tuple:
    """The forward and the recomputation context of one call, for `torch.utils.checkpoint`'s context_fn."""
    tape = Tape(names)
    return tape.recording(), tape.replaying()
