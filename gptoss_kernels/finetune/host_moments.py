"""Moments that wait in the host's memory, and are on the GPU only while their tensor takes its step."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def moved(sizes: Sequence[int], share: float) -> list[int]:
    """Numbers of the tensors, of so many elements each, whose moments wait: at most that share of all elements, spread
    evenly, so that copies have work to hide behind."""
    chosen, seen, taken = [], 0, 0
    for number, size in enumerate(sizes):
        seen += size
        if share and taken + size <= share * seen:
            chosen.append(number)
            taken += size
    return chosen


class HostMoments:
    """A ring of buffers on the device, which tensors take in turns for the codes of their moments.

    Copies run on streams of their own, one for each direction: while a tensor steps, the next one's moments come in
    (the host queues work ahead of the GPU) and those of the last go out. On a CPU they are plain copies.

    Args:
        device: of the weights.
        largest: elements of the largest tensor. SLOTS buffers of two bytes each for so many elements are held.
    """

    SLOTS = 3

    def __init__(self, device: torch.device, largest: int):
        self.device = device
        make = lambda: torch.empty(largest, dtype=torch.uint8, device=device)  # noqa: E731
        self._slots = [[make() for _ in MOMENTS] for _ in range(self.SLOTS)]
        self._turn = 0
        self._in, self._out = (torch.cuda.Stream(device) for _ in "io") if device.type == "cuda" else (None, None)
        self._done: dict[object, torch.cuda.Event] = {}  # copies out, by tensor and by slot

    def zeros(self, size: int) -> torch.Tensor:
        """uint8 (size,) on the host, in memory that the GPU can read while the host does other things."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @contextlib.contextmanager
    def on_device(self, key: int, state: dict) -> Iterator[dict]:
        """The state with its moments on the device, for work on the current stream, which may change them.

        Args:
            key: of the tensor whose state it is.
            state: "exp_avg" and "exp_avg_sq" are uint8 (elements,), made by `zeros`.
        """
        slot, self._turn = self._turn, (self._turn + 1) % self.SLOTS
        buffers = [buffer[: len(state[name])] for name, buffer in zip(MOMENTS, self._slots[slot], strict=True)]
        if self._in is None:
            self._copy(buffers, [state[name] for name in MOMENTS])
            yield state | dict(zip(MOMENTS, buffers, strict=True))
            self._copy([state[name] for name in MOMENTS], buffers)
            return
        current = torch.cuda.current_stream(self.device)
        for event in filter(None, (self._done.get(("slot", slot)), self._done.get(key))):
            self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            self._copy(buffers, [state[name] for name in MOMENTS])
        current.wait_stream(self._in)
        yield state | dict(zip(MOMENTS, buffers, strict=True))
        self._out.wait_stream(current)
        with torch.cuda.stream(self._out):
            self._copy([state[name] for name in MOMENTS], buffers)
            self._done["slot", slot] = self._done[key] = self._out.record_event()

    @staticmethod
    def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        for a, b in zip(to, source, strict=True):
            a.copy_(b, non_blocking=True)

    def wait(self) -> None:
        """Returns when all moments are back in the host's memory."""
        if self._out is not None:
            self._out.synchronize()
