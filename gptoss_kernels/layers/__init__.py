"""The small layers between attention and experts: RMSNorm, rotary embedding, LoRA on a linear layer, the loss."""
