"""The parts of a gpt-oss model that exists already, through this package's kernels: a switch each, and a way back."""

import types
import weakref
from collections.abc import Callable

import torch

from ..backends import default_backend
from ..experts.reference import ExpertsLoRA
from .transformers import FA4_NAME, NAME, experts_forward, register

PARTS = ("attention", "experts", "rms_norm", "rope", "lora")

_before: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()
_rope_models: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
_original_rope: Callable | None = None


def patch_gpt_oss(
    model: torch.nn.Module,
    *,
    attention: bool | str = True,
    experts: bool = True,
    rms_norm: bool = True,
    rope: bool = True,
    lora: bool = True,
) -> torch.nn.Module:
    """Runs the parts of a gpt-oss model through this package's kernels, where their backend is Triton.

    Args:
        model: a gpt-oss model of Transformers, bare or inside PEFT; changed in place. Patching it again changes the
            parts that are asked for now and leaves none of the earlier patch.
        attention: attn_implementation="gptoss_triton"; or a name, "gptoss_triton" or "gptoss_fa4".
        experts: experts_implementation="gptoss_triton".
        rms_norm: the norms in one kernel, forward and backward.
        rope: the rotary embedding of queries and keys in one kernel; one function serves all gpt-oss models of the
            process, patched or not, and gives them the same numbers but for rounding.
        lora: PEFT's plain LoRA on linear layers as one function that neither casts the tokens to fp32 nor copies
            them, and on the experts (PEFT's target_parameters) as grouped products of the rank beside those of the
            frozen weights. Layers with dropout, merged or several adapters, or a variant, keep PEFT's own.

    Returns:
        model.

    Raises:
        ValueError: model holds no gpt-oss, or attention is another name.
    """
    if attention is True:
        attention = NAME
    if attention not in (False, NAME, FA4_NAME):
        raise ValueError(f"attention: expected True, False, {NAME!r} or {FA4_NAME!r}, got {attention!r}")
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    base = _base(model, modeling)
    unpatch_gpt_oss(model)
    register()
    config = base.config
    _before[base] = {"attention": config._attn_implementation, "experts": config._experts_implementation}
    if attention:
        base.set_attn_implementation(attention)
    if experts:
        base.set_experts_implementation(NAME)
    for module in model.modules():
        if rms_norm and isinstance(module, modeling.GptOssRMSNorm):
            module.forward = types.MethodType(_rms_norm_forward, module)
        elif lora and _is_lora_linear(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif lora and isinstance(module, modeling.GptOssMLP) and _is_param_wrapper(module.experts):
            module.experts.forward = types.MethodType(_lora_experts_forward, module.experts)
    if rope:
        _rope_models.add(base)
        _patch_rope(modeling)
    return model


def unpatch_gpt_oss(model: torch.nn.Module) -> torch.nn.Module:
    """Puts back what `patch_gpt_oss` replaced in the model; without a patch it changes nothing."""
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    base = _base(model, modeling)
    before = _before.pop(base, None)
    if before is None:
        return model
    if base.config._attn_implementation != before["attention"]:
        base.set_attn_implementation(before["attention"])
    if base.config._experts_implementation != before["experts"]:
        base.set_experts_implementation(before["experts"])
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in PATCHES:
            del module.forward
    _rope_models.discard(base)
    if not _rope_models:
        _unpatch_rope(modeling)
    return model


def _base(model: torch.nn.Module, modeling) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, modeling.GptOssPreTrainedModel):
            return module
    raise ValueError(f"model: expected a gpt-oss model of Transformers, got {type(model).__name__}")


# ----------------------------------------------------------------------------------------------------------- RMSNorm


def _rms_norm_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    if default_backend(hidden_states) != "triton":
        return type(self).forward(self, hidden_states)
    from ..layers.rms_norm import rms_norm

    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


# -------------------------------------------------------------------------------------------------------------- RoPE


def _rope(q, k, cos, sin, unsqueeze_dim=1):
    if unsqueeze_dim != 1 or q.shape[-1] not in (16, 32, 64, 128) or default_backend(q) != "triton":
        return _original_rope(q, k, cos, sin, unsqueeze_dim)
    from ..layers.rope import apply_rope

    return apply_rope(q, k, cos, sin)


def _patch_rope(modeling) -> None:
    global _original_rope
    if modeling.apply_rotary_pos_emb is not _rope:
        _original_rope = modeling.apply_rotary_pos_emb
        modeling.apply_rotary_pos_emb = _rope


def _unpatch_rope(modeling) -> None:
    if modeling.apply_rotary_pos_emb is _rope:
        modeling.apply_rotary_pos_emb = _original_rope


# -------------------------------------------------------------------------------------------------------------- LoRA


def _is_lora_linear(module: torch.nn.Module) -> bool:
    # By name, so that PEFT need not be installed.
    return type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"


def _lora_forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    names = [name for name in self.active_adapters if name in self.lora_A]
    plain = (
        not args
        and not kwargs
        and not self.disable_adapters
        and not self.merged
        and len(names) == 1
        and names[0] not in self.lora_variant
        and isinstance(self.lora_dropout[names[0]], torch.nn.Identity)
        and self.lora_A[names[0]].bias is None
        and self.lora_B[names[0]].bias is None
        and type(self.base_layer) is torch.nn.Linear
        and not self.base_layer.weight.requires_grad
        and (self.base_layer.bias is None or not self.base_layer.bias.requires_grad)
    )
    if not plain:
        return type(self).forward(self, x, *args, **kwargs)
    from ..layers.lora import lora_linear

    (name,) = names
    layer = self.base_layer
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return lora_linear(x, layer.weight, layer.bias, a, b, self.scaling[name])


def _is_param_wrapper(module: torch.nn.Module) -> bool:
    return type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "ParamWrapper"


def _lora_experts_forward(self, hidden_states, router_indices, routing_weights) -> torch.Tensor:
    """Forward of the outermost of the wrappers, one a projection, that PEFT puts around a layer's experts."""
    from .mxfp4 import PackedGptOssExperts

    adapters, plain, wrapper = {}, True, self
    while _is_param_wrapper(wrapper):
        names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.disable_adapters:
            plain = plain and not wrapper.merged  # PEFT unmerges then
        elif not wrapper.merged and names:
            plain = plain and len(names) == 1 and not wrapper._did_swap_in_out_features
            adapters[wrapper.parameter_name.replace("proj", "lora")] = _experts_lora(wrapper, names[0])
        wrapper = wrapper.base_layer
    inputs = hidden_states, router_indices, routing_weights
    if isinstance(wrapper, PackedGptOssExperts):
        if not plain:
            raise ValueError("adapters: expected one active adapter that is not merged over packed experts, got others")
        return wrapper(*inputs, **adapters)
    fused = (
        wrapper.config._experts_implementation == NAME
        and default_backend(hidden_states) == "triton"
        and not any(parameter.requires_grad for parameter in wrapper.parameters())
    )
    if plain and fused:
        return experts_forward(wrapper, *inputs, **adapters)
    return type(self).forward(self, *inputs)


def _experts_lora(wrapper: torch.nn.Module, name: str) -> ExpertsLoRA:
    """PEFT's weights (experts * rank, in) and (out, rank * experts): A by expert, B by rank and then expert."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.view(wrapper.num_experts, -1, a.shape[1])
    return ExpertsLoRA(a, b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1), wrapper.scaling[name])


PATCHES = (_rms_norm_forward, _lora_forward, _lora_experts_forward)
