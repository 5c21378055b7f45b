"""Compressing a network in plain PyTorch, by steps that prune, factor, share and quantize its layers."""

from distill_lightning.compression import structure as _structure  # noqa: F401  (checkpoints ask it)
from distill_lightning.compression.artefact import load_compressed, write_artefact
from distill_lightning.compression.compressor import Compressor
from distill_lightning.compression.masks import Masks
from distill_lightning.compression.report import Report, Stage
from distill_lightning.compression.schedules import Cubic, Iterative, OneShot, Threshold
from distill_lightning.compression.steps import (
    Encode,
    HashShare,
    LowRank,
    MixedPrecision,
    Prune,
    Quantize,
    Regularise,
    Sensitivity,
    ShareWeights,
    Step,
    TieLayers,
)

__all__ = [
    "Compressor",
    "Cubic",
    "Encode",
    "HashShare",
    "Iterative",
    "LowRank",
    "Masks",
    "MixedPrecision",
    "OneShot",
    "Prune",
    "Quantize",
    "Regularise",
    "Report",
    "Sensitivity",
    "ShareWeights",
    "Stage",
    "Step",
    "Threshold",
    "TieLayers",
    "load_compressed",
    "write_artefact",
]
