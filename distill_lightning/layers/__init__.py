"""Layers and tools that a method adds to its networks."""

from distill_lightning.layers.autoencoder import ImageDecoder, ImageEncoder
from distill_lightning.layers.batch_norm import kept_statistics
from distill_lightning.layers.call import call
from distill_lightning.layers.discriminator import Discriminator, DiscriminatorKind
from distill_lightning.layers.feature_tap import FeatureTap, dry_forward, resolve_layer, resolve_layers
from distill_lightning.layers.gaussian_head import GaussianHead
from distill_lightning.layers.modes import asleep, eval_mode, fingerprint, freeze, uncompiled, wake
from distill_lightning.layers.translator import Paraphraser, Translator

__all__ = [
    "Discriminator",
    "DiscriminatorKind",
    "FeatureTap",
    "GaussianHead",
    "ImageDecoder",
    "ImageEncoder",
    "Paraphraser",
    "Translator",
    "asleep",
    "call",
    "dry_forward",
    "eval_mode",
    "fingerprint",
    "freeze",
    "kept_statistics",
    "resolve_layer",
    "resolve_layers",
    "uncompiled",
    "wake",
]
