"""Launches a Triton kernel with less work for the host than `kernel[grid](...)`.

Triton binds, specializes and looks up the arguments of every launch in Python, which for thirty of them takes longer
than a GPU needs for a short kernel. Here a launch like an earlier one goes straight to the kernel that Triton compiled
for that one; anything new goes through Triton. What makes launches alike is what Triton specializes on. Addresses take
the place of tensors, since Triton asks the driver about each tensor.
"""

from collections.abc import Callable, Hashable

import torch
import triton

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
    # Pointers by dtype, device (Triton refuses a CPU's) and alignment, floats by being one, integers by their value or,
    # if they vary, their width. Most are integers: they are asked for first, and by type(), faster than isinstance().
    like, values = [], []
    for x, varies in zip(args, varying, strict=False):
        if type(x) is int:
            like.append((-(2**31) <= x < 2**31) if varies else x)
        elif isinstance(x, torch.Tensor):
            address = x.data_ptr()
            like += x.dtype, x.get_device(), address % 16 == 0
            x = address
        else:
            like.append(float if isinstance(x, float) else x)
        values.append(x)
    key = (kernel.fn, device, *like, *constants.values(), *options.values())
    known = _compiled.get(key)
    if known is None:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = runner(kernel[grid](*args, **constants, **options)), tuple(constants.values())
    else:
        run, rest = known
        run((*grid, 1, 1)[:3], device, *values, *rest)


def runner(compiled) -> Callable[..., None]:
    """What launches a compiled kernel that has run before, on a device's current stream: run(grid, device, *arguments).

    It is what compiled[grid] does, as torch's own compiler does it: without a description of the launch that nobody
    asks for, unless hooks have been set.
    """
    knobs, current_stream = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(grid, device, *arguments):
        enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a chain of hooks, one hook, or None
            compiled[grid](*arguments)
        else:
            run(*grid, current_stream(device), function, metadata, None, None, None, *arguments)

    return launch


class Prepared:
    """A launch of which all but its pointers stays the same: called with those, it does no more than it must.

    Args:
        kernel, grid, constants, options: as in `launch`.
        numbers: the parameters between the pointers and the tl.constexpr ones.
    """

    def __init__(self, kernel, grid: tuple[int, ...], numbers: tuple, constants: dict, **options):
        self.kernel, self.grid, self.numbers = kernel, (*grid, 1, 1)[:3], numbers
        self.constants, self.options = constants, options
        self.rest = (*numbers, *constants.values())
        self.aligned: Callable | None = None  # runs where all pointers are multiples of 16
        self.others: dict[tuple[bool, ...], Callable] = {}  # by which of them are

    def __call__(self, *pointers) -> None:
        """pointers: tensors, of the same dtypes each time, TMA descriptors and None. The first is a tensor, whose
        device and current stream are taken."""
        device = pointers[0].get_device()
        if device < 0:  # the interpreter
            self.kernel[self.grid](*pointers, *self.numbers, **self.constants, **self.options)
        elif device == torch.cuda.current_device():
            self._launch(pointers, device)
        else:
            with torch.cuda.device(device):
                self._launch(pointers, device)

    def _launch(self, pointers, device) -> None:
        addresses, bits = [], 0
        for x in pointers:
            if isinstance(x, torch.Tensor):
                x = x.data_ptr()
                bits |= x
            addresses.append(x)
        # What Triton specializes a pointer on is whether it is a multiple of 16.
        if bits % 16:
            which = tuple([type(x) is int and x % 16 == 0 for x in addresses])
            run = self.others.get(which)
        else:
            run = self.aligned
        if run is None:
            run = runner(self.kernel[self.grid](*pointers, *self.numbers, **self.constants, **self.options))
            if bits % 16:
                self.others[which] = run
            else:
                self.aligned = run
        else:
            run(self.grid, device, *addresses, *self.rest)


def remembered(known: dict, key: Hashable, prepare: Callable, interpreted: bool):
    """known[key], made by prepare() if it is not there; made each time for the interpreter."""
    if interpreted:
        return prepare()
    found = known.get(key)
    if found is None:
        if len(known) >= MOST:
            known.clear()
        found = known[key] = prepare()
    return found
