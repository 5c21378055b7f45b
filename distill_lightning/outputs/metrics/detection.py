"""What object detectors are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.detection import MeanAveragePrecision

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.functional.calibration import ECE_BINS
from distill_lightning.outputs.metrics.box_metric import BoxMetric, Image

# Larger than any image: COCO's code leaves out objects of a larger area than this.
_LEFT_OUT_AREA = 1e12
# In float64, as COCO's code has them: rounded to float32, torchmetrics' own ones decide otherwise at the edge.
_OVERLAPS, _RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0.0, 1.0, 101).tolist()


class COCOAveragePrecision(BoxMetric):
    """Mean average precision as COCO defines it, of all classes and of each.

    It is computed by torchmetrics' ``MeanAveragePrecision`` with ``faster-coco-eval`` or ``pycocotools``, whichever is
    installed. ``map`` is the mean over the intersections over union 0.50, 0.55, ..., 0.95, ``map_50`` that of 0.50
    alone, and ``map_class_<name>`` the mean of ``map`` for one class. A difficult object is neither hit nor missed, and
    what is detected on it does not count. Without an object that counts a value is NaN.

    Args:
        num_classes: ``C``, without the background.
        class_names: of the classes from 1 on; ``None``: their numbers.

    Raises:
        InputError: `check_class_names` refuses the names; when it is computed: neither of the two packages is
            installed.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import COCOAveragePrecision
        >>> metric = COCOAveragePrecision(1, class_names=["cat"])
        >>> boxes = tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]])
        >>> found = {"boxes": boxes[:1], "scores": tensor([0.9]), "labels": tensor([1])}
        >>> metric.update([found], [{"boxes": boxes, "labels": tensor([1, 1])}])
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'map': 0.505, 'map_50': 0.505, 'map_class_cat': 0.505}
    """

    def __init__(self, num_classes: int, *, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        check_class_names(num_classes, class_names)
        self.num_classes = num_classes
        self.class_names = class_names

    def compute(self) -> dict[str, Tensor]:
        """The values over everything added, by name."""
        # Each process has the images of all by now.
        metric = MeanAveragePrecision(
            iou_thresholds=_OVERLAPS,
            rec_thresholds=_RECALLS,
            class_metrics=True,
            backend=coco_backend(),
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False
        for image in self.images():
            metric.update(*_as_coco(image))
        found = metric.compute()
        # Without an image there is none for each class.
        of_each = found.get("map_per_class", torch.zeros(0)).reshape(-1)
        by_class = dict(zip(found["classes"].reshape(-1).tolist(), of_each, strict=True))
        names = self.class_names or range(1, self.num_classes + 1)
        nothing = torch.tensor(-1.0)
        values = {name: found[name] for name in ("map", "map_50")}
        values |= {f"map_class_{name}": by_class.get(number, nothing) for number, name in enumerate(names, 1)}
        # The backends say -1 where there is nothing to find.
        return {name: torch.where(value < 0, torch.nan, value) for name, value in values.items()}


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


def check_class_names(num_classes: int, class_names: Sequence[str] | None) -> None:
    """Refuse names that metrics of classes cannot be told apart by.

    Args:
        num_classes: ``C``, without the background.
        class_names: of the classes from 1 on; ``None``: their numbers.

    Raises:
        InputError: a single string, another number of names, or a name twice.

    Example:
        >>> from distill_lightning.outputs.metrics.detection import check_class_names
        >>> check_class_names(2, ["cat", "dog"])
    """
    if class_names is None:
        return
    if isinstance(class_names, str):
        raise InputError(f"class_names must be a list of names, one for each class, got the string {class_names!r}")
    if len(class_names) != num_classes:
        raise InputError(
            f"{len(class_names)} class_names for num_classes={num_classes}: name each class but the background"
        )
    shown = list(map(str, class_names))
    twice = next((name for name in shown if shown.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"class_names have {twice!r} twice, and metrics go by them: give each class a name of its own")


def detection_metrics(num_classes: int, *, class_names: Sequence[str] | None = None) -> MetricCollection:
    """What every detector is judged by.

    ``map``, ``map_50`` and ``map_class_<name>`` (`COCOAveragePrecision`), ``voc07_map_50`` (`VOC07AveragePrecision`),
    and ``ece`` (`DetectionCalibrationError`, 15 bins), all in ``[0, 1]``.

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
        {'map': 0.505, 'map_50': 0.505, 'map_class_cat': 0.505, 'ece': 0.1, 'voc07_map_50': 0.5455}
    """
    return MetricCollection(
        {
            "coco": COCOAveragePrecision(num_classes, class_names=class_names),
            "voc07_map_50": VOC07AveragePrecision(num_classes),
            "ece": DetectionCalibrationError(),
        }
    )


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


def coco_backend() -> Any:
    """The package that computes `COCOAveragePrecision`.

    Raises:
        InputError: neither of the two is installed.
    """
    for package in ("faster_coco_eval", "pycocotools"):
        if find_spec(package):
            return package
    raise InputError(
        "mean average precision needs faster-coco-eval or pycocotools, and neither is installed: pip install "
        "'distill-lightning[detection]'"
    )
