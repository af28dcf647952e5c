"""A launch goes straight to a compiled kernel only where Triton would have taken the same one."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from gptoss_kernels import launch as module
from gptoss_kernels.launch import Prepared, launch, remembered


class Kernel:
    """Stands for a @triton.jit function: notes how it was launched, and gives itself as the compiled kernel."""

    def __init__(self, *varying: bool):
        self.fn = lambda: None
        self.params = [SimpleNamespace(do_not_specialize=v) for v in varying]
        self.calls = []

    def __getitem__(self, grid):
        def call(*args, **kwargs):
            self.calls.append((grid, args, kwargs))
            return Compiled(self.calls)

        return call


class Compiled:
    """Stands for a compiled kernel: notes how it was launched, by itself or through Triton, which calls hooks."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls):
        self.calls = calls

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args):
        assert (stream, function, metadata) == ("stream of 0", "function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        self.calls.append(("compiled", (x, y, z), args))

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(("hooks", grid, args))


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on the first GPU."""

    def get_device(self):
        return 0


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    driver = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def addresses(args):
    return tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)


def on_gpu(*shape, dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(OnGPU)


@pytest.mark.parametrize(
    "change, compiled",
    [
        ({}, True),
        ({0: on_gpu(offset=4)}, True),  # 16 bytes on
        ({0: on_gpu(offset=1)}, False),
        ({0: on_gpu(dtype=torch.float16)}, False),
        ({1: on_gpu()}, False),
        ({2: 1}, False),
        ({2: 16}, False),
        ({3: 6}, True),
        ({3: 1}, True),
        ({3: 2**31}, False),
        ({4: 2.5}, True),
        ({"BLOCK": 32}, False),
        ({"num_warps": 8}, False),
    ],
)
def test_like_launches_share_a_kernel(change, compiled):
    kernel = Kernel(False, False, False, True, False)
    args = [on_gpu(), None, 0, 5, 1.5]
    launch(kernel, (7, 3), tuple(args), {"BLOCK": 16}, num_warps=4)
    assert kernel.calls == [((7, 3), tuple(args), {"BLOCK": 16, "num_warps": 4})]
    named = {"BLOCK": 16, "num_warps": 4}
    for at, value in change.items():
        (args if isinstance(at, int) else named)[at] = value
    launch(kernel, (5,), tuple(args), {"BLOCK": named["BLOCK"]}, num_warps=named["num_warps"])
    expected = ("compiled", (5, 1, 1), (*addresses(args), 16)) if compiled else ((5,), tuple(args), named)
    assert kernel.calls[1:] == [expected]


def test_memory_of_launches_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST", 10)
    kernel = Kernel(False, False)
    for stride in range(100):
        launch(kernel, (1,), (on_gpu(), stride), {})
    assert len(module._compiled) <= 10 and len(kernel.calls) == 100


@pytest.mark.parametrize("pointers, compiled", [((0, 0), True), ((0, 4), True), ((0, 1), False), ((1, 0), False)])
def test_prepared_launches_differ_in_alignment_alone(pointers, compiled):
    kernel, descriptor = Kernel(), object()
    prepared = Prepared(kernel, (7, 3), (5, 1.5), {"BLOCK": 16}, num_warps=4)
    first = on_gpu(), on_gpu(), None, descriptor
    prepared(*first)
    assert kernel.calls == [((7, 3, 1), (*first, 5, 1.5), {"BLOCK": 16, "num_warps": 4})]
    again = *(on_gpu(offset=offset) for offset in pointers), None, descriptor
    for _ in range(2):
        prepared(*again)
    ready = ("compiled", (7, 3, 1), (*addresses(again), 5, 1.5, 16))
    through_triton = ((7, 3, 1), (*again, 5, 1.5), {"BLOCK": 16, "num_warps": 4})
    assert kernel.calls[1:] == [ready if compiled else through_triton, ready]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("value", ["chain", print, None])
def test_hooks_of_a_profiler_are_called(hook, value, monkeypatch):
    prepared, tensor = Prepared(Kernel(), (7,), (), {}), on_gpu()
    kernel = prepared.kernel
    prepared(tensor)
    if value == "chain":
        monkeypatch.setattr(getattr(triton.knobs.runtime, hook), "calls", [print])
    else:
        monkeypatch.setattr(triton.knobs.runtime, hook, value)
    prepared(tensor)
    assert kernel.calls[1:] == [("hooks" if value else "compiled", (7, 1, 1), (tensor.data_ptr(),))]


def test_compiled_kernels_run_as_triton_runs_them():
    source = " ".join(inspect.getsource(triton.compiler.CompiledKernel.__getitem__).split())
    order = (
        "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args)"
    )
    assert order in source


def test_each_pattern_of_alignment_has_its_kernel():
    prepared = Prepared(Kernel(), (7,), (), {})
    patterns = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for pattern in patterns * 2:
        prepared(*(on_gpu(offset=offset) for offset in pattern))
    assert [call[0] for call in prepared.kernel.calls] == [(7, 1, 1)] * 4 + ["compiled"] * 4


def test_a_tensor_on_the_cpu_goes_through_triton_which_refuses_it():
    kernel = Kernel(False, False)
    for second in (on_gpu(), torch.zeros(64), on_gpu()):
        launch(kernel, (7,), (on_gpu(), second), {})
    assert [call[0] for call in kernel.calls] == [(7,), (7,), "compiled"]


@pytest.mark.parametrize("how", ["launch", "Prepared"])
def test_another_device_is_made_current(how, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Kernel(False)
    for _ in range(2):
        if how == "launch":
            launch(kernel, (7,), (on_gpu(),), {})
        else:
            Prepared(kernel, (7,), (), {})(on_gpu())
    assert entered == [0, 0]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST", 10)
    known, made = {}, []
    for length in range(100):
        for _ in range(2):
            assert remembered(known, length, lambda length=length: made.append(length) or -length, False) == -length
    assert made == list(range(100)) and len(known) <= 10


def test_kernels_keep_their_constants_last():
    from gptoss_kernels.attention import backward, forward, hopper
    from gptoss_kernels.experts import backward as experts_backward
    from gptoss_kernels.experts import forward as experts_forward
    from gptoss_kernels.layers import loss, rms_norm, rope

    modules = (forward, backward, hopper, experts_forward, experts_backward, loss, rms_norm, rope)
    kernels = {name: value for m in modules for name, value in vars(m).items() if name.endswith("_kernel")}
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        annotations = list(kernel.fn.__annotations__)
        names = list(kernel.arg_names)
        assert names[-len(annotations) :] == annotations, name
