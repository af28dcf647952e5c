"""Chapter 04's kernels and functions, as the notebook shows them, within the package's error budget on its cases."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_concat, attention_reference
from gptoss_kernels.lane import interpreting
from gptoss_kernels.testing import AttentionCase, assert_within_budget, fenced, relative_error

STEM = "04_flash_forward"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")


def package_cases():
    """The cases that the package's kernels are held to, less what the chapter leaves out: padding, a head_dim of 96."""
    path = extract.ROOT / "tests" / "attention" / "test_kernels.py"
    spec = importlib.util.spec_from_file_location("_package_attention_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [case for case in module.CASES if case.padding is None and case.head_dim != 96]


PACKED = package_cases()
WINDOWED = [case for case in PACKED if case.documents is None]
PLAIN = [case for case in WINDOWED if case.window is None]
ALIGNED = [
    AttentionCase(q_len=128, q_heads=2, kv_heads=2),
    AttentionCase(q_len=128, q_heads=1, kv_heads=1, head_dim=64),
    AttentionCase(q_len=256, q_heads=1, kv_heads=1, head_dim=32, dtype=torch.float16),
]

# kernel -> the cases it is run through
KERNELS = {
    "flash_causal_kernel": ALIGNED,
    "flash_gqa_kernel": PLAIN,
    "flash_window_kernel": WINDOWED,
    "flash_packed_kernel": PACKED,
    "flash_window_with_a_bug_kernel": [(32, 64), (64, 64), (96, 64), (128, 64)],  # (length, window)
}

_TENSORS = {name: torch.bfloat16 for name in ("q", "k", "v", "sinks", "out")} | {"lse": torch.float32}
_SINGLE = {name: torch.float32 for name in _TENSORS} | {"BLOCK_M": 32, "BLOCK_N": 32}
_STRIDES = {
    f"stride_{x}{d}": "i32:16" for x, row in (("q", "m"), ("k", "n"), ("v", "n"), ("o", "m")) for d in "bh" + row
}
_TILE = {"qk_scale": "fp32", "HEAD_DIM": 64, "BLOCK_M": 128, "BLOCK_N": 64}
_CAUSAL = _TENSORS | _TILE | {"length": "i32"}
_GQA = _TENSORS | _STRIDES | _TILE | {"q_heads": "i32:16", "q_len": "i32", "kv_len": "i32", "GROUP": 8}
_WINDOW = _GQA | {"window": "i32"}
_PACKED = _WINDOW | {"starts": torch.int32, "PACKED": True}
OFFLINE = {
    "flash_causal_kernel": [_CAUSAL, _CAUSAL | _SINGLE],
    "flash_gqa_kernel": [_GQA, _GQA | _SINGLE, _GQA | {"q_len": 1, "GROUP": 1}],
    "flash_window_kernel": [_WINDOW, _WINDOW | _SINGLE, _WINDOW | {"window": 1, "sinks": torch.float32}],
    "flash_packed_kernel": [_PACKED, _PACKED | _SINGLE, _PACKED | {"starts": None, "PACKED": False, "q_len": 1}],
    "flash_window_with_a_bug_kernel": [_CAUSAL | {"window": "i32"}, _CAUSAL | _SINGLE | {"window": "i32"}],
}


@pytest.fixture(scope="module")
def notebook():
    return extract.load(STEM)


def launcher(notebook, kernel):
    if kernel == "flash_causal_kernel":

        def attention(q, k, v, sinks):
            out, lse = notebook.flash_causal(*(x[0].contiguous() for x in (q, k, v)), sinks, q.shape[-1] ** -0.5)
            return out[None], lse[None]

        return attention
    return {
        "flash_gqa_kernel": notebook.flash_gqa,
        "flash_window_kernel": notebook.flash_window,
        "flash_packed_kernel": notebook.flash_forward,
    }[kernel]


def draw(case):
    """The case's tensors without gradients, and its keywords other than None."""
    inputs, keywords = case.inputs(DEVICE)
    return [x.detach() for x in inputs], {name: value for name, value in keywords.items() if value is not None}


@pytest.mark.parametrize(
    ("kernel", "case"),
    [(kernel, case) for kernel, cases in KERNELS.items() if "bug" not in kernel for case in cases],
    ids=str,
)
def test_within_the_error_budget(notebook, kernel, case):
    inputs, keywords = draw(case)
    out, lse = launcher(notebook, kernel)(*inputs, **keywords)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    eager = attention_concat(*inputs, compute_dtype=case.dtype, **keywords)
    exact = attention_reference(*(x.double() for x in inputs), **keywords)
    assert_within_budget("out", out, eager[0], exact[0])
    assert_within_budget("lse", lse, eager[1], exact[1])


@pytest.mark.parametrize(("length", "window"), KERNELS["flash_window_with_a_bug_kernel"])
def test_the_bug_shows_past_the_window_only(notebook, length, window):
    q, k, v = torch.randn(3, 1, length, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sinks = torch.zeros(1, device=DEVICE)
    got, _ = notebook.flash_window_with_a_bug(q, k, v, sinks, window)
    exact, _ = attention_reference(*(x[None].double() for x in (q, k, v)), sinks, sliding_window=window)
    assert (relative_error(got, exact[0]) < 1e-5) == (length <= window)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(window=9),
        AttentionCase(q_len=37, kv_len=71),
        AttentionCase(documents=(1, 10, 33, 1, 25), window=9),
    ],
    ids=str,
)
def test_reads_nothing_beside_its_inputs(notebook, case):
    inputs, keywords = draw(case)
    between_nans = [fenced(x) if x.dim() == 4 else x for x in inputs]
    expected = notebook.flash_forward(*inputs, **keywords)
    for a, b in zip(expected, notebook.flash_forward(*between_nans, **keywords), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [AttentionCase(), AttentionCase(documents=(5, 40, 25), window=20)], ids=str)
