"""Exact, fast Triton kernels for finetuning gpt-oss, plugged into Hugging Face Transformers."""

from .attention.api import flash_attention

__all__ = ["flash_attention"]
__version__ = "0.1.0"
