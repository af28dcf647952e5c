"""Is this set-up correct? Checks the combination at hand (attention, experts, packing, padding, adapters, loss).

`python -m gptoss_kernels.verify --help` says how; `verify` is the same as a function.
"""

from .report import Verdict, as_json, before_training, verify

__all__ = ["Verdict", "as_json", "before_training", "verify"]
