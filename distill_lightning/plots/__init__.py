"""Arrays in, matplotlib figures out."""

from distill_lightning.plots.comparison import accuracy_bars, learning_curves, reliability_diagram

__all__ = ["accuracy_bars", "learning_curves", "reliability_diagram"]
