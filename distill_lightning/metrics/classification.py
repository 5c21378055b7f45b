"""What torchmetrics lacks, or counts otherwise, for classification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from distill_lightning import functional


class NegativeLogLikelihood(Metric):
    """Mean of ``-log p(target)`` in nats, from logits ``(N, K)`` and classes ``(N,)``."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.total += F.cross_entropy(logits.float(), target, reduction="sum")
        self.count += len(target)

    def compute(self) -> Tensor:
        """The mean over everything added."""
        mean: Tensor = self.total / self.count
        return mean


class CalibrationError(Metric):
    """Expected calibration error of `distill_lightning.functional.expected_calibration_error`, over all batches.

    torchmetrics puts a confidence of exactly 1 into a bin of its own; here it counts in the last one.

    Args:
        bins: number of equally wide bins.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    binned: Tensor

    def __init__(self, *, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("binned", torch.zeros(3, bins), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, K)`` and classes ``(N,)``."""
        confidence, predicted = F.softmax(logits.float(), dim=-1).max(dim=-1)
        bins = functional.calibration_bins(confidence, predicted == target, bins=self.bins)
        self.binned += torch.stack(bins).to(self.binned)

    def compute(self) -> Tensor:
        """The error over everything added."""
        counts, confidences, hits = self.binned.unbind()
        return (hits - confidences).abs().sum() / counts.sum()


class Agreement(Metric):
    """Share of samples on which two networks name the same class, from their outputs ``(N, K)``."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    same: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("same", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a batch."""
        self.same += (first.argmax(dim=-1) == second.argmax(dim=-1)).sum()
        self.count += len(first)

    def compute(self) -> Tensor:
        """The share over everything added."""
        share: Tensor = self.same / self.count
        return share


def classification_metrics(num_classes: int) -> MetricCollection:
    """What every classifier is judged by: ``accuracy``, ``nll``, ``ece`` (15 bins), ``top5`` beyond five classes."""
    metrics: dict[str, Metric | MetricCollection] = {
        # Micro average: the plain share of samples that are right.
        "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
        "nll": NegativeLogLikelihood(),
        "ece": CalibrationError(),
    }
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5, validate_args=False)
    return MetricCollection(metrics, compute_groups=False)
