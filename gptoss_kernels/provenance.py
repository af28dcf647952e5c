"""Where a measured figure comes from: GPU, versions, date, commit."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from .lane import version


def provenance(device: torch.device) -> dict[str, str]:
    """Where a row comes from: gpu, torch, triton, transformers, date (UTC), commit."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"none: CPU {platform.machine()}"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": version("triton") or "",
        "transformers": version("transformers") or "",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """GPTOSS_COMMIT, or this checkout's commit with "-dirty" if tracked files differ, or "unknown"."""
    if given := os.environ.get("GPTOSS_COMMIT"):
        return given
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
