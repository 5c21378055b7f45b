"""What watches a training and keeps or shows what it sees; no callback knows a concrete module."""

from distill_lightning.callbacks.run_keeper import RunKeeper

__all__ = ["RunKeeper"]
