"""What a function writes to memory, and what autograd keeps of it."""

from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Ledger(TorchDispatchMode):
    """`with Ledger() as book:` counts PyTorch's operators that write memory, and the bytes that they write.

    Attributes:
        calls, bytes: {"products": …, "rest": …}: matrix products and everything else. Views write nothing and are not
            counted; neither is what a Triton kernel writes into a tensor that was made before.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = {"products": 0, "rest": 0}, {"products": 0, "rest": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [out.alias_info for out in function._schema.returns]
        if all(alias is None or alias.is_write for alias in aliases):
            part = "products" if "mm" in function.name() else "rest"
            outs = result if isinstance(result, (tuple, list)) else [result]
            self.calls[part] += 1
            self.bytes[part] += sum(out.nbytes for out in outs if isinstance(out, torch.Tensor))
        return result


def kept_bytes(function: Callable[[], object], ignore: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of function(), each storage once.

    Args:
        function: called without arguments.
        ignore: tensors that are not counted, such as parameters, which are there anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes(), storage  # held, so that its address is not given away
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())
