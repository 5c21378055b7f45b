"""Compression steps: plain descriptions of what is done when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.prune import Prune
from distill_lightning.compression.steps.regularise import Regularise
from distill_lightning.compression.steps.sensitivity_scope import Sensitivity

__all__ = ["At", "Order", "Prune", "Regularise", "Sensitivity", "Step"]
