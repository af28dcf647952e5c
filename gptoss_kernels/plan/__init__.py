"""Will it fit, and how fast? Memory by part and time of a training step, predicted from shapes: `python -m
gptoss_kernels.plan --help`."""

from .memory import Memory, Settings, predict
from .speed import Speed, step_time

__all__ = ["Memory", "Settings", "Speed", "predict", "step_time"]
