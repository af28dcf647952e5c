"""What is computed from a row of attention.csv: pairs, FLOPs, bytes, ratios."""

import pytest
import torch

from benchmarks import attention_figures as figures


def row(**changes):
    base = dict(contender="ours", tokens="4096", window="0", documents="1", dtype="bfloat16", heads="64", kv_heads="8")
    base |= dict(head_dim="64", gpu="GPU A", torch="2.11", triton="3.6", commit="abc")
    return base | dict(forward_ms="0.5", backward_ms="1.25", total_ms="1.75") | changes


def test_lengths_of_documents():
    assert figures.document_lengths(10, "1") == (10,)
    assert figures.document_lengths(10, "4") == (3, 3, 2, 2)
    assert figures.document_lengths(2, "2u") == (1, 1)
    unequal = figures.document_lengths(16384, "16u")
    assert len(unequal) == 16 and sum(unequal) == 16384 and min(unequal) >= 1 and max(unequal) > 2 * min(unequal)
    # The stored rows are of these documents: their FLOPs would be wrong if the lengths changed.
    assert unequal[:8] == (4242, 376, 352, 1665, 256, 918, 460, 108)


@pytest.mark.parametrize("window", [0, 1, 7, 13, 40])
@pytest.mark.parametrize("lengths", [(40,), (13, 1, 26), (7, 33)])
def test_visible_pairs_are_those_of_the_mask(lengths, window):
    position = torch.arange(sum(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = position[:, None] - position
    seen = (distance >= 0) & (document[:, None] == document) & (distance < (window or sum(lengths)))
    assert figures.visible_pairs(lengths, window) == seen.sum().item()


def test_flops_and_bytes():
    pairs = 4096 * 4097 // 2
    assert figures.flops(row(), "forward") == 4 * pairs * 64 * 64
    assert figures.flops(row(), "backward") == 2.5 * figures.flops(row(), "forward")
    assert figures.flops(row(), "total") == 3.5 * figures.flops(row(), "forward")
    assert figures.flops(row(documents="4"), "forward") == 4 * 4 * (1024 * 1025 // 2) * 64 * 64

    q, k = torch.empty(64, 4096, 64, dtype=torch.bfloat16).nbytes, torch.empty(8, 4096, 64, dtype=torch.bfloat16).nbytes
    lse = torch.empty(64, 4096).nbytes
    assert figures.least_bytes(row(), "forward") == (q + k + k) + (q + lse) == 76_546_048
    assert figures.least_bytes(row(), "backward") == (q + k + k + q + q + lse) + (q + k + k)
    assert figures.least_bytes(row(), "total") == 76_546_048 + 152_043_520
    assert figures.least_bytes(row(dtype="float32"), "forward") == 2 * 76_546_048 - lse


def test_rates():
    assert figures.tflops(row(forward_ms="0.5"), "forward") == pytest.approx(4 * 4096 * 4097 / 2 * 4096 / 0.5e-3 / 1e12)
    assert figures.gbs(row(), "total") == pytest.approx((76_546_048 + 152_043_520) / 1.75e-3 / 1e9)
    assert figures.intensity(row(), "forward") == figures.flops(row(), "forward") / 76_546_048
    # Numbers as measured are as good as strings from the file.
    assert figures.tflops(row(tokens=4096, window=0, heads=64, forward_ms=0.5), "forward") == figures.tflops(
        row(), "forward"
    )


def test_settings_keep_the_newest_row_of_a_place():
    old, new, packed, other = row(total_ms="9"), row(), row(documents="4"), row(dtype="float16")
    found = figures.settings([old, packed, new, other])
    assert list(found.values()) == [[new, packed], [other]]


def test_ratios_compare_rows_of_one_run():
    rows = [
        row(total_ms="2"),
        row(contender="fa4", total_ms="1"),
        row(window="128", total_ms="1"),
        row(contender="fa4", window="128", total_ms="2"),
        row(contender="fa4", documents="4", total_ms="777"),
        row(contender="flex", commit="old", total_ms="777"),
        row(contender="ours", commit="newer", total_ms="777"),
        row(contender="fa4", gpu="GPU B", total_ms="777"),
        row(contender="ours", commit="fewer windows", total_ms="777"),
        row(contender="fa4", commit="fewer windows", total_ms="777"),
    ]
    times = figures.layer_times(figures.comparable(rows))
    assert times == {
        (4096, "full"): {"ours": 2, "fa4": 1},
        (4096, "window 128"): {"ours": 1, "fa4": 2},
        (4096, "full + window 128"): {"ours": 3, "fa4": 3},
    }
    more = times | {(8192, "full"): {"ours": 4, "fa4": 6}, (16384, "full"): {"fa4": 1}}
    assert figures.ratios(more) == {
        "full": {"fa4": (0.5, 1.5)},
        "window 128": {"fa4": (2, 2)},
        "full + window 128": {"fa4": (1, 1)},
    }
    assert figures.comparable([row(), row(contender="fa4", commit="old")]) == []


def test_prediction_follows_the_visible_pairs():
    packed = row(documents="16", total_ms="777")
    one = row(total_ms="8")
    assert figures.predicted_ms(packed, [row(window="128"), packed, one]) == pytest.approx(8 * 257 / 4097)
    assert figures.predicted_ms(packed, [row(commit="old"), row(contender="fa4"), packed]) is None
