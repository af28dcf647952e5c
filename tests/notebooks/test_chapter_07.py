"""Chapter 07's functions against the package: gradients, operators, counts, the benchmark, the offline compile."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels import flash_attention
from gptoss_kernels.attention.reference import attention_concat
from gptoss_kernels.testing import AttentionCase, exact_attention, fenced

STEM = "07_autograd_and_speed"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [AttentionCase(), AttentionCase(q_len=40, window=9, batch=2), AttentionCase(q_len=1, q_heads=2)]

# The notebook defines no kernel of its own: it wraps the package's.
KERNELS = {}
OFFLINE = {}


@pytest.fixture(scope="module")
def notebook():
    module = extract.load(STEM)
    schemas = {"forward": module.FORWARD_SCHEMA, "backward": module.BACKWARD_SCHEMA}
    functions = {"forward": module.run_forward, "backward": module.run_backward}
    operators = {
        name: torch.library.custom_op(f"course07::{name}", functions[name], mutates_args=(), schema=schema)
        for name, schema in schemas.items()
    }
    operators["forward"].register_fake(module.attention_forward_fake)
    operators["backward"].register_fake(
        lambda dout, q, k, v, sinks, *rest: (*map(module.empty_heads_last, (q, k, v)), sinks.new_empty(sinks.shape))
    )
    module.attention_forward, module.attention_backward_op = operators["forward"], operators["backward"]
    return module


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["Attention", "OperatorAttention"])
def test_functions_within_budget(notebook, name, case, capsys):
    leaves, keywords = case.inputs(DEVICE)
    inputs = [fenced(x.detach()).requires_grad_() for x in leaves]
    dout = torch.randn_like(leaves[0])
    function = getattr(notebook, name)
    actual = notebook.results(lambda *x: function.apply(*x, case.head_dim**-0.5, case.window), inputs, dout)
    eager = notebook.results(lambda *x: attention_concat(*x, **keywords), leaves, dout)
    notebook.assert_right(actual, eager, exact_attention(leaves, dout, **keywords))
    package = notebook.results(lambda *x: flash_attention(*x, **keywords, return_lse=True), leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(actual, package, strict=True))


@pytest.mark.parametrize("contiguous", [False, True])
def test_operators_pass_opcheck(notebook, contiguous):
    inputs = [x.detach() for x in AttentionCase(q_len=20, q_heads=2, kv_heads=1).inputs(DEVICE)[0]]
    inputs = [x.contiguous() for x in inputs] if contiguous else inputs
    torch.library.opcheck(notebook.attention_forward, (*inputs, 0.25, 7))
    out, lse = notebook.run_forward(*inputs, 0.25, 7)
    torch.library.opcheck(notebook.attention_backward_op, (torch.randn_like(out), *inputs, out, lse, 0.25, 7))


def test_gradient_of_the_hand_sized_function(notebook):
    rows, sink = torch.randn(4, dtype=torch.float64).requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(notebook.KeptShare.apply, (rows, sink))


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_counts(notebook, window):
    case = AttentionCase(q_len=13, window=window)
    allowed = torch.ones(13, 13).tril()
    if window is not None:
        allowed = allowed.triu(1 - window)
    pairs = int(allowed.sum())
    assert notebook.attention_flops(13, 4, 16, window) == 2 * 2 * 16 * 4 * pairs
    assert notebook.attention_flops(13, 4, 16, window, backward=True) == 5 * 2 * 16 * 4 * pairs
    (q, k, v, sinks), _ = case.inputs(DEVICE)
    out, lse = notebook.run_forward(*(x.detach() for x in (q, k, v, sinks)), 0.25, window)
    forward = sum(x.nbytes for x in (q, k, v, out, lse))
    assert notebook.attention_bytes(13, 4, 2, 16, element=4) == forward
    backward = (
        2 * sum(x.nbytes for x in (q, k, v, out)) + lse.nbytes
    )  # out's twin is dout; dq, dk, dv are q's, k's, v's
    assert notebook.attention_bytes(13, 4, 2, 16, element=4, backward=True) == backward


def test_bench_takes_turns_and_numbers_every_call(notebook):
    seen = []
    calls = {name: lambda n, name=name: seen.append((name, n)) for name in "ab"}
    found = notebook.bench(calls, torch.device("cpu"), rounds=3, warmup=1)
    assert seen == [(name, n) for n, name in enumerate("ab" * 4)]
    assert found.keys() == {"a", "b"} and all(row["p20"] <= row["ms"] <= row["p80"] for row in found.values())
    assert notebook.summary([1.0, 2.0, 3.0, 4.0, 50.0])["ms"] == 3.0


def test_offline_script_compiles(notebook):
    (row,) = notebook.compile_tiles([(64, 64, 4, 2)], capability=80)
    assert row["spills"] == 0 and 0 < row["registers"] <= 255 and row["shared"] > 0
    assert notebook.blocks_per_sm(row["registers"], row["shared"], row["num_warps"]) >= 1
