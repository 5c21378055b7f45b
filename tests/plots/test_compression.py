"""The figures of compression show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from distill_lightning.plots import (
    plot_bits,
    plot_codebook,
    plot_latency,
    plot_pareto,
    plot_sensitivity,
    plot_sparsity,
    plot_spectra,
)


def points(axes):
    """Label, place and look of every stage of a panel."""
    return {
        container.get_label(): (
            container.lines[0].get_xdata()[0],
            container.lines[0].get_ydata()[0],
            container.lines[0].get_marker(),
            container.lines[0].get_markerfacecolor(),
        )
        for container in axes.containers
    }


@pytest.mark.slow
def test_pareto_has_a_panel_for_each_cost_with_dense_marked_and_controls_hollow():
    scores = {"dense": [0.9, 0.8], "final": [0.8], "control: random criterion": [0.5]}
    costs = {
        "bytes": {"dense": 1000, "final": 100, "control: random criterion": 100},
        "ms": {"dense": 2.0, "final": 1.0},
    }
    figure = plot_pareto(scores, costs, controls={"control: random criterion"})
    left, right = figure.axes
    assert points(left)["dense"] == pytest.approx((1000, 85, "*", "C0"))
    assert points(left)["final"] == pytest.approx((100, 80, "o", "C1"))
    assert points(left)["control: random criterion"] == pytest.approx((100, 50, "o", "none"))
    assert set(points(right)) == {"dense", "final"}
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert right.get_xlim()[0] == 0
    assert [axes.get_xlabel() for axes in figure.axes] == ["bytes", "ms"]
    low, high = left.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * np.std([0.9, 0.8], ddof=1))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(scores)
    assert left.xaxis.get_major_formatter()(2000) == "2 k"
    figure.savefig("/dev/null", format="png")


def test_sparsity_is_drawn_in_percent_and_the_whole_in_black():
    figure = plot_sparsity({"conv": [0, 0.5], "overall": [0.1, 0.9]}, times=[3, 7])
    conv, overall = figure.axes[0].lines
    assert conv.get_xdata() == pytest.approx([3, 7])
    assert conv.get_ydata() == pytest.approx([0, 50])
    assert (overall.get_color(), overall.get_linewidth()) == ("black", 2.5)
    (line,) = plot_sparsity({"conv": [0, 0.5, 0.6]}).axes[0].lines
    assert line.get_xdata() == pytest.approx([1, 2, 3])


def test_many_layers_have_different_colours_and_a_legend_beside_them():
    figure = plot_sparsity({f"layer{number}": [number / 20] for number in range(15)})
    assert len({to_hex(line.get_color()) for line in figure.axes[0].lines}) == 15
    assert len(figure.axes[0].get_legend().get_texts()) == 15


def test_sensitivity_has_a_curve_for_each_layer_and_the_score_before():
    figure = plot_sensitivity({"a": [0.9, 0.5], "b": [0.9, 0.8]}, [0, 0.5], reference=0.91)
    first, second, before = figure.axes[0].lines
    assert first.get_xdata() == pytest.approx([0, 0.5])
    assert first.get_ydata() == pytest.approx([90, 50])
    assert second.get_ydata() == pytest.approx([90, 80])
    assert before.get_ydata() == pytest.approx([91, 91])


def test_spectra_begin_at_one_and_mark_the_last_value_that_is_kept():
    figure = plot_spectra({"fc": [4, 2, 1], "conv": [2, 1]}, {"fc": 2})
    curve, chosen, other = figure.axes[0].lines
    assert curve.get_ydata() == pytest.approx([1, 0.5, 0.25])
    assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == pytest.approx((2, 0.5))
    assert other.get_ydata() == pytest.approx([1, 0.5])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["fc: rank 2 of 3", "conv: not factored"]


@pytest.mark.slow
def test_a_codebook_shows_all_weights_and_each_level_once():
    weights = {name: np.linspace(-1, 1, 100).reshape(10, 10) for name in "abcd"}
    figure = plot_codebook(weights, {name: np.array([[-0.5, 0.5], [0.5, 0.5]]) for name in weights})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for axes in shown:
        assert sum(patch.get_height() for patch in axes.patches) == 100
        assert [line.get_xdata()[0] for line in axes.lines] == [-0.5, 0.5]
    assert shown[0].get_title() == "a: 2 values"


def test_zeros_do_not_hide_the_histogram_of_a_pruned_layer():
    weights = np.concatenate([np.zeros(9000), np.linspace(-1, 1, 1000)])
    told = {"zeros": 9000, "low": -1.0, "high": 1.0, "counts": [500, 500]}
    (one, other) = plot_codebook({"a": weights, "b": told}, {"a": [0.5], "b": [0.5]}, bins=2).axes
    for axes in (one, other):
        assert [bar.get_height() for bar in axes.patches] == [500, 500]
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(-1, 1), (0, 1)]
        assert axes.get_title()[1:] == ": 1 values, 90% zeros"
        assert [(line.get_xdata()[0], line.get_linestyle()) for line in axes.lines] == [(0, ":"), (0.5, "-")]
    (empty,) = plot_codebook({"a": np.zeros(5)}, {"a": [0]}).axes
    assert not empty.patches
    assert empty.get_title() == "a: 1 values, 100% zeros"


def test_bits_are_bars_with_their_mean_over_the_weights():
    axes = plot_bits({"a": 8, "b": 2}, sizes={"a": 100, "b": 300}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [8, 2]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(3.5)
    assert [text.get_text() for text in axes.texts] == ["8  (100 weights)", "2  (300 weights)"]
    assert not plot_bits({"a": 8}).axes[0].lines


def test_latency_shows_both_medians_of_every_pair():
    axes = plot_latency({"batch 1": ([1, 2, 9], [1, 1, 1.1]), "batch 32": ([30, 31], [10, 20])}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "1", "30.5", "15"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "compressed"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["batch 1", "batch 32"]
