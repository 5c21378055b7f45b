"""Compression steps: plain descriptions of what is done when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.low_rank import LowRank
from distill_lightning.compression.steps.sharing import HashShare, ShareWeights
from distill_lightning.compression.steps.tying import TieLayers

__all__ = ["At", "HashShare", "LowRank", "Order", "ShareWeights", "Step", "TieLayers"]
