"""Callbacks that observe, record or change a training; no callback depends on a concrete module."""

from distill_lightning.callbacks.checkpoint_io import WholeCheckpointIO, write_checkpoints_whole, written_checkpoints
from distill_lightning.callbacks.compression import CompressionCallback
from distill_lightning.callbacks.figures import ConfidenceFigure, ReliabilityDiagram, RiskCoverage, log_figure
from distill_lightning.callbacks.prediction_writers import (
    DetectionWriter,
    PredictionWriter,
    TranslationWriter,
    writer_for,
)
from distill_lightning.callbacks.reconstruction import ReconstructionErrorProbe
from distill_lightning.callbacks.run_keeper import RunKeeper
from distill_lightning.callbacks.samples import DetectionFigures, TranslationSamples
from distill_lightning.callbacks.stages import Measurements
from distill_lightning.callbacks.tables import Table, log_table
from distill_lightning.callbacks.teacher_report import TeacherReport

__all__ = [
    "CompressionCallback",
    "ConfidenceFigure",
    "DetectionFigures",
    "DetectionWriter",
    "Measurements",
    "PredictionWriter",
    "ReconstructionErrorProbe",
    "ReliabilityDiagram",
    "RiskCoverage",
    "RunKeeper",
    "Table",
    "TeacherReport",
    "TranslationSamples",
    "TranslationWriter",
    "WholeCheckpointIO",
    "log_figure",
    "log_table",
    "write_checkpoints_whole",
    "writer_for",
    "written_checkpoints",
]
