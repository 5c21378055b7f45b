"""The figures show the numbers that they are given."""

import numpy as np
import pytest

from distill_lightning.plots import accuracy_bars, learning_curves, reliability_diagram


def test_accuracy_bars_show_every_seed_the_mean_and_the_deviation():
    figure = accuracy_bars({"alone": [0.8, 0.9], "kd": [0.5]}, {"ensemble": 0.95})
    (axes,) = figure.axes
    dots = axes.lines[0]
    assert dots.get_ydata() == pytest.approx([80, 90])
    bars = [container for container in axes.containers if container.has_yerr]
    low, high = bars[0].lines[1]
    assert (low.get_ydata()[0], high.get_ydata()[0]) == pytest.approx((85 - 7.0711, 85 + 7.0711), abs=1e-3)
    assert bars[1].lines[1][0].get_ydata()[0] == pytest.approx(50)
    assert [text.get_text() for text in axes.texts] == ["85.0", "50.0", "ensemble"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["alone", "kd"]


def test_learning_curves_are_means_over_seeds():
    figure = learning_curves({"kd": np.array([[0.1, 0.5], [0.3, 0.7]])})
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata() == pytest.approx([20, 60])


def test_reliability_leaves_out_bins_with_few_samples_and_draws_references_in_grey():
    bins = (np.array([100.0, 5.0, 50.0]), np.array([20.0, 2.0, 45.0]), np.array([30.0, 1.0, 40.0]))
    figure = reliability_diagram({"kd": bins}, {"ensemble": bins})
    _, method, reference = figure.axes[0].lines
    assert method.get_xdata() == pytest.approx([0.2, 0.9])
    assert method.get_ydata() == pytest.approx([0.3, 0.8])
    assert reference.get_color() == "0.4" != method.get_color()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["kd", "ensemble"]
