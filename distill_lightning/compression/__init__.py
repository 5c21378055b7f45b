"""Compressing a network in plain PyTorch, by steps that prune, factor, share and quantize its layers."""

from distill_lightning.compression.structure import checkpoints as _structure
from distill_lightning.compression.file.artefact import (load_compressed, write_artefact)
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.report.report import (Report, Stage)
from distill_lightning.compression.steps.schedules import (Cubic, Iterative, OneShot, Threshold)
from distill_lightning.compression.steps import (Encode, HashShare, LowRank, MixedPrecision, Prune, Quantize, Regularise, Sensitivity, ShareWeights, Step, TieLayers)

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
