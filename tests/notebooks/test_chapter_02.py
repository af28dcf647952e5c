"""Chapter 02's kernels and launchers, as the notebook shows them, against PyTorch and the package."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
triton = pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract  # noqa: E402

from gptoss_kernels import flash_attention  # noqa: E402
from gptoss_kernels.lane import interpreting  # noqa: E402
from gptoss_kernels.testing import AttentionCase, assert_within_budget, exact_attention  # noqa: E402

STEM = "02_triton_in_one_hour"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
UNTOUCHED = -77.0

# kernel -> the cases it is run through
KERNELS = {
    "add_kernel": [1, 1023, 1024, 1025, 3000],  # elements
    "peek_kernel": [(10, 4), (3, 8)],  # (elements, BLOCK)
    "reverse_kernel": [(1, 4), (8, 4), (10, 4), (70, 32)],  # (elements, BLOCK)
    "row_sum_kernel": [(1, 1, 32), (5, 70, 32), (3, 64, 32), (2, 70, 128)],  # (rows, columns, BLOCK)
    "softmax_kernel": [(1, 1), (5, 70), (3, 64), (2, 1025)],  # (rows, columns)
    "softmax_with_a_bug_kernel": [(5, 70), (3, 64)],
    "scale_rows_kernel": [(1, 1, 8, 8), (5, 70, 8, 32), (16, 64, 8, 32)],  # (rows, columns, BLOCK_M, BLOCK_N)
    "matmul_kernel": [(1, 1, 1), (32, 64, 32), (70, 50, 90)],  # (rows, inner, columns)
    "sink_softmax_kernel": [(1, 1, 1, 32), (2, 3, 70, 32), (3, 2, 64, 32), (2, 3, 70, 1024)],  # (…, columns, block)
}

_VECTOR = {"x": torch.float32, "out": torch.float32, "numel": "i32", "BLOCK": 1024}
_MATRIX = {"x": torch.bfloat16, "stride_xm": "i32", "stride_xn": "i32", "columns": "i32"}
_SOFTMAX = _MATRIX | {"out": torch.bfloat16, "stride_om": "i32", "stride_on": "i32"}
_SCALE = {"x": torch.float32, "scale": torch.float32, "out": torch.float32, "rows": "i32", "columns": "i32"}
_SCALE |= {name: "i32" for name in ("stride_xm", "stride_xn", "stride_om", "stride_on")}
_MATMUL = {name: "i32" for name in ("stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_om", "stride_on")}
_MATMUL |= {"rows": "i32", "columns": "i32", "inner": "i32", "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
_SINK = {name: "i32" for name in ("stride_sh", "stride_sm", "stride_sn", "stride_oh", "stride_om", "stride_on")}
OFFLINE = {
    "add_kernel": [_VECTOR | {"y": torch.float32}],
    "peek_kernel": [{"numel": "i32", "BLOCK": 4}],
    "reverse_kernel": [_VECTOR, _VECTOR | {"BLOCK": 4}],
    "row_sum_kernel": [_MATRIX | {"x": dtype, "out": torch.float32, "BLOCK": 1024} for dtype in
                       (torch.float32, torch.float16, torch.bfloat16)],
    "softmax_kernel": [_SOFTMAX | {"BLOCK": 128}, _SOFTMAX | {"BLOCK": 4096},
                       _SOFTMAX | {"x": torch.float32, "out": torch.float32, "BLOCK": 128}],
    "softmax_with_a_bug_kernel": [_SOFTMAX | {"BLOCK": 128}],
    "scale_rows_kernel": [_SCALE | {"BLOCK_M": 8, "BLOCK_N": 32}, _SCALE | {"BLOCK_M": 4, "BLOCK_N": 4}],
    "matmul_kernel": [
        _MATMUL | {"a": dtype, "b": dtype, "out": dtype, "PRECISION": precision}
        for dtype, precision in (
            (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee"),
        )
    ],
    "sink_softmax_kernel": [
        _SINK | {"scores": dtype, "sinks": dtype, "out": dtype, "columns": "i32", "BLOCK": block}
        for dtype, block in ((torch.bfloat16, 1024), (torch.float32, 32), (torch.float32, 4))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def notebook():
    return extract.load(STEM)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def framed(shape, order=None, margin=8):
    """A tensor to be written, and its whole buffer, which must stay UNTOUCHED around it."""
    order = order or range(len(shape))
    buffer = torch.full([shape[d] + 2 * margin for d in order], UNTOUCHED, device=DEVICE)
    view = buffer
    for position, d in enumerate(order):
        view = view.narrow(position, margin, shape[d])
    return buffer, view.permute([list(order).index(d) for d in range(len(shape))])


def assert_frame_intact(buffer, view):
    inside = view.clone()
    view.fill_(UNTOUCHED)
    assert (buffer == UNTOUCHED).all(), "written beside out"
    view.copy_(inside)


@pytest.mark.parametrize("numel", KERNELS["add_kernel"])
def test_add(notebook, numel):
    x, y = draw(2, numel)
    assert torch.equal(notebook.add(x, y), x + y)


@pytest.mark.parametrize(("numel", "block"), KERNELS["peek_kernel"])
def test_peek(notebook, numel, block, capfd):
    programs = triton.cdiv(numel, block)
    notebook.peek_kernel[(programs,)](numel, BLOCK=block)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return  # printed by the driver
    printed = capfd.readouterr().out
    assert printed.count("offsets") == printed.count("exists") == programs
    last = printed.splitlines()[-1].split("exists")[1]
    assert last.count("1") == numel - (programs - 1) * block


@pytest.mark.parametrize(("numel", "block"), KERNELS["reverse_kernel"])
def test_reverse(notebook, numel, block):
    x = notebook.fenced_matrix(draw(numel, 2))[:, 0].contiguous()
    buffer, out = framed((numel,))
    notebook.reverse_kernel[(triton.cdiv(numel, block),)](x, out, numel, BLOCK=block)
    assert torch.equal(out, x.flip(0))
    assert_frame_intact(buffer, out)


@pytest.mark.parametrize(("rows", "columns", "block"), KERNELS["row_sum_kernel"])
def test_row_sum(notebook, rows, columns, block):
    for dtype in (torch.float32, torch.float16):
        x = draw(rows, columns).to(dtype)
        for view in (x, notebook.fenced_matrix(x), notebook.fenced_matrix(x.t()).t()):
            got = notebook.row_sum(view, block=block)
            assert got.dtype == torch.float32
            assert_within_budget("row sum", got, x.float().sum(-1), x.double().sum(-1))


@pytest.mark.parametrize(("rows", "columns"), KERNELS["softmax_kernel"])
def test_softmax(notebook, rows, columns):
    for x in (draw(rows, columns), draw(rows, columns).half(), draw(rows, columns) - 200):
        exact = torch.softmax(x.double(), -1)
        for view in (x, notebook.fenced_matrix(x), notebook.fenced_matrix(x.t()).t()):
            got = notebook.softmax(view)
            assert got.dtype == x.dtype
            assert_within_budget("softmax", got, torch.softmax(x, -1), exact)
        torch.testing.assert_close(notebook.eager_softmax(x).double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rows", "columns"), KERNELS["softmax_with_a_bug_kernel"])
def test_the_bug_is_where_the_text_says(notebook, rows, columns):
    padded = columns != triton.next_power_of_2(columns)
    for shift in (0, -100):
        x = draw(rows, columns) + shift
        exact = torch.softmax(x.double(), -1)
        got = notebook.softmax(notebook.fenced_matrix(x), notebook.softmax_with_a_bug_kernel)
        wrong = notebook.relative_error(got, exact) > 1e-3
        assert wrong == (padded and shift != 0)


@pytest.mark.parametrize(("rows", "columns", "block_m", "block_n"), KERNELS["scale_rows_kernel"])
def test_scale_rows(notebook, rows, columns, block_m, block_n):
    x, scale = draw(rows, columns), draw(rows, seed=1)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    for view in (notebook.fenced_matrix(x), notebook.fenced_matrix(x.t()).t()):
        for order in ((0, 1), (1, 0)):
            buffer, out = framed((rows, columns), order)
            notebook.scale_rows_kernel[grid](
                view, scale, out, *view.stride(), *out.stride(), rows, columns, BLOCK_M=block_m, BLOCK_N=block_n
            )
            assert torch.equal(out, x * scale[:, None])
            assert_frame_intact(buffer, out)


@pytest.mark.parametrize(("rows", "inner", "columns"), KERNELS["matmul_kernel"])
def test_matmul(notebook, rows, inner, columns):
    for dtype in (torch.float32, torch.float16):
        a, b = draw(rows, inner).to(dtype), draw(columns, inner, seed=1).to(dtype).t()
        got = notebook.matmul(notebook.fenced_matrix(a), notebook.fenced_matrix(b))
        assert got.dtype == dtype
        assert_within_budget("matmul", got, a @ b, a.double() @ b.double())


@pytest.mark.parametrize(("heads", "rows", "columns", "block"), KERNELS["sink_softmax_kernel"])
def test_softmax_with_sink(notebook, heads, rows, columns, block):
    for order in ((0, 1, 2), (2, 0, 1)):
        _, scores = framed((heads, rows, columns), order)
        scores.copy_(draw(heads, rows, columns))
        scores[:, 0, columns // 2 :] = -math.inf  # in the case of one column: a row without a key
        sinks = draw(heads, seed=1)
        exact = notebook.with_extra_column(scores.double(), sinks.double())
        got = notebook.softmax_with_sink(scores, sinks, block=block)
        assert_within_budget("weights", got, notebook.with_extra_column(scores, sinks), exact)


@pytest.mark.parametrize("case", [AttentionCase(q_len=70), AttentionCase(q_len=40, kv_len=70, window=32)], ids=str)
def test_weights_give_the_packages_attention(notebook, case):
    inputs, keywords = case.inputs(DEVICE)
    q, k, v, sinks = (x.detach() for x in inputs)
    exact = exact_attention([q, k, v, sinks], torch.zeros_like(q), **keywords)[0]
    position = torch.arange(case.kv_len or case.q_len, device=DEVICE)
    distance = position[-case.q_len :, None] - position
    hidden = (distance < 0) | (distance >= (case.window or len(position)))
    k, v = (x.repeat_interleave(case.q_heads // case.kv_heads, dim=1) for x in (k, v))
    scores = (q @ k.mT * case.head_dim**-0.5)[0].masked_fill(hidden, -math.inf)
    out = notebook.softmax_with_sink(scores, sinks) @ v[0]
    eager = notebook.with_extra_column(scores, sinks) @ v[0]
    assert_within_budget("out", out[None], eager[None], exact)
    package = flash_attention(*(x.detach() for x in inputs), **keywords)
    assert_within_budget("package", package, eager[None], exact)


def test_bytes(notebook):
    assert notebook.eager_softmax_bytes(3, 5, 2) == 264
