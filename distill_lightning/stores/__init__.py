"""What is kept by sample index. Plain tensors: DDP would overwrite buffers with rank 0's before every forward."""

from distill_lightning.stores.prediction import PredictionStore
from distill_lightning.stores.shards import ShardedRecords
from distill_lightning.stores.sidecar import Sidecar
from distill_lightning.stores.teacher import TeacherStore

__all__ = ["PredictionStore", "ShardedRecords", "Sidecar", "TeacherStore"]
