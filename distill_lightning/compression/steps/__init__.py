"""Compression steps: plain descriptions of what is done when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step

__all__ = ["At", "Order", "Step"]
