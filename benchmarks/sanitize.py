"""Every kernel once, at a small size, for compute-sanitizer to look over:

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize > LOG; python -m benchmarks.sanitize judge LOG
compute-sanitizer --tool racecheck python -m benchmarks.sanitize control > LOG; python -m benchmarks.sanitize judge LOG

Caching of PyTorch's allocator is off, so that a read beside a tensor is one beside its allocation. Lists the kernels
that ran; the exit code is 2 if one of the package's was not among them.

racecheck takes Triton's own hand-over at a `gl.warp_specialize` for a race where barriers in shared memory are in use
as well: the first warps write what the others are to do, all meet at the program's barrier 1, the others read it and
all meet again. `control` runs three kernels of which nothing but that hand-over writes to shared memory; it reports the
third, which has such a barrier. `judge` counts the hazards of the hand-over, and prints all of which either access
belongs to anything else; the exit code is 1 if there is one.
"""

import os
import re
import sys

if __name__ == "__main__":  # not where tests import this: the whole process would go without
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

from collections import Counter
from pathlib import Path

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from gptoss_kernels import flash_attention, fused_experts
from gptoss_kernels.testing import AttentionCase, ExpertsCase

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {
    "forward_kernel", "dq_kernel", "dkdv_kernel", "activation_kernel", "combine_kernel", "activation_backward_kernel",
    "expert_sum_kernel", "dequantize_kernel", "rms_norm_kernel", "rms_norm_backward_kernel", "rope_kernel",
    "cross_entropy_kernel", "adamw_kernel",
}  # fmt: skip
HOPPER = {"forward_hopper_kernel", "dq_hopper_kernel", "dkdv_hopper_kernel"}


def draw(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


def attention() -> None:
    heads = {"q_heads": 8, "kv_heads": 2}  # so that windowed tiles hold several
    plain = {"q_len": 70, "head_dim": 64, "dtype": F32, **heads}  # fp32: the kernels for every architecture
    large = {"q_len": 1100, "head_dim": 64, "dtype": BF16, **heads}  # Hopper's own, on Hopper
    for shape in (plain, plain | {"dtype": F16, "head_dim": 96}, large):
        documents = (1, 30, shape["q_len"] - 31)
        for masks in (
            {},
            {"window": 9},
            {"window": 128, "documents": documents},
            {"documents": documents},
            {"batch": 2, "padding": "left"},
            {"batch": 2, "padding": "right", "sinks": False},
            {"kv_len": shape["q_len"] + 33},
        ):
            inputs, keywords = AttentionCase(**(shape | masks)).inputs("cuda")
            out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="triton")
            torch.autograd.grad((out, lse), inputs, (draw(*out.shape, dtype=out.dtype), torch.ones_like(lse)))


def experts() -> None:
    from gptoss_kernels.experts.reference import ExpertsLoRA
    from gptoss_kernels.mxfp4.packed import PackedExperts
    from gptoss_kernels.mxfp4.reference import quantize

    for dtype in (BF16, F32):
        for routing in ("random", "sentinel", "one"):
            case = ExpertsCase(tokens=70, hidden=96, intermediate=64, dtype=dtype, routing=routing)
            inputs, indices = case.inputs("cuda")
            y = fused_experts(*inputs[:5], indices, inputs[5], backend="triton")
            torch.autograd.grad(y, inputs, torch.ones_like(y))
            x, w1, b1, w2, b2, weights = (t.detach() for t in inputs)
            packed = PackedExperts(*quantize(w1), dtype), b1, PackedExperts(*quantize(w2), dtype), b2
            rank, n = 8, case.experts
            a1, c1 = draw(n, rank, 96, grad=True), draw(n, 128, rank, grad=True)
            a2, c2 = draw(n, rank, 64, grad=True), draw(n, 96, rank, grad=True)
            adapters = {"gate_up_lora": ExpertsLoRA(a1, c1, 0.5), "down_lora": ExpertsLoRA(a2, c2, 0.5)}
            y = fused_experts(x, *packed, indices, weights, **adapters, backend="triton")
            torch.autograd.grad(y, [a1, c1, a2, c2], torch.ones_like(y))


