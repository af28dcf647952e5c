"""Launches a Triton kernel with less work for the host than `kernel[grid](...)`.

Triton binds, specializes and looks up the arguments of every launch in Python, which for thirty of them takes longer
than a GPU needs for a short kernel. Here a launch like an earlier one goes straight to the kernel that Triton compiled
for that one; anything new goes through Triton. What makes launches alike is what Triton specializes on.
"""

import torch

MOST = 4096  # remembered launches; lengths that keep changing must not fill the memory

_compiled: dict[tuple, tuple] = {}
_varying: dict[object, tuple[bool, ...]] = {}


def launch(kernel, grid: tuple[int, ...], args: tuple, constants: dict, **options) -> None:
    """Runs kernel on args[0]'s device and its current stream.

    Args:
        kernel: a @triton.jit function whose tl.constexpr parameters come last.
        grid: number of programs, one to three dimensions.
        args: all other parameters in their order: tensors, TMA descriptors, numbers, None. args[0] is a tensor.
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
    # Pointers by dtype and alignment, TMA descriptors by dtype and block, floats by being one, integers by their value
    # or, if they vary, their width.
    # Most arguments are integers: they are asked for first, and by type(), which is faster than isinstance().
    like = [
        ((-(2**31) <= x < 2**31) if varies else x) if type(x) is int
        else (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor)
        else float if isinstance(x, float)
        else (x.base.dtype, *x.block_shape) if hasattr(x, "block_shape")
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
