"""Chapter 03's functions against the package and the definition. The notebook writes no Triton kernel."""

import functools
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nbformat", reason="notebooks need the course extra")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parent))
import extract

from gptoss_kernels.attention.reference import attention_concat, attention_reference
from gptoss_kernels.testing import AttentionCase, assert_within_budget, fenced

STEM = "03_online_softmax_with_a_sink"

CASES = [
    AttentionCase(),
    AttentionCase(sinks=False),
    AttentionCase(window=1),
    AttentionCase(window=24, sinks=False),
    AttentionCase(q_len=7, kv_len=100, window=40),
    AttentionCase(q_len=1, kv_len=1),
    AttentionCase(batch=2, q_heads=8, kv_heads=1, dtype=torch.bfloat16),
    AttentionCase(dtype=torch.float16, window=33),
    AttentionCase(dtype=torch.float64, window=33),
]
TILES = [(32, 32), (16, 64), (1, 100), (128, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def chapter():
    return extract.load(STEM)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("block_m", "block_n"), TILES)
def test_attention_tiled(chapter, case, block_m, block_n):
    inputs, keywords = case.inputs()
    inputs = [fenced(x.detach()) for x in inputs]
    exact = attention_reference(*(x.double() for x in inputs), **keywords)
    eager = attention_concat(*inputs, compute_dtype=case.dtype, **keywords)
    got = chapter.attention_tiled(*inputs, block_m=block_m, block_n=block_n, **keywords)
    for name, x, y, z in zip(("out", "lse"), got, eager, exact, strict=True):
        assert_within_budget(name, x, y, z)
    assert got[0].dtype == case.dtype


def test_attention_tiled_takes_a_scale(chapter):
    inputs = [x.detach().double() for x in AttentionCase().inputs()[0]]
    got = chapter.attention_tiled(*inputs, block_m=32, block_n=32, scale=0.5)
    torch.testing.assert_close(got, attention_reference(*inputs, scale=0.5))


@pytest.mark.parametrize("window", [None, 1, 32, 33, 100])
@pytest.mark.parametrize(("q_len", "kv_len"), [(128, 128), (100, 100), (7, 100), (1, 65)])
def test_key_range_holds_every_allowed_key(chapter, window, q_len, kv_len):
    for start_m in range(0, q_len, 32):
        begin, end = chapter.key_range(start_m, 32, 32, q_len, kv_len, window)
        position = torch.arange(start_m, min(start_m + 32, q_len)) + kv_len - q_len
        oldest = 0 if window is None else max(0, position.min().item() - window + 1)
        assert begin % 32 == 0 and begin <= oldest < begin + 32 and end == position.max() + 1


def test_scalar_versions(chapter):
    scores = torch.randn(20).double() * 5
    values = torch.randn(20, 3).double()
    expected = torch.softmax(scores, 0) @ values
    torch.testing.assert_close(chapter.three_passes(scores, values), expected)
    maximum, normaliser = chapter.max_and_sum(scores)
    torch.testing.assert_close(maximum + normaliser.log(), scores.logsumexp(0))
    for z, lse in ((-math.inf, scores.logsumexp(0)), (1.5, torch.logaddexp(scores.logsumexp(0), torch.tensor(1.5)))):
        start = torch.zeros(3).double(), torch.tensor(z).double(), torch.tensor(float(z > -math.inf)).double()
        acc, running_max, running_sum = chapter.one_pass(scores, values, *start)[-1]
        torch.testing.assert_close(acc / running_sum, expected * torch.exp(scores.logsumexp(0) - lse))
        torch.testing.assert_close(running_max + running_sum.log(), lse)


def test_merging_is_associative_and_commutative(chapter):
    q, k, v = (torch.randn(n, 16).double() for n in (5, 60, 60))
    position, first = torch.full((5,), 59), torch.zeros(5)
    z = torch.tensor(0.3).double()
    parts = [
        chapter.attend(*chapter.initial_state(q), q, k, v, position, first, a, a + 20, 0.25, 20) for a in (0, 20, 40)
    ] + [chapter.initial_state(q, z), chapter.initial_state(q)]
    a, b, c, d, e = parts
    m = chapter.merge_states
    column = torch.cat([q @ k.mT * 0.25, z.expand(5, 1)], dim=-1).softmax(-1)[:, :-1] @ v
    trees = [m(m(m(a, b), m(c, d)), e), m(a, m(b, m(c, m(d, e)))), m(m(e, d), m(c, m(b, a)))]
    trees += [functools.reduce(m, order) for order in itertools.islice(itertools.permutations(parts), 0, 120, 7)]
    for tree in trees:
        torch.testing.assert_close(chapter.finish(*tree)[0], column)


def test_rows_without_keys(chapter):
    nothing = torch.full((3, 4), -math.inf)
    q_tile, v_tile = torch.randn(3, 16), torch.randn(4, 16)
    out, lse = chapter.finish(*chapter.online_update(*chapter.initial_state(q_tile), nothing, v_tile))
    assert (out == 0).all() and (lse == -math.inf).all()
    z = torch.tensor(1.25)
    out, lse = chapter.finish(*chapter.online_update(*chapter.initial_state(q_tile, z), nothing, v_tile))
    assert (out == 0).all() and (lse == z).all()
    # A sink of -inf is a sink that is switched off.
    off = chapter.initial_state(q_tile, torch.tensor(-math.inf))
    assert all(torch.equal(x, y) for x, y in zip(off, chapter.initial_state(q_tile), strict=True))


def test_the_bug_is_one(chapter):
    _, running_max, running_sum = chapter.initial_state_with_a_bug(torch.zeros(3, 16))
    assert (running_max == -math.inf).all() and (running_sum == 0).all()
    state = chapter.online_update(
        torch.zeros(3, 16), running_max, running_sum, running_max[:, None], torch.zeros(1, 16)
    )
    assert state[0].isnan().all()


def test_base_2(chapter):
    q, k, v, z = torch.randn(16).double(), torch.randn(20, 16).double(), torch.randn(20, 16).double(), torch.tensor(0.4)
    out, lse = chapter.row_in_base_2(q, k, v, z.double(), scale=0.25)
    exact = attention_reference(*(x.expand(1, 1, -1, 16) for x in (q[None], k, v)), z[None].double(), scale=0.25)
    torch.testing.assert_close((out, lse), (exact[0][0, 0, 0], exact[1][0, 0, 0]))


def test_recover_probabilities(chapter):
    inputs = [x.detach().double() for x in AttentionCase(q_len=30, kv_len=50).inputs()[0]]
    q, k, v, _ = inputs
    out, lse = attention_reference(*inputs)
    p = chapter.recover_probabilities(q[0, 3], k[0, 1], lse[0, 3], 16**-0.5)
    torch.testing.assert_close(p @ v[0, 1], out[0, 3])


def test_peak_of_the_cpu_counts_what_lives_at_once(chapter):
    def three_megabytes_of_which_two_at_once():
        first = torch.zeros(2**18)
        second = first + 1
        del first
        return second + 1

    peak = chapter.peak_gib(three_megabytes_of_which_two_at_once, torch.device("cpu")) * 2**30
    assert 2 * 2**20 <= peak < 2.5 * 2**20
