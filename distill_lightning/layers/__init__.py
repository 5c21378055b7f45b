"""Layers and tools that a method adds to its networks."""

from distill_lightning.layers.autoencoder import ImageDecoder, ImageEncoder
from distill_lightning.layers.batch_norm import kept_statistics
from distill_lightning.layers.call import InputShape, by_position, call, only_output, outputs_of, plain_shape
from distill_lightning.layers.discriminator import Discriminator, DiscriminatorKind
from distill_lightning.layers.feature_tap import FeatureTap, dry_forward, resolve_layer, resolve_layers
from distill_lightning.layers.fingerprints import fingerprint, same_bits, structure
from distill_lightning.layers.gaussian_head import GaussianHead
from distill_lightning.layers.modes import asleep, eval_mode, freeze, is_exported, uncompiled, wake
from distill_lightning.layers.translator import Paraphraser, Translator
from distill_lightning.layers.wrappers import named_parts, plain_name, unwrapped

__all__ = [
    "Discriminator",
    "DiscriminatorKind",
    "FeatureTap",
    "GaussianHead",
    "ImageDecoder",
    "ImageEncoder",
    "InputShape",
    "Paraphraser",
    "Translator",
    "asleep",
    "by_position",
    "call",
    "dry_forward",
    "eval_mode",
    "fingerprint",
    "freeze",
    "is_exported",
    "kept_statistics",
    "named_parts",
    "only_output",
    "outputs_of",
    "plain_name",
    "plain_shape",
    "resolve_layer",
    "resolve_layers",
    "same_bits",
    "structure",
    "uncompiled",
    "unwrapped",
    "wake",
]
