"""Exact causal attention with learned sinks: `flash_attention` and its definition in plain PyTorch."""
