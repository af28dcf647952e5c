"""Launches a Triton kernel with less work for the host than `kernel[grid](...)`.

Triton binds, specializes and looks up the arguments of every launch in Python, which for thirty of them takes longer
than a GPU needs for a short kernel. Here a launch like an earlier one goes straight to the kernel that Triton compiled
for that one; anything new goes through Triton. What makes launches alike is what Triton specializes on.
"""

from collections.abc import Callable, Hashable

import torch

MOST = 4096  # remembered launches; lengths that keep changing must not fill the memory

_compiled: dict[tuple, tuple] = {}
_varying: dict[object, tuple[bool, ...]] = {}


def launch(kernel, grid: tuple[int, ...], args: tuple, constants: dict, **options) -> None:
    """Runs kernel on args[0]'s device and its current stream.

    Args:
        kernel: a @triton.jit function whose tl.constexpr parameters come last.
        grid: number of programs, one to three dimensions.
        args: all other parameters in their order: tensors, numbers, None. args[0] is a tensor.
        constants: the tl.constexpr parameters, in their order.
        options: num_warps, num_stages and others that Triton knows.
    """
    device = args[0].get_device()
    if device < 0:  # the interpreter
        kernel[grid](*args, **constants, **options)
    elif device == torch.cuda.current_device():
        _launch(kernel, grid, args, constants, options, device)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, args, constants, options, device)


def _launch(kernel, grid, args, constants, options, device) -> None:
    varying = _varying.get(kernel.fn)
    if varying is None:
        varying = _varying[kernel.fn] = tuple(p.do_not_specialize for p in kernel.params)
    # Pointers by dtype and alignment, floats by being one, integers by their value or, if they vary, their width.
    # Most arguments are integers: they are asked for first, and by type(), which is faster than isinstance().
    like = [
        ((-(2**31) <= x < 2**31) if varies else x) if type(x) is int
        else (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor)
        else float if isinstance(x, float)
        else x
        for x, varies in zip(args, varying, strict=False)
    ]  # fmt: skip
    key = (kernel.fn, device, *like, *constants.values(), *options.values())
    known = _compiled.get(key)
    if known is None:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = kernel[grid](*args, **constants, **options), tuple(constants.values())
    else:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*args, *values)


class Prepared:
    """A launch of which all but its pointers stays the same: called with those, it does no more than it must.

    Args:
        kernel, grid, constants, options: as in `launch`.
        numbers: the parameters between the pointers and the tl.constexpr ones.
    """

    def __init__(self, kernel, grid: tuple[int, ...], numbers: tuple, constants: dict, **options):
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.constants, self.options = constants, options
        self.rest = (*numbers, *constants.values())
        self.runners: dict[tuple[bool, ...], Callable] = {}

    def __call__(self, *pointers) -> None:
        """pointers: tensors, of the same dtypes each time, TMA descriptors and None. The first is a tensor, whose
        device and current stream are taken."""
        device = pointers[0].get_device()
        if device < 0:  # the interpreter
            self.kernel[self.grid](*pointers, *self.numbers, **self.constants, **self.options)
        elif device == torch.cuda.current_device():
            self._launch(pointers)
        else:
            with torch.cuda.device(device):
                self._launch(pointers)

    def _launch(self, pointers) -> None:
        # Of a pointer Triton specializes on its alignment.
        aligned = tuple([isinstance(x, torch.Tensor) and x.data_ptr() % 16 == 0 for x in pointers])
        runner = self.runners.get(aligned)
        if runner is None:
            compiled = self.kernel[self.grid](*pointers, *self.numbers, **self.constants, **self.options)
            self.runners[aligned] = compiled[(*self.grid, 1, 1)[:3]]
        else:
            runner(*pointers, *self.rest)


def remembered(known: dict, key: Hashable, prepare: Callable):
    """known[key], made by prepare() if it is not there."""
    found = known.get(key)
    if found is None:
        if len(known) >= MOST:
            known.clear()
        found = known[key] = prepare()
    return found
