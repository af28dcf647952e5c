"""The package inside Hugging Face Transformers."""
