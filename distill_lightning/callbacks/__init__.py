"""Callbacks that observe, record or change a training; no callback depends on a concrete module."""

from distill_lightning.callbacks.checkpoint_io import WholeCheckpointIO, write_checkpoints_whole
from distill_lightning.callbacks.compression import CompressionCallback
from distill_lightning.callbacks.figures import ConfidenceFigure, ReliabilityDiagram, RiskCoverage, log_figure
from distill_lightning.callbacks.reconstruction import ReconstructionErrorProbe
from distill_lightning.callbacks.run_keeper import RunKeeper
from distill_lightning.callbacks.stages import Measurements
from distill_lightning.callbacks.teacher_report import TeacherReport

__all__ = [
    "CompressionCallback",
    "ConfidenceFigure",
    "Measurements",
    "ReconstructionErrorProbe",
    "ReliabilityDiagram",
    "RiskCoverage",
    "RunKeeper",
    "TeacherReport",
    "WholeCheckpointIO",
    "log_figure",
    "write_checkpoints_whole",
]
