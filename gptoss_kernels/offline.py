"""Compile a Triton kernel for any NVIDIA architecture without a GPU, and read what the machine code needs.

Run it in a process where TRITON_INTERPRET is not set: an interpreted kernel has nothing to compile.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SHARED_MEMORY_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Largest shared memory of a block in bytes, by compute capability. Source: CUDA programming guide."""

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
_POINTERS |= {torch.bool: "*i1", torch.uint8: "*u8", torch.int64: "*i64"}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: bytes of shared memory a block, registers and spilled bytes a thread."""

    shared: int
    registers: int
    spills: int


def descriptor(dtype: torch.dtype, *block: int) -> str:
    """For `compile_offline`: a TMA descriptor of blocks as hopper_launch makes them."""
    from triton.experimental.gluon import language as gl

    bits = dtype.itemsize * 8
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128 if bits == 16 else 0, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{_POINTERS[dtype][1:]}{list(block)},{layout!r}>"


def compile_offline(
    kernel, arguments: dict, capability: int, num_warps: int, num_stages: int, maxnreg: int | None = None
) -> Resources:
    """Compile `kernel` (a @triton.jit function) for a compute capability such as 90.

    Args:
        arguments: name -> torch.dtype (a pointer to it, 16-byte aligned), "i32" (any integer), "i32:16" (an integer
            divisible by 16, as aligned strides are), "fp32" (a float), a TMA descriptor (see `descriptor`), or the
            value of a constexpr (bool, int, None).

    Raises:
        RuntimeError: the process runs Triton's interpreter.
        ValueError: `arguments` does not name the kernel's parameters, or has no value for a constexpr.
        Exception: as Triton raises, if the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        raise RuntimeError("compile_offline: the kernel is interpreted; unset TRITON_INTERPRET in a new process")
    if set(kernel.arg_names) != set(arguments):
        wrong = set(kernel.arg_names) ^ set(arguments)
        raise ValueError(f"arguments: expected the parameters of {kernel.__name__}, differs in {sorted(wrong)}")
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if kernel.params[position].is_constexpr and isinstance(value, torch.dtype):
            raise ValueError(f"arguments: expected a value for the constexpr {name}, got {value!r}")
        if isinstance(value, torch.dtype):
            signature[name] = _POINTERS[value]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, str) and value.startswith("tensordesc"):
            signature[name] = value
        elif value in ("i32", "i32:16", "fp32") and isinstance(value, str):
            signature[name] = value.removesuffix(":16")
            if value.endswith(":16"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    if hasattr(kernel, "is_gluon") and kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    # These kernels keep no arrays in local memory: whatever stack a thread has holds spilled registers.
    registers = int(re.search(r"REG:(\d+)", report).group(1))
    stack = int(re.search(r"STACK:(\d+)", report).group(1))
    return Resources(shared=compiled.metadata.shared, registers=registers, spills=stack)