def test_every_element_is_written(notebook, case, monkeypatch):
    inputs, keywords = draw(case)

    def filled(allocate):
        def allocated(*arguments, **options):
            x = allocate(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    for x in notebook.flash_forward(*inputs, **keywords):
        assert torch.isfinite(x).all()


def test_scale_and_the_layout_of_out(notebook):
    inputs, _ = draw(AttentionCase(q_len=40, batch=2))
    out, lse = notebook.flash_forward(*inputs, scale=0.5)
    expected = flash_attention(*inputs, scale=0.5, return_lse=True, backend="triton")
    torch.testing.assert_close((out, lse), expected)
    assert out.stride() == inputs[0].stride()


@pytest.mark.parametrize("sinks", [float("-inf"), -1e30])
def test_a_sink_that_no_key_notices(notebook, sinks):
    (q, k, v), _ = draw(AttentionCase(q_len=40, sinks=False))
    without = notebook.flash_forward(q, k, v, sliding_window=7)
    for a, b in zip(without, notebook.flash_forward(q, k, v, torch.full((4,), sinks), sliding_window=7), strict=True):
        assert torch.equal(a, b)


def test_large_scores(notebook):
    inputs, _ = draw(AttentionCase(q_len=40))
    inputs = [x * scale for x, scale in zip(inputs, (100, 100, 1, 100), strict=True)]
    out, lse = notebook.flash_forward(*inputs)
    exact = attention_reference(*(x.double() for x in inputs))
    bound = (
        4 * exact[1].abs().max().item() * torch.finfo(torch.float32).eps
    )  # exp(s - lse) inherits the rounding of lse
    assert relative_error(out, exact[0]) < bound and relative_error(lse, exact[1]) < bound


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (10, 3), (10, 10), (10, 99), (300, 128), (300, None)])
def test_flops_count_the_pairs(notebook, tokens, window):
    pairs = sum(min(i, window or tokens) for i in range(1, tokens + 1))
    assert notebook.forward_flops(tokens, window, heads=4, head_dim=64) == 4 * 64 * 4 * pairs


def test_bounds_are_those_of_the_picture(notebook):
    plt = pytest.importorskip("matplotlib.pyplot")
    from gptoss_kernels.course import plots

    for tokens, block_m, block_n, window in (
        (256, 64, 32, 256),
        (250, 64, 32, 20),
        (200, 32, 64, 70),
        (130, 128, 64, 128),
    ):
        figure, ax = plt.subplots()
        counts = plots.tile_schedule(ax, tokens, tokens, block_m, block_n, window=window)
        plt.close(figure)
        ranges = [notebook.key_range(m, block_m, block_n, tokens, tokens, window) for m in range(0, tokens, block_m)]
        assert sum(len(range(*bounds, block_n)) for bounds in ranges) == counts["masked"] + counts["full"]


def test_the_longest_programs_first(notebook):
    assert notebook.makespan([1, 1, 2], 2) == 3 and notebook.makespan([2, 1, 1], 2) == 2
