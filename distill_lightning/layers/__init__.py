"""The pieces that a method adds to its networks."""

from distill_lightning.layers.feature_tap import FeatureTap, dry_forward, resolve_layer, resolve_layers
from distill_lightning.layers.teachers import TeacherEnsemble, check_classes, fingerprint, freeze
from distill_lightning.layers.translator import (
    Paraphraser,
    TransformFactory,
    TransformName,
    Translator,
    make_translator,
)

__all__ = [
    "FeatureTap",
    "Paraphraser",
    "TeacherEnsemble",
    "TransformFactory",
    "TransformName",
    "Translator",
    "check_classes",
    "dry_forward",
    "fingerprint",
    "freeze",
    "make_translator",
    "resolve_layer",
    "resolve_layers",
]
