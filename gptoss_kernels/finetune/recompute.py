"""What is kept of each checkpointed layer's forward pass instead of being computed again in the backward pass."""

import functools

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainerCallback

from ..keep import contexts
from ..plan.memory import RESERVE, WHOLE_MARGIN, bytes_kept, layers_that_fit

ROUTING, ATTENTION, EXPERTS = (frozenset({name}) for name in ("routing", "attention", "experts"))


def keep(layer: torch.nn.Module, names: frozenset[str]) -> None:
    """Lets a checkpointed layer keep these results of this package's operators and compute the rest again.

    Args:
        layer: a GradientCheckpointingLayer of Transformers, in non-reentrant mode.
        names: out of "routing" (of tokens to experts), "attention" and "experts".
    """
    # gpt-oss itself draws nothing; LoRA's dropout, where it is asked for, must draw the same numbers again.
    draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in layer.modules())
    layer._gradient_checkpointing_func = functools.partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=functools.partial(contexts, names),
    )


class Recomputation(TrainerCallback):
    """Chooses what each checkpointed layer keeps: everything is computed again in the first step. What the peak of that
    step has left free is given to attention's results first, then to the experts'; what the next has left, to layers
    that keep all.

    Attributes:
        attention, experts, whole: number of layers that keep each.
    """

    # What a layer keeps besides attention's and the experts' results also depends on what is outside this package
    # (adapters, norms that are not fused), so that its estimate gets a margin.
    MARGIN = WHOLE_MARGIN

    def __init__(self, model: PreTrainedModel, mode: str, tokens: int, reserve: float = RESERVE):
        """mode: "lean" keeps the routing alone, "fast" all, "auto" what fits. tokens: of a forward pass, at most.
        reserve: share of the GPU's memory that stays free."""
        self.layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing") and
                       hasattr(layer, "self_attn")]  # fmt: skip
        self.config, self.dtype = model.config, model.dtype
        self.mode, self.tokens, self.reserve = mode, tokens, reserve
        self.attention = self.experts = self.whole = 0
        self._steps = 0

    def apply(self, attention: int, experts: int, whole: int = 0) -> None:
        """Lets the last `attention` and `experts` layers keep those results, and the last `whole` everything."""
        self.attention, self.experts, self.whole = attention, experts, whole
        count = len(self.layers)
        for index, layer in enumerate(self.layers):
            kept = ROUTING
            kept |= ATTENTION if index >= count - attention else frozenset()
            kept |= EXPERTS if index >= count - experts else frozenset()
            keep(layer, kept)
            layer.gradient_checkpointing = index < count - whole

    def fit(self, free: int) -> tuple[int, int]:
        """How many layers can keep attention's and the experts' results in this many bytes."""
        each_attention, each_experts, _ = bytes_kept(self.config, self.tokens, self.dtype.itemsize)
        return layers_that_fit(len(self.layers), free, each_attention, each_experts)

    def on_train_begin(self, args, state, control, **kwargs):
        count = len(self.layers)
        self.apply(*((count,) * 3 if self.mode == "fast" else (0, 0)))

    def on_step_end(self, args, state, control, **kwargs):
        if self.mode == "auto" and args.device.type == "cuda":
            self.use_free_memory(args.device)

    def use_free_memory(self, device: torch.device) -> None:
        """After the first step and the second: lets layers keep what fits into what the peak so far has left free."""
        self._steps += 1
        if self._steps > 2:
            return
        total, count = torch.cuda.get_device_properties(device).total_memory, len(self.layers)
        free = int(total * (1 - self.reserve)) - torch.cuda.max_memory_reserved(device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All processes choose the same: where weights are sharded, each recomputation gathers them from all.
            least = torch.tensor(free, device=device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            free = int(least)
        if self._steps == 1:
            self.apply(*self.fit(free))
        elif self.experts == count:
            rest = bytes_kept(self.config, self.tokens, self.dtype.itemsize)[2]
            self.apply(count, count, max(0, min(count, int(free // (self.MARGIN * rest)))))
        torch.cuda.empty_cache()  # what the step has cut its memory into does not fit what is kept now
