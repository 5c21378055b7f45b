"""What every student is judged by in validation and test."""

from __future__ import annotations

from torchmetrics import Metric, MetricCollection

from distill_lightning.outputs.metrics.classification import Agreement, MeanDivergence, classification_metrics
from distill_lightning.outputs.metrics.regression import GaussianDivergence, regression_metrics


def default_metrics(num_classes: int | None, num_targets: int | None) -> MetricCollection:
    """`classification_metrics` of a classifier, `regression_metrics` of a regression."""
    return regression_metrics(num_targets or 1) if num_classes is None else classification_metrics(num_classes)


def teacher_metrics(num_classes: int | None) -> MetricCollection:
    """How close a student is to its teachers' one prediction: ``agreement`` of classifiers, ``teacher_kl`` in nats."""
    if num_classes is None:
        return MetricCollection({"teacher_kl": GaussianDivergence()}, compute_groups=False)
    metrics: dict[str, Metric | MetricCollection] = {"agreement": Agreement(), "teacher_kl": MeanDivergence()}
    return MetricCollection(metrics, compute_groups=False)
