"""Bars of the teachers show the rows."""

import pytest

from distill_lightning.plots import teacher_bars

ROWS = [
    {"name": "teacher_0", "accuracy": 0.5, "nll": 1.25, "ece": 0.05, "brier": 0.1},
    {"name": "ensemble", "accuracy": 0.75, "nll": 0.5, "ece": 0.02, "brier": 0.1},
]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_every_metric_has_a_panel_and_every_teacher_a_bar():
    accuracy, nll, ece = teacher_bars(ROWS).axes
    assert heights(accuracy) == pytest.approx([50, 75])
    assert heights(nll) == pytest.approx([1.25, 0.5])
    assert heights(ece) == pytest.approx([5, 2])
    assert [text.get_text() for text in nll.texts] == ["1.25", "0.5"]
    assert [axes.get_title() for axes in (accuracy, nll, ece)] == ["accuracy (%)", "NLL (nats)", "ECE (%)"]
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["teacher_0", "ensemble"]


def test_the_ensemble_is_grey():
    teacher, ensemble = (bar.get_facecolor() for bar in teacher_bars(ROWS).axes[0].patches)
    assert ensemble[:3] == pytest.approx((0.6, 0.6, 0.6))
    assert teacher[:3] != pytest.approx(ensemble[:3])


def test_chance_is_a_line_in_the_panel_of_accuracy_alone():
    accuracy, nll, _ = teacher_bars(ROWS, chance=0.1).axes
    (line,) = accuracy.lines
    assert line.get_ydata() == pytest.approx([10, 10])
    assert accuracy.get_title() == "accuracy (%), dashed: chance"
    assert not nll.lines
    assert not teacher_bars(ROWS).axes[0].lines


def test_a_regression_has_panels_of_its_own():
    row = {"name": "ensemble", "mae": 0.3, "rmse": 0.5, "nll": -1.0, "calibration_error": 0.02}
    figure = teacher_bars([row])
    assert [axes.get_title() for axes in figure.axes] == ["MAE", "RMSE", "NLL (nats)", "calibration error"]
    assert [heights(axes)[0] for axes in figure.axes] == [0.3, 0.5, -1.0, 0.02]
