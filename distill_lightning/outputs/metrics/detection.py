"""What object detectors are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.detection import MeanAveragePrecision

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.functional.calibration import ECE_BINS
from distill_lightning.outputs.metrics.exact import ExactMetric

# What a row of numbers is about: an image, which the rows below it belong to, a detection or an object.
_IMAGE, _DETECTION, _OBJECT, _COLUMNS = 0, 1, 2, 7
# Larger than any image: COCO's code leaves out objects of a larger area than this.
_LEFT_OUT_AREA = 1e12


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


class COCOAveragePrecision(BoxMetric):
    """Mean average precision as COCO defines it, of all classes and of each.

    It is computed by torchmetrics' ``MeanAveragePrecision`` with ``faster-coco-eval`` or ``pycocotools``, whichever is
    installed. ``map`` is the mean over the intersections over union 0.50, 0.55, ..., 0.95, ``map_50`` that of 0.50
    alone, and ``map_<class>`` the mean of ``map`` for one class. A difficult object is neither hit nor missed, and what
    is detected on it does not count. Without an object that counts a value is NaN.

    Args:
        num_classes: ``C``, without the background.
        class_names: of the classes from 1 on; ``None``: their numbers.

    Raises:
        InputError: when it is computed: neither of the two packages is installed.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import COCOAveragePrecision
        >>> metric = COCOAveragePrecision(1, class_names=["cat"])
        >>> boxes = tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]])
        >>> found = {"boxes": boxes[:1], "scores": tensor([0.9]), "labels": tensor([1])}
        >>> metric.update([found], [{"boxes": boxes, "labels": tensor([1, 1])}])
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'map': 0.505, 'map_50': 0.505, 'map_cat': 0.505}
    """

    def __init__(self, num_classes: int, *, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_names = class_names

    def compute(self) -> dict[str, Tensor]:
        """The values over everything added, by name."""
        # Each process has the images of all by now.
        metric = MeanAveragePrecision(backend=_backend(), class_metrics=True, sync_on_compute=False)
        metric.warn_on_many_detections = False
        for image in self.images():
            metric.update(*_as_coco(image))
        found = metric.compute()
        # The backends say -1 where there is nothing to find.
        by_class = dict(zip(found["classes"].reshape(-1).tolist(), found["map_per_class"].reshape(-1), strict=True))
        names = self.class_names or range(1, self.num_classes + 1)
        nothing = torch.tensor(-1.0)
        values = {name: _or_nan(found[name]) for name in ("map", "map_50")}
        return values | {f"map_{name}": _or_nan(by_class.get(number, nothing)) for number, name in enumerate(names, 1)}


class VOC07AveragePrecision(BoxMetric):
    """VOC's mean average precision until 2009: `distill_lightning.functional.eleven_point_precision` of each class.

    A hit overlaps its object by at least half, difficult objects do not count; see
    `distill_lightning.functional.match_detections`. Classes without an object that counts are left out.

    Args:
        num_classes: ``C``, without the background.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import VOC07AveragePrecision
        >>> metric = VOC07AveragePrecision(1)
        >>> boxes = tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]])
        >>> found = {"boxes": boxes[:1], "scores": tensor([0.9]), "labels": tensor([1])}
        >>> metric.update([found], [{"boxes": boxes, "labels": tensor([1, 1])}])
        >>> metric.compute()
        tensor(0.5455)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def by_class(self) -> Tensor:
        """The precision of each class from 1 on, ``(C,)``; NaN for one without an object that counts."""
        images = self.images()
        scores, labels, hit = _joined(images)
        objects = torch.cat([image.target_labels[~image.difficult] for image in images] or [labels])
        values = []
        for number in range(1, self.num_classes + 1):
            own, count = labels == number, int((objects == number).sum())
            values.append(functional.eleven_point_precision(scores[own], hit[own], count))
        return torch.stack(values).float()

    def compute(self) -> Tensor:
        """The mean over the classes; NaN if none has an object."""
        return self.by_class().nanmean()


