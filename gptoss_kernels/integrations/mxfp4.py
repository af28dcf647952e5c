"""gpt-oss of Transformers whose experts stay in MXFP4, under the names that OpenAI's checkpoints give them."""

import copy

import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ..backends import default_backend
from ..experts.reference import ExpertsLoRA
from ..mxfp4.packed import PackedExperts
from ..mxfp4.reference import BYTES, GROUP, dequantize
from .transformers import NAME, experts_forward

PROJECTIONS = ("gate_up_proj", "down_proj")


class PackedGptOssExperts(GptOssExperts):
    """gpt-oss's experts with frozen weights in MXFP4; biases are parameters as before.

    Buffers, for gate_up_proj and down_proj: `NAME_blocks` uint8 (experts, out, in / 32, 16) and `NAME_scales` uint8
    (experts, out, in / 32). `gate_up_proj` and `down_proj` are `PackedExperts` of them.

    experts_implementation="gptoss_triton" computes from the packed weights. Every other implementation, and this one
    where Triton does not run, gets this layer's weights made dense, and again in the backward pass: no dense weight
    outlives its layer. PEFT can target both projections (target_parameters); `patch_gpt_oss` then runs the adapters.

    Args:
        config: a GptOssConfig; hidden_size and intermediate_size in multiples of 32.

    Raises:
        ValueError: sizes that MXFP4's groups do not divide.
    """

    def __init__(self, config):
        super().__init__(config)
        for name in PROJECTIONS:
            experts, columns, rows = getattr(self, name).shape
            if columns % GROUP:
                raise ValueError(
                    f"config: expected hidden and intermediate sizes in multiples of {GROUP}, got {columns}"
                )
            delattr(self, name)
            groups = columns // GROUP
            self.register_buffer(f"{name}_blocks", torch.empty(experts, rows, groups, BYTES, dtype=torch.uint8))
            self.register_buffer(f"{name}_scales", torch.empty(experts, rows, groups, dtype=torch.uint8))

    @property
    def gate_up_proj(self) -> PackedExperts:
        return PackedExperts(self.gate_up_proj_blocks, self.gate_up_proj_scales, self.gate_up_proj_bias.dtype)

    @property
    def down_proj(self) -> PackedExperts:
        return PackedExperts(self.down_proj_blocks, self.down_proj_scales, self.down_proj_bias.dtype)

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        # PEFT looks for the parameters that an adapter may target by asking each module for its own, in this order.
        own = dict(super().named_parameters(prefix, recurse, remove_duplicate))
        if not recurse:
            dot = f"{prefix}." if prefix else ""
            own = {f"{dot}{name}": getattr(self, name) for name in PROJECTIONS} | own
        yield from own.items()

    def forward(self, hidden_states, router_indices=None, routing_weights=None, **adapters: ExpertsLoRA):
        """Transformers' forward; adapters may be gate_up_lora and down_lora, as `fused_experts` takes them."""
        inputs = hidden_states, router_indices, routing_weights
        if self.config._experts_implementation == NAME and default_backend(hidden_states) == "triton":
            return experts_forward(self, *inputs, **adapters)
        return checkpoint(self._forward_dense, *inputs, adapters, use_reentrant=False)

    def _forward_dense(self, hidden_states, router_indices, routing_weights, adapters):
        layer = copy.copy(self)
        layer.__class__ = GptOssExperts
        for name in PROJECTIONS:
            packed = getattr(self, name)
            weight = dequantize(packed.blocks, packed.scales, packed.dtype)
            if lora := adapters.get(name.replace("proj", "lora")):
                with torch.autocast(weight.device.type, enabled=False):
                    factors = (x.mT.to(weight.dtype) for x in lora[:2])
                    weight = torch.baddbmm(weight, *factors, alpha=lora.scaling)
            vars(layer)[name] = weight
        return layer(hidden_states, router_indices, routing_weights)


def pack_experts(model: torch.nn.Module) -> torch.nn.Module:
    """Gives a gpt-oss model on the "meta" device packed experts, on "meta" as well. Returns the model.

    Args:
        model: a GptOssForCausalLM without weights: those of its experts are not quantized, but replaced.
    """
    with torch.device("meta"):
        for layer in model.model.layers:
            layer.mlp.experts = PackedGptOssExperts(model.config).to(model.dtype)
    return model


def packed_parameters(model: torch.nn.Module) -> int:
    """Number of weights that the model holds in MXFP4: none of them is a parameter."""
    layers = (module for module in model.modules() if isinstance(module, PackedGptOssExperts))
    return sum(getattr(layer, name).numel() for layer in layers for name in PROJECTIONS)
