"""OpenAI's 4-bit weight format: read, dequantized, quantized."""
