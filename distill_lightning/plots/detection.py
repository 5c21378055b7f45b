"""Figures of what a detector finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from distill_lightning.plots.style import ShownFigure

_COLUMNS = 4
_TRUE = "0.85"


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
    """Draw boxes on images: what was found in the colour of its class with its score, what is there dashed in grey.

    Args:
        images: ``(H, W)`` in grey or ``(H, W, 3)`` in colour, in ``[0, 1]``; sizes may differ.
        found: of each image.
        true: of each image; ``None``: they are not known.
        class_names: of the classes from 1 on; ``None``: their numbers are written.
    """
    columns = max(min(_COLUMNS, len(images)), 1)
    rows = max(math.ceil(len(images) / columns), 1)
    figure = ShownFigure(figsize=(3 * columns, 3 * rows), layout="constrained")
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
        is_true = boxes.scores is None
        color = _TRUE if is_true else f"C{(label - 1) % 10}"
        # Pixels are drawn around their centres, and boxes reach from edge to edge.
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, linestyle="--" if is_true else "-"))
        if boxes.scores is None:
            axes.text(left, bottom, name, color=color, fontsize=7, va="bottom", clip_on=True)
        else:
            axes.text(left, top, f"{name} {boxes.scores[place]:.2f}", color=color, fontsize=7, va="top", clip_on=True)
