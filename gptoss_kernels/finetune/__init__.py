"""Finetuning gpt-oss with TRL, PEFT and Accelerate: what `sft.py` and `generate.py` run.

Nothing here is imported by `import gptoss_kernels`; it needs the `training` extra.
"""
