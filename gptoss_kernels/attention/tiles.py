"""Tile sizes: a static table by architecture class, head_dim and dtype. No search at the first call. And which GPUs
have kernels of their own.

GPTOSS_AUTOTUNE=1 times `CANDIDATES` at the first launch of each (kernel, architecture, head_dim, dtype, window) and
prints the row to paste into `TABLE`. Every row must pass the offline-compile tests (shared memory, spills).
"""

import functools
import os
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys a program works on at a time, and how Triton compiles it."""

    block_m: int  # query rows
    block_n: int  # keys
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread may take, where fewer let one more program onto a multiprocessor
    heads: int = 1  # of a kv group that share a tile's rows and keys, where it divides the group; not in dkdv

    @property
    def options(self) -> dict:
        """As Triton's launch options."""
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)
        return options if self.maxnreg is None else options | dict(maxnreg=self.maxnreg)

    def heads_of(self, group: int) -> int:
        """Heads of a kv group of this size that share a tile."""
        return self.heads if group % self.heads == 0 else 1


# Compute capability -> class. What separates the classes here is shared memory a block and the matrix units:
# 64 KiB (T4); 163 KiB (A100); 99 KiB (A10, L4, RTX); 227 KiB with wgmma (H100) or tcgen05 (B200).
ARCHITECTURES = {75: "turing", 80: "ampere", 87: "ampere", 86: "small", 89: "small", 120: "small", 121: "small"}
ARCHITECTURES |= {90: "hopper", 100: "blackwell", 103: "blackwell"}

# (class, kernel) -> rows (largest head_dim the row serves, half-precision tile of full layers, of windowed layers).
TABLE = {
    ("turing", "forward"): [
        (64, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        (128, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ],
    ("turing", "dkdv"): [(64, Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)), (128, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))],
    ("turing", "dq"): [(64, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)), (128, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))],
    ("ampere", "forward"): [
        (64, Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        (128, Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    ],
    ("ampere", "dkdv"): [(64, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), (128, Tile(32, 64, 4, 2), Tile(32, 64, 4, 2))],
    ("ampere", "dq"): [(64, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), (128, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2))],
    ("small", "forward"): [
        (64, Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
        (128, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ],
    ("small", "dkdv"): [(64, Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)), (128, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))],
    ("small", "dq"): [(64, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)), (128, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))],
    ("hopper", "forward"): [
        (64, Tile(128, 64, 4, 3), Tile(64, 32, 4, 3, heads=4)),
        (128, Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    ],
    ("hopper", "dkdv"): [(64, Tile(32, 64, 4, 4), Tile(32, 64, 4, 2)), (128, Tile(32, 64, 4, 2), Tile(32, 64, 4, 2))],
    ("hopper", "dq"): [
        (64, Tile(64, 32, 4, 3), Tile(64, 32, 4, 3, 96, heads=2)),
        (128, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ],
}
TABLE |= {("blackwell", kernel): TABLE["hopper", kernel] for kernel in ("forward", "dkdv", "dq")}

# fp32 products run without matrix units ("ieee"): small tiles, whose operands and sums fit in registers.
FULL_PRECISION = Tile(32, 32, 8, 1)
FULL_PRECISION_TURING = Tile(16, 16, 4, 1)  # 64 KiB of shared memory

# The interpreter takes the same time for a program whatever its tile; 32 still gives tests several tiles.
INTERPRETER = Tile(32, 32, 4, 1, heads=2)

LARGEST_BLOCK = 128  # no tile has more rows; a multiple of all block_m

CANDIDATES = [
    Tile(m, n, warps, stages)
    for m in (32, 64, 128)
    for n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3, 4)
    if m * n >= 2048
]
SHARED = (1, 2, 4, 8)  # heads of a tile, where a window leaves each few keys


def architecture(capability: tuple[int, int]) -> str:
    """Class of a CUDA compute capability; a newer one is taken for the newest class that is known."""
    number = 10 * capability[0] + capability[1]
    known = max((n for n in ARCHITECTURES if n <= number), default=75)
    return ARCHITECTURES[known]


def table_tile(arch: str, kernel: str, head_dim: int, dtype: torch.dtype, windowed: bool) -> Tile:
    """The table's tile for kernel "forward", "dkdv" or "dq" on an architecture class."""
    if dtype == torch.float32:
        return FULL_PRECISION_TURING if arch == "turing" else FULL_PRECISION
    row = next(row for row in TABLE[arch, kernel] if head_dim <= row[0])
    return row[2] if windowed else row[1]


@functools.cache
def _device_architecture(index: int) -> str:
    return architecture(torch.cuda.get_device_capability(index))


@functools.cache
def _hopper_launch(index: int):
    if _device_architecture(index) != "hopper" or os.environ.get("GPTOSS_GLUON") == "0":
        return None
    try:
        from . import hopper_launch
    except (ImportError, AttributeError):  # a Triton whose Gluon, which is experimental, is not the one we know
        return None
    return hopper_launch


def hopper_kernels(*tensors: torch.Tensor):
    """The module hopper_launch if its kernels take these tensors on their GPU, else None. GPTOSS_GLUON=0, read at the
    first call, does without them."""
    module = _hopper_launch(tensors[0].device.index)
    return module if module is not None and module.supports(*tensors) else None


_tuned: dict[tuple, Tile] = {}


def select(kernel: str, q: torch.Tensor, windowed: bool, interpreted: bool, launch) -> Tile:
    """The tile for a launch on q. `launch(tile)` runs the kernel once: used only under GPTOSS_AUTOTUNE=1."""
    if interpreted:
        return INTERPRETER
    arch = _device_architecture(q.device.index)
    if os.environ.get("GPTOSS_AUTOTUNE") != "1":
        return table_tile(arch, kernel, q.shape[-1], q.dtype, windowed)
    key = (arch, kernel, q.shape[-1], q.dtype, windowed)
    if key not in _tuned:
        _tuned[key] = _search(key, SHARED if windowed and kernel != "dkdv" else (1,), launch)
    return _tuned[key]


def _search(key: tuple, heads: tuple[int, ...], launch) -> Tile:
    import triton

    best, best_ms = None, float("inf")
    for tile in [tile._replace(heads=number) for tile in CANDIDATES for number in heads]:
        try:
            ms = triton.testing.do_bench(lambda tile=tile: launch(tile), warmup=5, rep=20, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
        if ms < best_ms:
            best, best_ms = tile, ms
    print(f"GPTOSS_AUTOTUNE {key}: {best} {best_ms:.3f} ms", flush=True)
    return best
