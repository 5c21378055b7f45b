"""Metrics that torchmetrics lacks."""

from distill_lightning.metrics.classification import (
    Agreement,
    CalibrationError,
    NegativeLogLikelihood,
    classification_metrics,
)

__all__ = ["Agreement", "CalibrationError", "NegativeLogLikelihood", "classification_metrics"]
