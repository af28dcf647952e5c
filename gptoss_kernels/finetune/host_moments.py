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
    """A ring on the device, of which tensors take as much as the codes of their moments need, one after the other.

    Copies run on streams of their own, one for each direction: while a tensor steps, the next one's moments come in
    (the host queues work ahead of the GPU) and those of the last go out. On a CPU they are plain copies.

    Args:
        device: of the weights.
        largest: elements of the largest tensor. Two bytes for each of ROOM times so many are held.
    """

    # One comes in, one steps, one goes out. Small tensors between large ones take little of it, so that copies in do
    # not wait for a large one's copy out: with a buffer for each of three tensors they would, for most of its time.
    ROOM = 3
    ALIGN = 256  # elements at which a tensor's part begins

    def __init__(self, device: torch.device, largest: int):
        self.device = device
        self._size = self.ROOM * self._aligned(largest)
        self._ring = [torch.empty(self._size, dtype=torch.uint8, device=device) for _ in MOMENTS]
        self._end = 0  # of the part that was taken last
        self._in, self._out = (torch.cuda.Stream(device) for _ in "io") if device.type == "cuda" else (None, None)
        self._done: dict[int, torch.cuda.Event] = {}  # copies out, by tensor
        self._parts: list[tuple[int, int, torch.cuda.Event]] = []  # and by part: from, to

    def _aligned(self, size: int) -> int:
        return -(-size // self.ALIGN) * self.ALIGN

    def _take(self, size: int) -> tuple[int, int, list[torch.cuda.Event]]:
        """The next part, from and to, and the copies out that it has to wait for."""
        start = self._end if self._end + size <= self._size else 0
        end = self._end = start + self._aligned(size)
        over = [part for part in self._parts if part[0] < end and start < part[1]]
        self._parts = [part for part in self._parts if part not in over]
        return start, end, [event for _, _, event in over]

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
        size = len(state[MOMENTS[0]])
        start, end, waits = self._take(size)
        buffers = [buffer[start : start + size] for buffer in self._ring]
        if self._in is None:
            self._copy(buffers, [state[name] for name in MOMENTS])
            yield state | dict(zip(MOMENTS, buffers, strict=True))
            self._copy([state[name] for name in MOMENTS], buffers)
            return
        current = torch.cuda.current_stream(self.device)
        for event in filter(None, (*waits, self._done.get(key))):
            self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            self._copy(buffers, [state[name] for name in MOMENTS])
        current.wait_stream(self._in)
        yield state | dict(zip(MOMENTS, buffers, strict=True))
        self._out.wait_stream(current)
        with torch.cuda.stream(self._out):
            self._copy([state[name] for name in MOMENTS], buffers)
            self._done[key] = self._out.record_event()
        self._parts.append((start, end, self._done[key]))

    @staticmethod
    def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        for a, b in zip(to, source, strict=True):
            a.copy_(b, non_blocking=True)

    def wait(self) -> None:
        """Returns when all moments are back in the host's memory."""
        if self._out is not None:
            self._out.synchronize()
