"""Compression steps: plain descriptions of what is done when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.encode import Encode
from distill_lightning.compression.steps.precision import MixedPrecision
from distill_lightning.compression.steps.prune import Prune
from distill_lightning.compression.steps.quantize import Quantize

__all__ = ["At", "Encode", "MixedPrecision", "Order", "Prune", "Quantize", "Step"]
