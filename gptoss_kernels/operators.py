"""What every torch.library operator of this package needs."""

import functools
from collections.abc import Callable

import torch


def implements(name: str) -> Callable:
    """Decorator: the function is the operator's implementation on every device, and stays callable by its own name."""

    def decorate(function: Callable) -> Callable:
        torch.library.impl(name, "default", function)
        return function

    return decorate


def unwatched(x: torch.Tensor) -> bool:
    """Whether nobody traces, counts or replaces operators now: then an operator's implementation may be called without
    the dispatcher, which takes the host as long as a short kernel takes the GPU."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def once_differentiable(backward: Callable) -> Callable:
    """torch.autograd.function.once_differentiable, but where no gradient of a gradient can be asked for, nothing is put
    around a call: that would take the host a fifth of what its backward pass of one kernel takes."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx, *grads):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either
