"""gpt-oss's mixture-of-experts layer: grouped matrix products with everything between them fused."""
