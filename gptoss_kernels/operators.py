"""What every torch.library operator of this package needs."""

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
