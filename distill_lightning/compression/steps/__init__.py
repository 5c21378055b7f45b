"""Compression steps: plain descriptions of what is done, when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import At, Order, Step, TargetedStep, TrainedStep, Work
from distill_lightning.compression.steps.encode import Encode
from distill_lightning.compression.steps.learn_mask import L0, LearnMask, MaskRule, Movement, SoftMovement
from distill_lightning.compression.steps.low_rank import LowRank
from distill_lightning.compression.steps.mixed_precision import MixedPrecision
from distill_lightning.compression.steps.prune_units import PruneUnits
from distill_lightning.compression.steps.prune_weights import PruneWeights
from distill_lightning.compression.steps.quantize import Quantize
from distill_lightning.compression.steps.regularise import Regularise
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.share_weights import HashShare, ShareWeights
from distill_lightning.compression.steps.tie_layers import TieLayers

__all__ = [
    "L0", "At", "Encode", "HashShare", "LearnMask", "LowRank", "MaskRule", "MixedPrecision", "Movement", "Order",
    "PruneUnits", "PruneWeights", "Quantize", "Regularise", "Sensitivity", "ShareWeights", "SoftMovement",
    "Step", "TargetedStep", "TieLayers", "TrainedStep", "Work",
]  # fmt: skip
