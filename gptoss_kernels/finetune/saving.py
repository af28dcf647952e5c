"""Saves that are whole or not there: written beside, brought to the disk, then renamed."""

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = "_unfinished"
ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk is to Python, torch.save and safetensors


def clear(folder: Path) -> None:
    """Removes what an earlier save in `folder` did not finish."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _all_to_disk(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _to_disk(path)


def rename_folder(source: Path, target: Path) -> None:
    """Makes source target, in one step; a target that is there already is moved aside before and deleted after.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    _all_to_disk(source)
    aside = source.with_name(f"{source.name}.old")
    if target.exists():
        target.rename(aside)
    source.rename(target)
    _to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def rename_files(source: Path, target: Path) -> None:
    """Moves every file of the folder source into target, each in one step over what is there.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    _all_to_disk(source)
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    _to_disk(target)
