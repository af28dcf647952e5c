"""AdamW for weights in bf16: moments in 8 bits, rounding that loses nothing on average, one kernel a tensor."""
