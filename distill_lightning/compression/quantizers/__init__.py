"""Quantization: grids and codes, ranges, quantizers for training, and corrections without training."""

from distill_lightning.compression.quantizers.activations import (
    ActivationQuantizer,
    calibrating,
    describe_input,
    quantize_input,
    rebuild_input,
)
from distill_lightning.compression.quantizers.allocation import allocate_bits, code_bytes, weight_errors
from distill_lightning.compression.quantizers.calibration import (
    correct_biases,
    equalisable_pairs,
    equalise,
    fold_batch_norm,
    foldable_pairs,
)
from distill_lightning.compression.quantizers.estimators import (
    binary,
    binary_connect,
    codes,
    dorefa_activation,
    dorefa_weight,
    lsq,
    lsq_start,
    pact,
    round_straight_through,
    ternary,
    ttq,
    ttq_codes,
    ttq_start,
)
from distill_lightning.compression.quantizers.ranges import Observer, find_range, weight_grid
from distill_lightning.compression.quantizers.scheme import Codes, Scheme, dequantize, fake_quantize, grid, quantize
from distill_lightning.compression.quantizers.weights import (
    WeightQuantizer,
    bake,
    channel_axis,
    describe,
    quantize_weights,
    rebuild,
    weight_codes,
    weight_names,
)

__all__ = [
    "ActivationQuantizer", "Codes", "Observer", "Scheme", "WeightQuantizer", "allocate_bits", "bake", "binary",
    "binary_connect", "calibrating", "channel_axis", "code_bytes", "codes", "correct_biases", "dequantize", "describe",
    "describe_input", "dorefa_activation", "dorefa_weight", "equalisable_pairs", "equalise", "fake_quantize",
    "find_range", "fold_batch_norm", "foldable_pairs", "grid", "lsq", "lsq_start", "pact", "quantize",
    "quantize_input", "quantize_weights", "rebuild", "rebuild_input", "round_straight_through", "ternary", "ttq",
    "ttq_codes", "ttq_start", "weight_codes", "weight_errors", "weight_grid", "weight_names",
]  # fmt: skip
