"""Parametrizations of layers that quantize weights whenever they are used.

The layer keeps its float weight as ``parametrizations.<name>.original``, which is trained; optimisers that hold it
keep working. Learned scales are new parameters: build the optimiser after quantizing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from distill_lightning.compression.quantizers.estimators import (
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
from distill_lightning.compression.quantizers.ranges import RangeRule, weight_grid
from distill_lightning.compression.quantizers.scheme import UNIFORM, Codes, Scheme, fake_quantize, quantize
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide

Estimator = Literal["ste", "lsq"]

_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class WeightQuantizer(nn.Module):
    """Replaces a weight by its quantized values, for `torch.nn.utils.parametrize`.

    Args:
        weight: the weight to quantize; its values initialise the scales.
        scheme: the scheme.
        estimator: for the uniform kinds, ``"ste"``: the grid follows from the weight by ``rule``, or ``"lsq"``: the
            scales are learned.
        rule: see `find_range`. With ``"minmax"`` the grid follows the weight at every use; the other rules are too slow
            for that and keep the grid of the given weight. With 2 or 3 bits use ``"mse"`` or LSQ: a range that contains
            everything leaves most weights at zero.
        stochastic: for ``"binaryconnect"``, whether signs are drawn in train mode.
        calibrate: whether scales are initialised; ``False`` leaves them at 1 for a state dict that is loaded later.

    Raises:
        InputError: the estimator is unknown, the estimator or ``stochastic`` is not for this kind of scheme, or the
            weight has no range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        scheme: Scheme,
        estimator: Estimator = "ste",
        rule: RangeRule = "minmax",
        stochastic: bool = False,
        calibrate: bool = True,
    ) -> None:
        super().__init__()
        if estimator not in ("ste", "lsq"):
            raise InputError(f"estimator of weights must be 'ste' or 'lsq', got {estimator!r}")
        if estimator == "lsq" and scheme.kind != "symmetric":
            raise InputError(f"estimator='lsq' learns symmetric grids, not kind={scheme.kind!r}: give 'symmetric'")
        if stochastic and scheme.kind != "binaryconnect":
            raise InputError(f"stochastic=True is for kind='binaryconnect', not {scheme.kind!r}")
        self.scheme, self.estimator, self.rule, self.stochastic = scheme, estimator, rule, stochastic
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
                levels = binary_connect(weight, stochastic=self.stochastic and self.training)
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
        """The codes of what `forward` returns in eval mode.

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
        """Plain values from which `rebuild` makes the same structure."""
        return {
            "scheme": self.scheme.describe(),
            "estimator": self.estimator,
            "rule": self.rule,
            "stochastic": self.stochastic,
        }

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


def weight_names(layer: nn.Module) -> list[str]:
    """The parameters of a layer that are its weights, without those of its children.

    Linear, convolutional and embedding layers have ``weight``; recurrent layers have those of every layer and
    direction; attention has its input projections (the output projection is a separate layer). Others have none.
    """
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    own += _parametrized(layer)
    if isinstance(layer, nn.RNNBase):
        return sorted(name for name in own if name.startswith(_RECURRENT))
    if isinstance(layer, nn.MultiheadAttention):
        return [name for name in _ATTENTION if name in own]
    simple = isinstance(layer, (nn.Linear, nn.Embedding, _ConvNd))
    return ["weight"] if simple and "weight" in own else []


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a weight's output channels: 1 for transposed convolutions, otherwise 0."""
    return int(isinstance(layer, _ConvTransposeNd))


def quantize_weights(
    layer: nn.Module,
    *,
    scheme: Scheme,
    estimator: Estimator = "ste",
    rule: RangeRule = "minmax",
    stochastic: bool = False,
    names: Sequence[str] | None = None,
) -> list[str]:
    """Quantize the weights of a layer, in place; see `WeightQuantizer`.

    Collect the layers of a network before quantizing the first of them: quantizers are modules, too.

    Args:
        layer: a layer that `weight_names` knows.
        scheme: the scheme of the weights.
        estimator: see `WeightQuantizer`.
        rule: see `WeightQuantizer`.
        stochastic: see `WeightQuantizer`.
        names: names of the weights; ``None`` for all.

    Returns:
        The names of the weights.

    Raises:
        InputError: the layer has no such weight, or the weight is quantized already.
    """
    known = weight_names(layer)
    chosen = known if names is None else list(names)
    if not chosen or set(chosen) - set(known):
        raise InputError(f"{type(layer).__name__} has the weights {known}, cannot quantize {chosen}")
    for name in chosen:
        if parametrize.is_parametrized(layer, name):
            raise InputError(
                f"{name!r} of {type(layer).__name__} is quantized or shared already: bake or bake_shared it first"
            )
    for name in chosen:
        _register(layer, name, WeightQuantizer(
            getattr(layer, name), scheme=scheme, estimator=estimator, rule=rule, stochastic=stochastic
        ))  # fmt: skip
    return chosen


def describe(layer: nn.Module) -> dict[str, Any]:
    """The quantized weights of a layer by name, in plain values; empty if there are none."""
    return {name: quantizer.describe() for name, quantizer in _quantizers(layer).items()}


def rebuild(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a float layer the described structure, in place; the described layer's state dict then loads strictly.

    Args:
        layer: the layer before quantization.
        description: what `describe` returned for the quantized layer.

    Returns:
        The layer.

    Raises:
        InputError: the layer has no weight of that name.
    """
    for name, told in description.items():
        if name not in weight_names(layer):
            raise InputError(f"{type(layer).__name__} has no weight {name!r} to quantize: is it the right layer?")
        options = {**told, "scheme": Scheme(**told["scheme"])}
        _register(layer, name, WeightQuantizer(getattr(layer, name), calibrate=False, **options))
    return layer


def weight_codes(layer: nn.Module) -> dict[str, tuple[Codes, Scheme]]:
    """The integer codes of a layer's quantized weights, by name."""
    return {
        name: (quantizer.codes(_original(layer, name)), quantizer.scheme)
        for name, quantizer in _quantizers(layer).items()
    }


@torch.no_grad()
def bake(layer: nn.Module) -> list[str]:
    """Replace the float weights by the quantized values for good, and remove the quantizers.

    If layers share a weight, the next one would round it again: use `recipe.bake` for a whole network.

    Returns:
        The names of the weights, which are parameters of the same shapes as before quantization.
    """
    names = list(_quantizers(layer))
    was_training = layer.training
    # The stochastic kinds draw in train mode.
    layer.eval()
    for name in names:
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    layer.train(was_training)
    return names


def _parametrized(layer: nn.Module) -> list[str]:
    parametrizations: Any = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    return list(parametrizations)


def _register(layer: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
    quantizer.to(getattr(layer, name).device)
    quantizer.train(layer.training)
    parametrize.register_parametrization(layer, name, quantizer)


def _original(layer: nn.Module, name: str) -> Tensor:
    parametrizations: Any = layer.parametrizations
    original: Tensor = parametrizations[name].original
    return original


def _quantizers(layer: nn.Module) -> dict[str, WeightQuantizer]:
    if not parametrize.is_parametrized(layer):
        return {}
    parametrizations: Any = layer.parametrizations
    return {
        name: entry
        for name, entries in parametrizations.items()
        for entry in entries
        if isinstance(entry, WeightQuantizer)
    }
