"""The figures show the numbers that they are given."""

import numpy as np
import pytest

from distill_lightning.plots import learning_curves, score_bars


def test_score_bars_show_every_seed_the_mean_and_the_deviation():
    figure = score_bars({"alone": [0.8, 0.9], "kd": [0.5]}, {"ensemble": 0.95})
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


def test_a_figure_shows_itself_in_a_notebook():
    figure = score_bars({"alone": [0.8]}, {})
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
