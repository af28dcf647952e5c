"""The plots are told apart without colour, and an attention map shows the numbers it was given."""

import pytest
import torch

plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is an extra")
plots = pytest.importorskip("gptoss_kernels.course.plots")
plt.switch_backend("Agg")


def test_style_tells_curves_apart_in_any_theme():
    with plt.rc_context():
        plots.style()
        cycle = list(plt.rcParams["axes.prop_cycle"])
        assert len({entry["linestyle"] for entry in cycle}) == len({entry["color"] for entry in cycle}) == len(cycle)
        assert plt.rcParams["figure.facecolor"] == plt.rcParams["savefig.facecolor"] == "white"


def test_attention_map():
    weights = torch.tensor([[0.6, 0.0], [0.2, 0.3]])
    _, ax = plt.subplots()
    plots.attention_map(ax, weights, 1 - weights.sum(-1))
    drawn = ax.images[0].get_array()
    torch.testing.assert_close(torch.tensor(drawn.filled(0)), torch.tensor([[0.4, 0, 0.6, 0], [0.5, 0, 0.2, 0.3]]))
    assert drawn.mask.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sink", "0", "1"]
    assert ax.get_xlabel() == "key" and ax.get_ylabel() == "query"
    plt.close()
