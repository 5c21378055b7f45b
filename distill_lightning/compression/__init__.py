"""Compressing a network in plain PyTorch, by steps that prune, factor, share and quantize its layers.

Rooms, from the bottom to the top: ``access`` to a network; ``costs``; ``shrink``, ``mask``, ``factor`` and ``values``,
what can be done to it; ``structure``, what was done; ``file``; ``steps``; ``run``; ``report``.
"""

from distill_lightning.compression.file.artefact import load_compressed, write_artefact
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.onnx.export import export_onnx
from distill_lightning.compression.onnx.int8 import quantize_onnx
from distill_lightning.compression.report.report import Report
from distill_lightning.compression.report.stage import Stage
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.run.preview import Preview, preview
from distill_lightning.compression.steps import (
    L0,
    Encode,
    HashShare,
    LearnMask,
    LowRank,
    MixedPrecision,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    Sensitivity,
    ShareWeights,
    SoftMovement,
    Step,
    TargetedStep,
    TieLayers,
    TrainedStep,
)
from distill_lightning.compression.steps.schedules import Cubic, Iterative, OneShot, Threshold
from distill_lightning.compression.structure import checkpoints as _checkpoints  # noqa: F401  (provenance asks it)

__all__ = [
    "L0", "Compressor", "Cubic", "Encode", "HashShare", "Iterative", "LearnMask", "LowRank", "Masks",
    "MixedPrecision", "Movement", "OneShot", "Preview", "PruneUnits", "PruneWeights", "Quantize", "Regularise",
    "Report", "Sensitivity", "ShareWeights", "SoftMovement", "Stage", "Step", "TargetedStep", "Threshold",
    "TieLayers", "TrainedStep", "export_onnx", "load_compressed", "preview", "quantize_onnx", "write_artefact",
]  # fmt: skip
