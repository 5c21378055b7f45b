"""Plots: functions that take arrays and return matplotlib figures."""

from distill_lightning.plots.comparison import learning_curves, score_bars
from distill_lightning.plots.compression import (
    plot_bits,
    plot_codebook,
    plot_latency,
    plot_pareto,
    plot_sensitivity,
    plot_sparsity,
    plot_spectra,
)
from distill_lightning.plots.confidence import reliability_diagram, risk_coverage_curve
from distill_lightning.plots.detection import DrawnBoxes, detected_boxes
from distill_lightning.plots.reconstruction import reconstruction_errors
from distill_lightning.plots.teachers import teacher_bars

__all__ = [
    "DrawnBoxes",
    "detected_boxes",
    "learning_curves",
    "plot_bits",
    "plot_codebook",
    "plot_latency",
    "plot_pareto",
    "plot_sensitivity",
    "plot_sparsity",
    "plot_spectra",
    "reconstruction_errors",
    "reliability_diagram",
    "risk_coverage_curve",
    "score_bars",
    "teacher_bars",
]
