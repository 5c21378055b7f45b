"""Compression steps: plain descriptions of what is done, when and where, for YAML and for Python."""

from distill_lightning.compression.steps.base import (At, Order, Step)
from distill_lightning.compression.steps.encode import Encode
from distill_lightning.compression.steps.low_rank import LowRank
from distill_lightning.compression.steps.precision import MixedPrecision
from distill_lightning.compression.steps.prune import Prune
from distill_lightning.compression.steps.quantize import Quantize
from distill_lightning.compression.steps.regularise import Regularise
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.sharing import (HashShare, ShareWeights)
from distill_lightning.compression.steps.tying import TieLayers

__all__ = [
    "At",
    "Encode",
    "HashShare",
    "LowRank",
    "MixedPrecision",
    "Order",
    "Prune",
    "Quantize",
    "Regularise",
    "Sensitivity",
    "ShareWeights",
    "Step",
    "TieLayers",
]
