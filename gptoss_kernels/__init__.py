"""Exact, fast Triton kernels for finetuning gpt-oss, plugged into Hugging Face Transformers."""

from .attention.api import flash_attention
from .experts.api import fused_experts
from .experts.reference import ExpertsLoRA
from .integrations.patch import patch_gpt_oss, unpatch_gpt_oss
from .integrations.transformers import (
    patch_flash_attention,
    register_when_loaded,
    triton_flash_attention,
    unpatch_flash_attention,
)
from .mxfp4.packed import PackedExperts

register_when_loaded()  # attn_implementation="gptoss_triton", experts_implementation="gptoss_triton"

__all__ = [
    "ExpertsLoRA",
    "PackedExperts",
    "flash_attention",
    "fused_experts",
    "patch_flash_attention",
    "patch_gpt_oss",
    "triton_flash_attention",
    "unpatch_flash_attention",
    "unpatch_gpt_oss",
]
__version__ = "0.1.0"
