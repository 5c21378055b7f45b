"""Self-KD: a network that learns from its own past predictions."""

from distill_lightning.modules.self_kd.classification import SelfKDModule

__all__ = ["SelfKDModule"]
