"""Metrics that torchmetrics lacks, or counts otherwise."""

from distill_lightning.outputs.metrics.box_metric import BoxMetric
from distill_lightning.outputs.metrics.classification import (
    AURC,
    Accuracy,
    Agreement,
    BrierScore,
    CalibrationError,
    Confidences,
    MeanDivergence,
    NegativeLogLikelihood,
    classification_metrics,
)
from distill_lightning.outputs.metrics.detection import (
    COCOAveragePrecision,
    DetectionCalibrationError,
    VOC07AveragePrecision,
    detection_metrics,
)
from distill_lightning.outputs.metrics.gap import GapReduction
from distill_lightning.outputs.metrics.regression import (
    AngularError,
    GaussianDivergence,
    GaussianMeanAbsoluteError,
    GaussianNegativeLogLikelihood,
    GaussianRootMeanSquaredError,
    IntervalCalibration,
    regression_metrics,
)
from distill_lightning.outputs.metrics.translation import Perplexity, corpus_scores, token_metrics

__all__ = [
    "AURC",
    "Accuracy",
    "Agreement",
    "AngularError",
    "BoxMetric",
    "BrierScore",
    "COCOAveragePrecision",
    "CalibrationError",
    "Confidences",
    "DetectionCalibrationError",
    "GapReduction",
    "GaussianDivergence",
    "GaussianMeanAbsoluteError",
    "GaussianNegativeLogLikelihood",
    "GaussianRootMeanSquaredError",
    "IntervalCalibration",
    "MeanDivergence",
    "NegativeLogLikelihood",
    "Perplexity",
    "VOC07AveragePrecision",
    "classification_metrics",
    "corpus_scores",
    "detection_metrics",
    "regression_metrics",
    "token_metrics",
]
