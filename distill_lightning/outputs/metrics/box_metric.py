"""The base of metrics of boxes, which keep all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_lightning import functional
from distill_lightning.outputs.metrics.exact import ExactMetric

# What a row of numbers is about: an image, which the rows below it belong to, a detection or an object.
_IMAGE, _DETECTION, _OBJECT, _COLUMNS = 0, 1, 2, 7


class Image(NamedTuple):
    """What was detected on an image, and what is there: boxes ``(M, 4)`` and ``(G, 4)``, with what belongs to each."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    target_boxes: Tensor
    target_labels: Tensor
    difficult: Tensor

    def matched(self) -> tuple[Tensor, Tensor]:
        """Hits, and what counts, see `distill_lightning.functional.match_detections`."""
        return functional.match_detections(*self[:-1], difficult=self.difficult)


class BoxMetric(ExactMetric):
    """A metric of boxes, which keeps all of them: 28 bytes each, from all processes.

    The result does not depend on the order of the images, not even where scores are equal.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import BoxMetric
        >>> class Objects(BoxMetric):
        ...     def compute(self):
        ...         return sum(len(image.target_boxes) for image in self.images())
        >>> metric = Objects()
        >>> box = tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> there = {"boxes": box, "labels": tensor([1])}
        >>> metric.update([{**there, "scores": tensor([0.9])}], [there])
        >>> metric.compute()
        1
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat and in float32, because a process without images joins in with an empty tensor of that kind.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Add images.

        Args:
            predictions: ``boxes`` ``(M, 4)``, ``scores`` and ``labels`` ``(M,)`` of each, as torchvision's detectors
                return them.
            targets: ``boxes`` ``(G, 4)``, ``labels`` and perhaps ``difficult`` ``(G,)`` of each.
        """
        for found, there in zip(predictions, targets, strict=True):
            objects = there["labels"]
            difficult = there.get("difficult", torch.zeros_like(objects))
            rows = [
                torch.zeros(1, _COLUMNS, device=objects.device),
                _rows(_DETECTION, found["labels"], found["scores"], found["boxes"]),
                _rows(_OBJECT, objects, difficult, there["boxes"]),
            ]
            self.rows.append(torch.cat(rows).flatten())

    def images(self) -> list[Image]:
        """Everything added, on the host."""
        state: Any = self.rows
        # Between processes torchmetrics has joined the list itself.
        flat = state if isinstance(state, Tensor) else torch.cat([torch.zeros(0, device=self.device), *state])
        rows = flat.cpu().view(-1, _COLUMNS)
        starts = (rows[:, 0] == _IMAGE).nonzero().flatten()
        pieces = rows.tensor_split(starts[1:]) if len(starts) else []
        return [_image(piece) for piece in sorted(pieces, key=lambda piece: piece.numpy().tobytes())]


def _rows(kind: int, labels: Tensor, numbers: Tensor, boxes: Tensor) -> Tensor:
    about = torch.stack([torch.full_like(labels, kind), labels, numbers], dim=1)
    return torch.cat([about, boxes.reshape(-1, 4)], dim=1).float()


def _image(rows: Tensor) -> Image:
    found, there = rows[rows[:, 0] == _DETECTION], rows[rows[:, 0] == _OBJECT]
    return Image(found[:, 3:], found[:, 2], found[:, 1].long(), there[:, 3:], there[:, 1].long(), there[:, 2] > 0)
