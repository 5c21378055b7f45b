"""The figures of confidence show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from distill_lightning.plots import reliability_diagram, risk_coverage_curve


def test_reliability_leaves_out_bins_with_few_samples_and_draws_references_in_grey():
    bins = (np.array([100.0, 5.0, 50.0]), np.array([20.0, 2.0, 45.0]), np.array([30.0, 1.0, 40.0]))
    figure = reliability_diagram({"kd": bins}, {"ensemble": bins})
    (axes,) = figure.axes
    _, method, reference = axes.lines
    assert method.get_xdata() == pytest.approx([0.2, 0.9])
    assert method.get_ydata() == pytest.approx([0.3, 0.8])
    assert reference.get_color() == "0.4" != method.get_color()
    assert axes.get_title() == "kd"
    assert "grey: ensemble" in figure.get_supxlabel()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 / 155, 5 / 155, 50 / 155])


def curve(*wrong):
    """Coverage and risk of answers in the order of falling confidence."""
    ranks = np.arange(1, len(wrong) + 1)
    return ranks / len(wrong), np.cumsum(wrong) / ranks


def test_risk_and_coverage_are_drawn_with_the_best_order_of_the_same_answers():
    figure = risk_coverage_curve({"kd": curve(0, 1, 0, 1)})
    (axes,) = figure.axes
    line, best = axes.lines
    assert line.get_xdata() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert line.get_ydata() == pytest.approx([0, 50, 100 / 3, 50])
    # The best order is right, right, wrong, wrong.
    assert best.get_ydata() == pytest.approx([0, 0, 100 / 3, 50])
    assert best.get_linestyle() == "--"
    assert best.get_color() == line.get_color()


def test_the_legend_gives_both_areas_times_1000():
    # The specification's hand values: AURC 333.33, E-AURC 125.0.
    figure = risk_coverage_curve({"kd": curve(0, 1, 0, 1), "feed": curve(0, 0, 0, 0)})
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["kd: AURC 333.3 ‰, E-AURC 125.0 ‰", "feed: AURC 0.0 ‰, E-AURC 0.0 ‰"]


def test_the_shaded_area_is_the_excess():
    figure = risk_coverage_curve({"kd": curve(1, 0, 0, 1, 0), "feed": curve(0, 1)})
    kd, feed = (area for area in figure.axes[0].collections if isinstance(area, PolyCollection))
    assert kd.get_facecolor()[0][:3] == pytest.approx((0x1F / 255, 0x77 / 255, 0xB4 / 255))
    assert feed.get_facecolor()[0][:3] != pytest.approx(kd.get_facecolor()[0][:3])
    heights = {round(float(x), 6): [] for x in curve(1, 0, 0, 1, 0)[0]}
    for x, y in kd.get_paths()[0].vertices:
        heights[round(float(x), 6)].append(y)
    for x, risk, best in zip(*curve(1, 0, 0, 1, 0), curve(0, 0, 0, 1, 1)[1], strict=True):
        found = heights[round(float(x), 6)]
        assert (min(found), max(found)) == pytest.approx((100 * best, 100 * risk))


def test_one_sample_has_a_curve():
    figure = risk_coverage_curve({"kd": curve(1)})
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[100.0], [100.0]]
