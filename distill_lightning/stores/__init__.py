"""What is kept by sample index. Plain tensors: DDP would overwrite buffers with rank 0's before every forward."""

from distill_lightning.stores.prediction import PredictionStore

__all__ = ["PredictionStore"]