def layers() -> None:
    from gptoss_kernels.adamw.api import adamw_step, new_state
    from gptoss_kernels.layers.lora import lora_linear
    from gptoss_kernels.layers.loss import linear_cross_entropy
    from gptoss_kernels.layers.rms_norm import rms_norm
    from gptoss_kernels.layers.rope import apply_rope

    for dtype in (BF16, F32):
        x, weight = draw(37, 96, dtype=dtype, grad=True), draw(96, dtype=dtype, grad=True)
        y = rms_norm(x, weight, 1e-5)
        torch.autograd.grad(y, [x, weight], torch.ones_like(y))
        y = rms_norm(x, weight.detach(), 1e-5)
        torch.autograd.grad(y, x, torch.ones_like(y))
        q, k = (draw(1, heads, 37, 64, dtype=dtype, grad=True) for heads in (4, 2))
        rotated = apply_rope(q, k, draw(1, 37, 32, dtype=dtype), draw(1, 37, 32, dtype=dtype))
        torch.autograd.grad(rotated, [q, k], [torch.ones_like(r) for r in rotated])
        a, b = draw(8, 96, grad=True), draw(50, 8, grad=True)
        y = lora_linear(x, draw(50, 96, dtype=dtype), None, a, b, 2.0)
        torch.autograd.grad(y, [x, a, b], torch.ones_like(y))
        loss, *_ = linear_cross_entropy(x, draw(1001, 96, dtype=dtype), torch.arange(37, device="cuda") * 27)
        torch.autograd.grad(loss.sum(), x)
        parameter = draw(1000, dtype=dtype)
        adamw_step(parameter, draw(1000, dtype=dtype), new_state(parameter), step=1, lr=1e-3, backend="triton")


@gluon.jit
def store(out, start, WARPS: gl.constexpr):
    i = start + gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(out + i, i)


@gluon.jit
def wait_and_store(out, start, ready, WARPS: gl.constexpr):
    mbarrier.wait(ready, 0)
    store(out, start, WARPS)


@gluon.jit
def arrive(ready):
    mbarrier.arrive(ready, count=1)


@gluon.jit
def full_hand_over_kernel(out):
    gl.warp_specialize([(store, (out, 0, 4)), (store, (out, 128, 4))], [4], [24])


@gluon.jit
def idle_hand_over_kernel(out):  # three warps of the second group have nothing to do
    gl.warp_specialize([(store, (out, 0, 4)), (store, (out, 128, 1))], [1], [24])


@gluon.jit
def barrier_hand_over_kernel(out):
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize(
        [(wait_and_store, (out, 0, ready, 4)), (wait_and_store, (out, 128, ready, 4)), (arrive, (ready,))],
        [4, 1],
        [160, 24],
    )


def control() -> None:
    """Kernels whose warp groups share nothing but what Triton hands over to them, and a barrier."""
    for kernel, stored in ((full_hand_over_kernel, 256), (idle_hand_over_kernel, 160), (barrier_hand_over_kernel, 256)):
        out = torch.zeros(256, dtype=torch.int32, device="cuda")
        kernel[(16,)](out, num_warps=4)
        assert out[:stored].tolist() == list(range(stored)), kernel
        print(f"ran: {kernel.__name__}")


ACCESS = re.compile(r"(?:Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+?):(\d+)")


def judge(log: str) -> tuple[Counter, list[str]]:
    """Hazards of Triton's hand-over by kernel, and the others, in what racecheck printed."""
    folders = Path(__file__).parent, Path(__file__).parents[1] / "gptoss_kernels" / "attention"
    sources = {path.name: path.read_text().splitlines() for folder in folders for path in folder.glob("*.py")}
    handed, others, first = Counter(), [], None
    for line in log.splitlines():
        if (access := ACCESS.search(line)) is None:
            others += [line] * bool(re.search(r"Error|Warning", line))  # another kind, or without lines
            continue
        kernel, file, number = access.groups()
        text = sources.get(file, [])[int(number) - 1 : int(number)]
        own = bool(text) and text[0].strip().startswith((f"def {kernel}(", "gl.warp_specialize("))
        if "reported between" in line:
            first = own, line
        elif own and first[0]:
            handed[kernel] += 1
        else:
            others.append(f"{first[1]} {line}")
    if "RACECHECK SUMMARY" not in log:
        others.append("racecheck did not finish")
    return handed, others


def main() -> int:
    if sys.argv[1:2] == ["judge"] and len(sys.argv) == 3:
        handed, others = judge(Path(sys.argv[2]).read_text())
        print(f"of Triton's hand-over: {dict(handed)}; others: {len(others)}", *others, sep="\n")
        return 1 if others else 0
    if sys.argv[1:] not in ([], ["control"]):
        sys.exit(f"benchmarks/sanitize.py: expected nothing, control, or judge LOG, got {' '.join(sys.argv[1:])}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/sanitize.py: expected a CUDA GPU, got none")
    if sys.argv[1:] == ["control"]:
        control()
        return 0
    from gptoss_kernels import launch

    ran, runner = set(), launch.runner
    launch.runner = lambda compiled: ran.add(compiled.metadata.name) or runner(compiled)
    for part in (attention, experts, layers):
        part()
        torch.cuda.synchronize()
    print(f"ran: {', '.join(sorted(ran))}")
    expected = KERNELS | (HOPPER if torch.cuda.get_device_capability() == (9, 0) else set())
    if missing := expected - ran:
        print(f"did not run: {', '.join(sorted(missing))}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