class DetectionCalibrationError(BoxMetric):
    r"""How far the scores of detections are from their precision, the D-ECE of the class scores.

    .. math:: \sum_b \frac{n_b}{N} \lvert \mathrm{precision}_b - \mathrm{score}_b \rvert

    over bins of the score, of all detections that a detector returns: the precision is the share of those that are the
    hits of `distill_lightning.functional.match_detections`. Detections of difficult objects do not count.

    Küppers, Kronenberger, Shantia, Haselhoff: *Multivariate Confidence Calibration for Object Detection*,
    https://arxiv.org/abs/2004.13546

    Args:
        bins: number of equally wide bins.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import DetectionCalibrationError
        >>> metric = DetectionCalibrationError()
        >>> boxes = tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]])
        >>> found = {"boxes": boxes, "scores": tensor([0.9, 0.5]), "labels": tensor([1, 1])}
        >>> metric.update([found], [{"boxes": boxes[:1], "labels": tensor([1])}])
        >>> metric.compute()
        tensor(0.3000)
    """

    higher_is_better = False

    def __init__(self, *, bins: int = ECE_BINS) -> None:
        super().__init__()
        self.bins = bins

    def compute(self) -> Tensor:
        """The error over everything added; NaN without a detection that counts."""
        scores, _, hit = _joined(self.images())
        return functional.expected_calibration_error(scores, hit, bins=self.bins).float()


def detection_metrics(num_classes: int, *, class_names: Sequence[str] | None = None) -> MetricCollection:
    """What every detector is judged by.

    ``map``, ``map_50`` and ``map_<class>`` (`COCOAveragePrecision`), ``voc07_map_50`` (`VOC07AveragePrecision`), and
    ``ece`` (`DetectionCalibrationError`, 15 bins), all in ``[0, 1]``.

    Args:
        num_classes: ``C``, without the background.
        class_names: of the classes from 1 on; ``None``: their numbers.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import detection_metrics
        >>> metrics = detection_metrics(1, class_names=["cat"])
        >>> boxes = tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]])
        >>> found = {"boxes": boxes[:1], "scores": tensor([0.9]), "labels": tensor([1])}
        >>> values = metrics([found], [{"boxes": boxes, "labels": tensor([1, 1])}])
        >>> {name: round(float(value), 4) for name, value in values.items()}
        {'map': 0.505, 'map_50': 0.505, 'map_cat': 0.505, 'ece': 0.1, 'voc07_map_50': 0.5455}
    """
    return MetricCollection(
        {
            "coco": COCOAveragePrecision(num_classes, class_names=class_names),
            "voc07_map_50": VOC07AveragePrecision(num_classes),
            "ece": DetectionCalibrationError(),
        }
    )


def _rows(kind: int, labels: Tensor, numbers: Tensor, boxes: Tensor) -> Tensor:
    about = torch.stack([torch.full_like(labels, kind), labels, numbers], dim=1)
    return torch.cat([about, boxes.reshape(-1, 4)], dim=1).float()


def _image(rows: Tensor) -> Image:
    found, there = rows[rows[:, 0] == _DETECTION], rows[rows[:, 0] == _OBJECT]
    return Image(found[:, 3:], found[:, 2], found[:, 1].long(), there[:, 3:], there[:, 1].long(), there[:, 2] > 0)


def _joined(images: Sequence[Image]) -> tuple[Tensor, Tensor, Tensor]:
    """Score, class and whether it is a hit of each detection that counts."""
    parts = [(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))]
    for image in images:
        hit, counted = image.matched()
        parts.append((image.scores[counted], image.labels[counted], hit[counted]))
    scores, labels, hits = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(labels), torch.cat(hits)


def _as_coco(image: Image) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """An image as torchmetrics reads it, with difficult objects that are left out.

    COCO's code leaves out what is larger than any image, and lets one detection belong to it. So there is a copy of a
    difficult object for each detection that may.
    """
    boxes, labels = image.target_boxes, image.target_labels
    copies = torch.ones_like(labels)
    if image.difficult.any() and len(image.boxes):
        near = functional.intersection_over_union(image.boxes, boxes) >= 0.5
        belong = (near & (image.labels[:, None] == labels)).sum(dim=0)
        copies = torch.where(image.difficult, belong.clamp_min(1), 1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).masked_fill(image.difficult, _LEFT_OUT_AREA)
    target = {"boxes": boxes, "labels": labels, "area": areas}
    found = {"boxes": image.boxes, "scores": image.scores, "labels": image.labels}
    return [found], [{name: value.repeat_interleave(copies, dim=0) for name, value in target.items()}]


def _or_nan(value: Tensor) -> Tensor:
    return torch.where(value < 0, torch.nan, value)


def _backend() -> Any:
    for package in ("faster_coco_eval", "pycocotools"):
        if find_spec(package):
            return package
    raise InputError(
        "mean average precision needs faster-coco-eval or pycocotools, and neither is installed: pip install "
        "'distill-lightning[detection]'"
    )
