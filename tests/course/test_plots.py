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


def test_a_saved_figure_has_a_palette_and_looks_the_same(tmp_path):
    figure, ax = plt.subplots(figsize=(4, 2))
    ax.plot([0, 1], [0, 1], color=plots.OKABE_ITO[0])
    figure.savefig(tmp_path / "plain.png", dpi=150)
    plots.save(figure, tmp_path / "small.png")
    plt.close()
    plain, small = ((tmp_path / name).read_bytes() for name in ("plain.png", "small.png"))
    assert len(small) < len(plain) and plots.with_palette(small) == small
    shown, kept = (torch.from_numpy(plt.imread(tmp_path / name)[..., :3]) for name in ("plain.png", "small.png"))
    assert kept.shape == shown.shape and (kept - shown).abs().mean() < 1 / 255


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


def test_tile_schedule_counts_tiles():
    _, ax = plt.subplots()
    full = plots.tile_schedule(ax, 128, 128, 32, 32)
    assert full == {"skipped": 6, "masked": 4, "full": 6}
    # 100 keys end inside a tile; a window of 32 cuts through two tiles a row of tiles.
    window = plots.tile_schedule(ax, 100, 100, 32, 32, window=32)
    assert window == {"skipped": 9, "masked": 7, "full": 0}
    packed = plots.tile_schedule(ax, 128, 128, 32, 32, cu_seqlens=[0, 64, 128])
    assert packed == {"skipped": 10, "masked": 4, "full": 2}
    decoding = plots.tile_schedule(ax, 32, 128, 32, 32)
    assert decoding == {"skipped": 0, "masked": 1, "full": 3}
    plt.close()


def test_roofline_has_its_ridge_where_both_limits_meet():
    _, ax = plt.subplots()
    plots.roofline(ax, 1000.0, 4000.0, {"softmax": (0.5, 1.0), "attention": (900.0, 500.0)})
    roof, *points = ax.lines
    assert roof.get_xdata()[1] == 250.0 and roof.get_ydata()[1] == 1000.0
    assert [line.get_label() for line in points] == ["softmax", "attention"]
    assert len({line.get_marker() for line in points}) == 2
    plt.close()


def test_computation_graph():
    _, ax = plt.subplots()
    places = {"x": (0, 0), "y": (1, 0.5), "loss": (2, 0)}
    plots.computation_graph(ax, places, ["x y", "y loss"], {"x": ("left", "$dx$"), "y": ("above", "$dy$")})
    texts = {text.get_text(): text.get_position() for text in ax.texts if text.get_text()}
    assert set(texts) == {"x", "y", "loss", "$dx$", "$dy$"}
    assert texts["$dx$"][0] < places["x"][0] and texts["$dy$"][1] > places["y"][1]
    arrows = [text.arrow_patch for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert sorted(arrow.get_linestyle() for arrow in arrows) == ["-", "-", "--", "--"]  # there and back
    plt.close()


def test_tile_owner_walks_a_column_or_a_row():
    _, ax = plt.subplots()
    assert plots.tile_owner(ax, 4, column=1) == [(1, 1), (2, 1), (3, 1)]
    assert [text.get_text() for text in ax.texts] == ["step 0", "step 1", "step 2"]
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == 3
    _, ax = plt.subplots()
    assert plots.tile_owner(ax, 4, row=2) == [(2, 0), (2, 1), (2, 2)]
    plt.close("all")


def test_stacked_bars():
    _, ax = plt.subplots()
    plots.stacked_bars(ax, {"first": {"a": 1.0, "b": 2.0}, "second": {"a": 3.0, "b": 4.0}}, "ms")
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 1), (1, 2), (0, 3), (3, 4)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"] and ax.get_xlabel() == "ms"
    assert ax.yaxis_inverted() and [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert len({(p.get_facecolor(), p.get_hatch()) for p in ax.patches}) == 2
    plt.close()


def test_stacked_areas_add_up():
    _, ax = plt.subplots()
    plots.stacked_areas(ax, [1, 2], {"a": [1.0, 1.0], "b": [2.0, 5.0]})
    assert max(ax.collections[1].get_paths()[0].vertices[:, 1]) == 6
    assert [area.get_hatch() for area in ax.collections] == ["", "//"]
    plt.close()


def test_heat_map_shows_its_numbers():
    _, ax = plt.subplots()
    plots.heat_map(ax, torch.tensor([[0.1, 0.9]]), ".0%", limit=1.0)
    assert [(text.get_text(), text.get_color()) for text in ax.texts] == [("10%", "white"), ("90%", "black")]
    plt.close()


def test_grouped_bars_stand_side_by_side():
    _, ax = plt.subplots()
    plots.grouped_bars(ax, ["a", "b"], {"before": (1, 2), "after": (3, 4)})
    (a, b), (c, d) = ax.containers
    assert [bar.get_height() for bar in (a, b, c, d)] == [1, 2, 3, 4]
    assert a.get_x() + a.get_width() <= c.get_x() + 1e-9 < c.get_x() + c.get_width() <= b.get_x() + 1e-9
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    plt.close("all")
