"""The figure of reconstruction errors shows every number it is given."""

import numpy as np
import pytest

from distill_lightning.plots import reconstruction_errors

ABSOLUTE = {
    ("student", "teacher_0"): [0.4, 0.3, 0.2],
    ("student", "teacher_1"): [0.5, 0.4, 0.35],
    ("control", "teacher_0"): np.array([0.9, 0.8, 0.7]),
    ("control", "control"): [0.1, 0.1, 0.1],
}
RELATIVE = {pair: [10 * error for error in errors] for pair, errors in ABSOLUTE.items()}


def test_every_curve_stands_in_both_panels_over_epochs_from_one():
    left, right = reconstruction_errors(ABSOLUTE, RELATIVE).axes
    assert (left.get_title(), right.get_title()) == ("absolute error", "relative error")
    for axes, curves in ((left, ABSOLUTE), (right, RELATIVE)):
        assert len(axes.lines) == 4
        for line, errors in zip(axes.lines, curves.values(), strict=True):
            assert line.get_xdata().tolist() == [1, 2, 3]
            assert line.get_ydata() == pytest.approx(errors)
        assert axes.get_ylim()[0] == 0


def test_names_tell_what_is_reconstructed_from_what():
    left, right = reconstruction_errors(ABSOLUTE, RELATIVE).axes
    names = ["student to teacher_0", "student to teacher_1", "control to teacher_0", "control"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == names
    assert [line.get_label() for line in left.lines] == names


def test_colours_tell_targets_and_strokes_tell_networks():
    left, right = reconstruction_errors(ABSOLUTE, RELATIVE).axes
    for axes in (left, right):
        first, second, control, alone = axes.lines
        assert first.get_color() == control.get_color()
        assert len({first.get_color(), second.get_color(), alone.get_color()}) == 3
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "-"]
