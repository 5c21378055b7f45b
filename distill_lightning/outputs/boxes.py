"""Outputs that are boxes with classes and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torchmetrics import MetricCollection

from distill_lightning.errors import InputError
from distill_lightning.outputs.metrics import detection_metrics
from distill_lightning.outputs.metrics.detection import check_class_names
from distill_lightning.outputs.output import Output


@dataclass(frozen=True)
class Boxes(Output):
    """What torchvision's detectors return of each image: a dict of ``boxes``, ``scores`` and ``labels``.

    It is neither a distribution nor a row of numbers: what other methods ask their output for is refused.

    Args:
        num_classes: ``C``, without the background, which is class 0 of labels and detectors.
        class_names: by which the metrics of the classes are logged; ``None``: their numbers, from 1.

    Raises:
        InputError: no class, another number of names, a name twice, or a single string.

    Example:
        >>> from distill_lightning import Boxes
        >>> sorted(Boxes(2, class_names=["cat", "dog"]).metrics())
        ['coco', 'ece', 'voc07_map_50']
    """

    num_classes: int
    class_names: Sequence[str] | None = None

    name = "boxes"
    label_term = "boxes"
    has_temperature = False
    watched = "map"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_classes < 1:
            raise InputError(f"num_classes must be at least 1, without the background, got {self.num_classes}")
        check_class_names(self.num_classes, self.class_names)

    def check(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """Refuse a network that returns a tensor."""
        raise InputError(
            f"{who} ({type(network).__name__}) gives a tensor of shape {tuple(shape)} where boxes are needed: give a "
            "detector of torchvision"
        )

    def metrics(self) -> MetricCollection:
        """`detection_metrics`, which read lists of dicts."""
        return detection_metrics(self.num_classes, class_names=self.class_names)
