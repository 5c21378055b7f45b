"""DrawnBoxes are drawn where they are, with class and score."""

import numpy as np
import pytest

from distill_lightning.plots import DrawnBoxes, detected_boxes

GREY, COLOUR = np.zeros((8, 10)), np.full((6, 6, 3), 1.5)
FOUND = DrawnBoxes(np.array([[1.0, 2.0, 5.0, 8.0]]), np.array([2]), np.array([0.876]))
NONE = DrawnBoxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
TRUE = DrawnBoxes(np.array([[0.0, 2.0, 4.0, 7.0]]), np.array([1]))


def shown(axes):
    return [(*patch.get_xy(), patch.get_width(), patch.get_height(), patch.get_linestyle()) for patch in axes.patches]


def test_boxes_reach_from_edge_to_edge():
    first, second = detected_boxes([GREY, COLOUR], [FOUND, NONE], [TRUE, TRUE]).axes
    # The true box comes first, below the one that was found.
    assert shown(first) == [(-0.5, 1.5, 4.0, 5.0, "--"), (0.5, 1.5, 4.0, 6.0, "-")]
    assert [text.get_text() for text in first.texts] == ["1", "2 0.88"]
    assert shown(second) == [(-0.5, 1.5, 4.0, 5.0, "--")]
    assert second.images[0].get_array().max() == 1


def test_classes_are_named_from_one_on():
    (axes,) = detected_boxes([GREY], [FOUND], class_names=("cat", "dog")).axes
    assert [text.get_text() for text in axes.texts] == ["dog 0.88"]
    assert [patch.get_edgecolor()[:3] for patch in axes.patches] == [pytest.approx((1.0, 0.498, 0.055), abs=1e-3)]


def test_images_stand_in_rows_of_four():
    figure = detected_boxes([GREY] * 5, [NONE] * 5)
    assert len(figure.axes) == 8
    assert [len(axes.images) for axes in figure.axes] == [1] * 5 + [0] * 3
    assert figure.get_size_inches().tolist() == pytest.approx([12, 4.8])
