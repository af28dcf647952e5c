"""What is kept of each checkpointed layer's forward pass instead of being computed again in the backward pass."""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, TrainerCallback

ATTENTION = frozenset({"gptoss_kernels::attention_forward"})
EXPERTS = frozenset({"gptoss_kernels::experts_forward"})
ROUTING = frozenset({"aten::topk"})  # a few bytes a token, so that the recomputation routes as the forward did


def keep(layer: torch.nn.Module, operators: frozenset[str]) -> None:
    """Lets a checkpointed layer keep the results of these operators and compute the rest again.

    Args:
        layer: a GradientCheckpointingLayer of Transformers, in non-reentrant mode.
        operators: qualified names of torch operators, such as "gptoss_kernels::attention_forward".
    """
    layer._gradient_checkpointing_func = functools.partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,  # gpt-oss has no dropout in its layers
        context_fn=functools.partial(create_selective_checkpoint_contexts, _policy(operators)),
    )


@functools.cache
def _policy(operators: frozenset[str]) -> Callable:
    def policy(context, operator, *args, **kwargs):
        kept = operator.name() in operators or operator.name().rpartition(".")[0] in operators
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def bytes_kept(config, tokens: int, itemsize: int) -> tuple[int, int]:
    """Bytes a layer holds if it keeps attention's results, and if it keeps the experts', for this many tokens."""
    attention = config.num_attention_heads * (config.head_dim * itemsize + 4)
    experts = (
        config.num_experts_per_tok * (2 * config.intermediate_size * itemsize + 20) + config.hidden_size * itemsize
    )
    return tokens * attention, tokens * experts


class Recomputation(TrainerCallback):
    """Chooses what each checkpointed layer keeps: everything is computed again in the first step, and what the peak of
    that step has left free is given to attention's results first, then to the experts', layer by layer.

    Attributes:
        attention, experts: number of layers that keep each.
    """

    def __init__(self, model: PreTrainedModel, mode: str, tokens: int, reserve: float = 0.06):
        """mode: "lean" keeps the routing alone, "fast" all, "auto" what fits. tokens: of a forward pass, at most.
        reserve: share of the GPU's memory that stays free."""
        self.layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing") and
                       hasattr(layer, "self_attn")]  # fmt: skip
        self.config, self.dtype = model.config, model.dtype
        self.mode, self.tokens, self.reserve = mode, tokens, reserve
        self.attention = self.experts = 0
        self._settled = False

    def apply(self, attention: int, experts: int) -> None:
        """Lets the last `attention` and `experts` layers keep those results."""
        self.attention, self.experts = attention, experts
        count = len(self.layers)
        for index, layer in enumerate(self.layers):
            kept = ROUTING
            kept |= ATTENTION if index >= count - attention else frozenset()
            kept |= EXPERTS if index >= count - experts else frozenset()
            keep(layer, kept)

    def fit(self, free: int) -> tuple[int, int]:
        """How many layers can keep attention's and the experts' results in this many bytes."""
        each_attention, each_experts = bytes_kept(self.config, self.tokens, self.dtype.itemsize)
        count = len(self.layers)
        attention = max(0, min(count, free // each_attention))
        experts = max(0, min(count, (free - attention * each_attention) // each_experts)) if attention == count else 0
        return attention, experts

    def on_train_begin(self, args, state, control, **kwargs):
        count = len(self.layers)
        self.apply(*((count, count) if self.mode == "fast" else (0, 0)))

    def on_step_end(self, args, state, control, **kwargs):
        if self.mode == "auto" and args.device.type == "cuda" and not self._settled:
            self.use_free_memory(args.device)
        self._settled = True

    def use_free_memory(self, device: torch.device) -> None:
        """Lets as many layers keep results as fit into what the peak so far has left free."""
        total = torch.cuda.get_device_properties(device).total_memory
        free = int(total * (1 - self.reserve)) - torch.cuda.max_memory_reserved(device)
        self.apply(*self.fit(free))
        torch.cuda.empty_cache()  # what the first step has cut its memory into does not fit what is kept now
