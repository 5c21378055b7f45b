"""Figures of what a detector finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from distill_lightning.plots.style import ShownFigure

_COLUMNS = 4
_WIDTH = 3.0
"""Of an image, in inches."""
_TRUE = "white"
# Readable on light and on dark images.
_OUTLINED = [withStroke(linewidth=2.5, foreground="0.2")]


class DrawnBoxes(NamedTuple):
    """The boxes of one image.

    Attributes:
        boxes: left, top, right and bottom in pixels, ``(M, 4)``.
        labels: the class of each, from 1, ``(M,)``.
        scores: how sure the detector is of each, ``(M,)``; ``None`` for true boxes.
    """

    boxes: NDArray[Any]
    labels: NDArray[Any]
    scores: NDArray[Any] | None = None


def detected_boxes(
    images: Sequence[NDArray[Any]],
    found: Sequence[DrawnBoxes],
    true: Sequence[DrawnBoxes] | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw boxes on images: what was found in the colour of its class with its score, what is there dashed in white.

    Args:
        images: ``(H, W)`` in grey or ``(H, W, 3)`` in colour, in ``[0, 1]``; sizes may differ.
        found: of each image.
        true: of each image; ``None``: they are not known.
        class_names: of the classes from 1 on; ``None``: their numbers are written.
    """
    columns = max(min(_COLUMNS, len(images)), 1)
    rows = max(math.ceil(len(images) / columns), 1)
    tallest = max((len(image) / image.shape[1] for image in images), default=1.0)
    figure = ShownFigure(figsize=(_WIDTH * columns, _WIDTH * tallest * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for place, (panel, image) in enumerate(zip(panels, images, strict=False)):
        panel.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
        if true is not None:
            _draw(panel, true[place], class_names)
        _draw(panel, found[place], class_names)
    return figure


def _draw(axes: Axes, boxes: DrawnBoxes, class_names: Sequence[str] | None) -> None:
    for place, (left, top, right, bottom) in enumerate(boxes.boxes):
        label = int(boxes.labels[place])
        name = str(label) if class_names is None else class_names[label - 1]
        # Pixels are drawn around their centres, and boxes reach from edge to edge.
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
        if boxes.scores is None:
            box = Rectangle(corner, *sides, fill=False, edgecolor=_TRUE, linestyle="--", path_effects=_OUTLINED)
            axes.text(left, bottom, name, color=_TRUE, fontsize=7, va="bottom", clip_on=True, path_effects=_OUTLINED)
        else:
            color = f"C{(label - 1) % 10}"
            box = Rectangle(corner, *sides, fill=False, edgecolor=color, linestyle="-")
            text = f"{name} {boxes.scores[place]:.2f}"
            under = {"facecolor": color, "edgecolor": "none", "pad": 0.5, "alpha": 0.7}
            axes.text(left, top, text, color="white", fontsize=7, va="top", clip_on=True, bbox=under)
        axes.add_patch(box)
