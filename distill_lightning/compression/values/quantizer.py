"""Parametrizations of layers that quantize weights whenever they are used.

The layer keeps its float weight as ``parametrizations.<name>.original``, which is trained; optimisers that hold it
keep working. Learned scales are new parameters: build the optimiser after quantizing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.computed import ComputedWeight, Stored, compute, free_weights
from distill_lightning.compression.values.estimators import (
    binary,
    binary_connect,
    codes,
    dorefa_weight,
    lsq,
    lsq_start,
    ternary,
    ttq,
    ttq_codes,
    ttq_start,
)
from distill_lightning.compression.values.ranges import RangeRule, weight_grid
from distill_lightning.compression.values.scheme import UNIFORM, Codes, Scheme, fake_quantize, quantize
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide

Estimator = Literal["ste", "lsq"]


class WeightQuantizer(ComputedWeight):
    """Replaces a weight by its quantized values, for `torch.nn.utils.parametrize`.

    Args:
        weight: the weight to quantize; its values initialise the scales.
        scheme: the scheme.
        estimator: for the uniform kinds, ``"ste"``: the grid follows from the weight by ``rule``, or ``"lsq"``: the
            scales are learned.
        rule: see `find_range`. With ``"minmax"`` the grid follows the weight at every use; the other rules are too slow
            for that and keep the grid of the given weight. With 2 or 3 bits use ``"mse"`` or LSQ: a range that contains
            everything leaves most weights at zero.
        calibrate: whether scales are initialised; ``False`` leaves them at 1 for a state dict that is loaded later.

    Raises:
        InputError: the estimator is unknown or not for this kind of scheme, or the weight has no range.
    """

    family = "quantized"
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        scheme: Scheme,
        estimator: Estimator = "ste",
        rule: RangeRule = "minmax",
        calibrate: bool = True,
    ) -> None:
        super().__init__()
        check_one_of("estimator of weights", estimator, get_args(Estimator))
        if estimator == "lsq" and scheme.kind != "symmetric":
            raise InputError(f"estimator='lsq' learns symmetric grids, not kind={scheme.kind!r}: give 'symmetric'")
        self.scheme, self.estimator, self.rule = scheme, estimator, rule
        if scheme.kind == "ttq":
            starts = ttq_start(weight) if calibrate else (weight.new_ones(()), weight.new_ones(()))
            self.positive, self.negative = (nn.Parameter(wide(start).clone()) for start in starts)
        elif estimator == "lsq":
            self.scale = nn.Parameter(lsq_start(weight, scheme))
        elif scheme.kind in UNIFORM and rule != "minmax":
            # Min-max is enough for the shapes; the other rules may take long.
            scale, zero_point = weight_grid(weight, scheme, rule=rule if calibrate else "minmax")
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized values, in the weight's shape and type."""
        match self.scheme.kind:
            case "dorefa":
                levels = dorefa_weight(weight, bits=self.scheme.bits)
            case "binary":
                levels = binary(weight, self.scheme)
            case "binaryconnect":
                levels = binary_connect(weight)
            case "ternary":
                levels = ternary(weight, self.scheme)
            case "ttq":
                levels = ttq(weight, self.positive, self.negative)
            case _ if self.estimator == "lsq":
                levels = lsq(weight, self._learned_scale(), self.scheme)
            case _:
                levels = fake_quantize(weight, *self._grid(weight), self.scheme)
        return levels

    def codes(self, weight: Tensor) -> Codes:
        """The codes of what `forward` returns.

        Args:
            weight: the float weight.
        """
        if self.scheme.kind == "ttq":
            return ttq_codes(weight, self.positive, self.negative)
        if self.scheme.kind not in UNIFORM:
            return codes(weight, self.scheme)
        if self.estimator == "lsq":
            scale = self._learned_scale().detach()
            return quantize(weight, scale, torch.zeros_like(scale), self.scheme)
        return quantize(weight, *self._grid(weight), self.scheme)

    def describe(self) -> dict[str, Any]:
        """Plain values from which `from_description` makes the same structure."""
        return {"scheme": self.scheme.describe(), "estimator": self.estimator, "rule": self.rule}

    @classmethod
    def from_description(cls, weight: Tensor, told: Mapping[str, Any]) -> Self:
        """A quantizer whose scales are still to be loaded."""
        return cls(weight, calibrate=False, **{**told, "scheme": Scheme(**told["scheme"])})

    def stored(self, original: Tensor) -> Stored:
        """The integer codes with their scales."""
        return Stored("codes", {"codes": self.codes(original), "scheme": self.scheme, "dtype": original.dtype})

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.scheme.bits

    def extra_repr(self) -> str:
        """The scheme and estimator, shown when the module is printed."""
        return f"{self.scheme.bits} bit {self.scheme.kind}, per {self.scheme.per}, {self.estimator}"

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.rule != "minmax":
            return self.scale, self.zero_point
        return weight_grid(weight, self.scheme, check=False)

    def _learned_scale(self) -> Tensor:
        # An optimiser step may carry it across zero.
        return self.scale.abs().clamp_min(torch.finfo(self.scale.dtype).tiny)


def quantize_weights(
    layer: nn.Module,
    *,
    scheme: Scheme,
    estimator: Estimator = "ste",
    rule: RangeRule = "minmax",
    names: Sequence[str] | None = None,
) -> list[str]:
    """Quantize the weights of a layer, in place; see `WeightQuantizer`.

    Collect the layers of a network before quantizing the first of them: quantizers are modules, too. Returns the names
    of the weights, by default all.
    """
    chosen = free_weights(layer, names, act="quantize")
    for name in chosen:
        compute(layer, name, WeightQuantizer(getattr(layer, name), scheme=scheme, estimator=estimator, rule=rule))
    return chosen
