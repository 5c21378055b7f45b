"""What is kept by sample index. Plain tensors: DDP would overwrite buffers with rank 0's before every forward."""

from distill_lightning.storage.prediction import PredictionStore
from distill_lightning.storage.shards import ShardedRecords
from distill_lightning.storage.sidecar import Sidecar

__all__ = ["PredictionStore", "ShardedRecords", "Sidecar"]
