"""Compression steps: plain descriptions of what is done when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.low_rank import LowRank
from distill_lightning.compression.steps.prune import Prune
from distill_lightning.compression.steps.sharing import ShareWeights

__all__ = ["At", "LowRank", "Order", "Prune", "ShareWeights", "Step"]
