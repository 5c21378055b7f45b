"""Making a network small, in plain torch: steps that prune, factor, share and quantize its layers."""

from distill_lightning.compression.artefact import load_compressed, write_artefact
from distill_lightning.compression.compressor import Compressor
from distill_lightning.compression.masks import Masks
from distill_lightning.compression.schedules import Cubic, Iterative, OneShot, Threshold
from distill_lightning.compression.steps import Encode, MixedPrecision, Prune, Quantize, Step

__all__ = [
    "Compressor", "Cubic", "Encode", "Iterative", "Masks", "MixedPrecision", "OneShot", "Prune", "Quantize", "Step",
    "Threshold", "load_compressed", "write_artefact",
]  # fmt: skip
