"""The step that quantizes weights and activations to a few bits, with or without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access import calibration
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import join_path
from distill_lightning.compression.access.targets import match_layers
from distill_lightning.compression.access.weights import channel_axis, channel_groups, weight_names
from distill_lightning.compression.steps.base import Order, TargetedStep, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.mixed_precision import MixedPrecision
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.values.activations import (
    NAME,
    ActivationEstimator,
    ActivationQuantizer,
    observing_inputs,
    quantize_input,
)
from distill_lightning.compression.values.corrections import correct_biases
from distill_lightning.compression.values.equalisation import equalisable_pairs, equalise, pairs_that_keep_outputs
from distill_lightning.compression.values.quantizer import Estimator, WeightQuantizer, quantize_weights
from distill_lightning.compression.values.ranges import ObserverRule, RangeRule
from distill_lightning.compression.values.scheme import FIXED_BITS, UNIFORM, WHOLE_TENSOR, WITHOUT_ZERO, Kind, Scheme
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.layers import eval_mode

_UNEQUALISED = ": no two layers have only ReLU or pooling between them (BatchNorm does not count)"
_WHAT = "linear, convolutional, recurrent, attention and embedding layers"


@dataclass(frozen=True)
class _Weight:
    """A weight to quantize: the path of its layer, its name there, and its value, which tied weights share."""

    layer: str
    name: str
    value: nn.Parameter

    @property
    def path(self) -> str:
        return join_path(self.layer, self.name)


@dataclass(frozen=True, kw_only=True)
class Quantize(TargetedStep):
    """Rounds weights, and optionally the inputs of their layers, to a few bits whenever they are used.

    The float weights are kept as long as the network is trained; a packed file holds the codes. This makes nothing
    faster in PyTorch, which computes with the rounded values in float.

    Args:
        weight_bits: bits of a weight's code, 2 to 8; binary kinds always have 1 and ternary kinds 2. ``None`` leaves
            weights as they are.
        act_bits: bits of the inputs of the same layers, 2 to 8; ``None`` leaves them in float. Their ranges are
            measured on calibration data. (Embeddings have no input to quantize, and the input of PyTorch's attention
            output projection stays float.)
        scheme: scheme of the weights, see `Scheme`.
        act_scheme: scheme of activations, per tensor: ``"affine"`` (also for ``None``), ``"symmetric"`` or ``"pow2"``.
        per: what has its own scale: ``"channel"``, ``"tensor"`` or ``"group:n"``; ``None`` for the channel, or for the
            tensor if the scheme has one scale for all.
        observer: how the ranges of weights and activations are found; ``"ema"`` is only for activations, and weights
            then use ``"minmax"``. Use ``"mse"`` at 2 or 3 bits without training.
        mode: ``"ptq"``: post-training quantization; ``"qat"``: quantization-aware training, which needs
            ``finetune_epochs``. With ``finetune_epochs`` the network is trained with its quantizers in both.
        estimator: ``"ste"``: straight-through rounding; ``"lsq"``: learned scales, for symmetric weights and for
            activations; ``"pact"``, ``"dorefa"``: for activations, with ``"ste"`` for weights.
        bits: numbers of bits by pattern of layers (see `targets.Targets`; the last pattern that matches counts) instead
            of ``weight_bits``, or a budget for all weights together.
        first_last_bits: bits of the weights and inputs of the layers that run first and last, instead of all other
            numbers; if the scheme has its own number of bits, these two layers are symmetric.
        bias_correction: whether biases are changed so that the mean outputs of layers on calibration data are those of
            the float network.
        equalise: whether channels between layers are first given equal weight ranges, which does not change the
            outputs. Only for layers with nothing but ReLU, pooling and similar operations between them: pairs with a
            BatchNorm between them stay as they are.

    Raises:
        InputError: options that cannot be combined, for a reason that the message gives.
    """

    order = Order.VALUES

    # Quantization changes little, and the ranges were measured with these statistics.
    recalibrates: ClassVar[bool] = False

    weight_bits: int | None = 8
    act_bits: int | None = None
    scheme: Kind = "symmetric"
    act_scheme: Literal["affine", "symmetric", "pow2"] | None = None
    per: str | None = None
    observer: ObserverRule = "minmax"
    mode: Literal["ptq", "qat"] = "ptq"
    estimator: ActivationEstimator = "ste"
    bits: dict[str, int] | MixedPrecision | None = None
    first_last_bits: int | None = None
    bias_correction: bool = False
    equalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(mode=("ptq", "qat"), scheme=get_args(Kind))
        check_one_of("Quantize: act_scheme", self.act_scheme or "affine", UNIFORM)
        self.refuse(*self._misfits())
        self._check_numbers()
        if self.width is not None:
            # Scheme says what is wrong with per.
            Scheme(self.width, self.scheme, self.grain)
        self.activation_quantizer(self.act_bits or 8)

    @property
    def width(self) -> int | None:
        """Bits of a weight's code: those of the scheme, where it has its own."""
        return None if self.weight_bits is None else FIXED_BITS.get(self.scheme, self.weight_bits)

    @property
    def grain(self) -> str:
        """What has its own scale."""
        return self.per or ("tensor" if self.scheme in WHOLE_TENSOR else "channel")

    @property
    def rule(self) -> RangeRule:
        """The rule of weights' ranges."""
        return "minmax" if self.observer == "ema" else self.observer

    @property
    def title(self) -> str:
        """The class, the scheme and the bits."""
        told = "mixed" if self.bits is not None else f"{self.width} bit"
        weights = "" if self.width is None else f" {self.scheme} {told}"
        return f"Quantize{weights}" + ("" if self.act_bits is None else f" inputs {self.act_bits} bit")

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Quantizing(self)

    def activation_quantizer(self, bits: int) -> ActivationQuantizer:
        """A new quantizer of a layer's input."""
        scheme = Scheme(bits, self.act_scheme or "affine", "tensor")
        return ActivationQuantizer(scheme=scheme, estimator=self.estimator, observer=self.observer)

    def reason_to_train(self) -> str | None:
        """Training with quantizers and learned scales need training."""
        if self.mode == "qat":
            return "mode='qat' trains the network with its quantizers"
        return "estimator='lsq' learns its scales" if self.estimator == "lsq" else None

    def _misfits(self) -> list[tuple[bool, str]]:
        """Options that cannot be combined, and whether they are."""
        bits, scheme, estimator, act_scheme = self.bits, self.scheme, self.estimator, self.act_scheme or "affine"
        weights, inputs = self.width is not None, self.act_bits is not None
        of_weights = weights and scheme in UNIFORM and estimator != "lsq" and self.observer != "ema"
        has_range = of_weights or (inputs and estimator != "dorefa")
        clipped = estimator in ("pact", "dorefa")
        observer = "it is for activations, give act_bits" if self.observer == "ema" else "leave it out"
        return [
            (
                not inputs and self.act_scheme is not None,
                f"act_scheme={self.act_scheme!r} has no effect here: give act_bits",
            ),
            (
                not weights and (bits is not None or scheme != "symmetric"),
                "bits and scheme are for weights, which weight_bits=None leaves as they are: leave them out",
            ),
            (
                weights and self.weight_bits not in (8, self.width),
                f"scheme={scheme!r} has codes of {self.width} bit, not {self.weight_bits}: leave weight_bits out",
            ),
            (
                not inputs and clipped,
                f"estimator={estimator!r} is for activations: give act_bits (for weights there is scheme='dorefa')",
            ),
            (
                estimator == "lsq" and weights and scheme != "symmetric",
                f"estimator='lsq' learns symmetric weights, not {scheme!r}: use estimator='ste'",
            ),
            (
                inputs and clipped and act_scheme != "affine",
                f"estimator={estimator!r} has codes from 0: give act_scheme='affine', not {act_scheme!r}",
            ),
            (
                estimator == "lsq" and act_scheme == "pow2",
                "estimator='lsq' learns any scale: give act_scheme='symmetric' or 'affine'",
            ),
            (
                scheme in WHOLE_TENSOR and self.grain != "tensor",
                f"scheme={scheme!r} has one scale for a whole tensor: leave per out",
            ),
            (scheme in FIXED_BITS and bits is not None, f"scheme={scheme!r} has its own bits: leave bits out"),
            (
                isinstance(bits, MixedPrecision) and scheme not in UNIFORM,
                f"MixedPrecision is for scheme {', '.join(UNIFORM)}, not {scheme!r}",
            ),
            (
                self.observer != "minmax" and not has_range,
                f"observer={self.observer!r} has no effect here: {observer}",
            ),
        ]

    def _check_numbers(self) -> None:
        """Refuse numbers of bits that codes cannot have."""
        given = {"act_bits": self.act_bits, "first_last_bits": self.first_last_bits}
        if self.scheme not in FIXED_BITS:
            given["weight_bits"] = self.weight_bits
        self.refuse(
            (
                self.bits is not None and not isinstance(self.bits, Mapping | MixedPrecision),
                f"bits must be numbers by patterns of layers, or MixedPrecision, got {self.bits!r}: weight_bits is for "
                "all layers",
            )
        )
        if isinstance(self.bits, Mapping):
            given |= {f"bits of {pattern!r}": number for pattern, number in self.bits.items()}
        for key, number in given.items():
            way_out = ": for 1 bit use scheme='binary'" if key == "weight_bits" else ""
            wrong = number is not None and number not in range(2, 9)
            self.refuse((wrong, f"{key} must be 2 to 8, got {number}{way_out}"))


class _Quantizing(Work):
    step: Quantize

    def rehearse(self, piece: Workpiece) -> bool:
        """See which share of the weights is quantized."""
        if self.step.width is not None:
            self._say_covered(piece, self._matched(piece))
        return False

    def _matched(self, piece: Workpiece) -> list[str]:
        """The layers with weights that the step names."""
        return match_layers(
            piece.network,
            self.step.targets,
            self.step.exclude,
            fits=lambda layer: bool(weight_names(layer)),
            what=_WHAT,
        )

    def begin(self, piece: Workpiece) -> None:
        """Add the quantizers, and measure the ranges of activations."""
        if self.step.width is None and self.step.act_bits is None:
            piece.note("Quantize has neither weight_bits nor act_bits, so it does nothing")
            return
        layers = self._matched(piece)
        order = _running_order(piece)
        layers = self._without_paddings(piece, layers, self._ends(order))
        weights = self._weights(piece, layers)
        schemes = self._schemes(piece, layers, weights, order)
        for weight in weights:
            self._check_weight(piece, weight, schemes[weight.path])
        self._say_covered(piece, layers)
        if self.step.equalise:
            self._equalise(piece)
        reference = copy_network(piece.network) if self.step.bias_correction else None
        for weight in weights:
            self._quantize_weight(piece, weight, schemes[weight.path])
        if self.step.act_bits is not None:
            self._quantize_inputs(piece, [layer for layer in order if layer in layers], order)
        if reference is not None:
            batches = piece.batches("bias correction")
            correct_biases(piece.network, reference, [inputs for inputs, _ in batches])
        piece.changed = True
        self._tell(piece, {path: scheme.bits for path, scheme in schemes.items()})

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """BinaryConnect: clip the float weights to [-1, 1], outside which they would have no gradient."""
        if self.step.scheme != "binaryconnect":
            return
        with torch.no_grad():
            for module in piece.network.modules():
                if isinstance(module, parametrize.ParametrizationList) and any(_is_binary_connect(m) for m in module):
                    module.original.clamp_(-1, 1)

    def _equalise(self, piece: Workpiece) -> None:
        pairs = equalisable_pairs(piece.network)
        kept = pairs_that_keep_outputs(piece.network, pairs, piece.example_inputs)
        equalise(piece.network, pairs=kept)
        piece.note(f"Quantize equalised {len(kept)} pairs of layers{_UNEQUALISED if not pairs else ''}")
        for first, second in pairs:
            if (first, second) not in kept:
                piece.note(f"Quantize did not equalise {first} and {second}, which would change the outputs")

    def _without_paddings(self, piece: Workpiece, layers: list[str], ends: set[str]) -> list[str]:
        """The layers without those embeddings whose padding row would no longer be zero."""
        # The scale of the padding row is zero, too.
        if self.step.scheme not in WITHOUT_ZERO or (self.step.scheme == "binary" and self.step.grain == "channel"):
            return layers
        left = []
        for path in layers:
            layer = piece.network.get_submodule(path)
            symmetric = path in ends and self.step.scheme in FIXED_BITS
            if symmetric or not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
                left.append(path)
                continue
            reason = f"scheme={self.step.scheme!r} has no zero for the row of its padding"
            if self.step.targets is not None:
                raise InputError(f"Quantize: {path!r}: {reason}: exclude it")
            piece.leave(path, reason)
        return left

    def _weights(self, piece: Workpiece, layers: list[str]) -> list[_Weight]:
        """The weights of some layers, without those that are already computed."""
        if self.step.width is None:
            return []
        found: list[_Weight] = []
        for path in layers:
            layer = piece.network.get_submodule(path)
            for name in weight_names(layer):
                if not parametrize.is_parametrized(layer, name):
                    found.append(_Weight(path, name, getattr(layer, name)))
                elif self.step.targets is None:
                    piece.note(f"Quantize left {path}.{name} alone, whose values are shared or quantized already")
                else:
                    raise InputError(
                        f"Quantize: {path}.{name} is shared or quantized already: leave {path!r} out of targets, or "
                        "use other steps"
                    )
        if not found:
            raise InputError("Quantize: every weight is shared or quantized already: leave this step out")
        self._check_ties(piece.network, found)
        return found

    def _say_covered(self, piece: Workpiece, layers: list[str]) -> None:
        """Note the share of quantized weights; those that other steps have shared are left alone on purpose."""
        names: dict[int, str] = {}
        others = False
        for path in layers:
            layer = piece.network.get_submodule(path)
            for name in weight_names(layer):
                if parametrize.is_parametrized(layer, name):
                    others = True
                else:
                    names[id(getattr(layer, name))] = join_path(path, name)
        check_coverage(piece, self.step, names.values(), targets=self.step.targets, refuse=not others)

    def _check_ties(self, network: nn.Module, weights: list[_Weight]) -> None:
        chosen = {weight.path: weight for weight in weights}
        values = {id(weight.value): weight.path for weight in weights}
        layers = {module for module in network.modules() if weight_names(module)}
        places: dict[int, set[tuple[nn.Module, str]]] = {}
        for layer in layers:
            for name, parameter in layer.named_parameters(recurse=False):
                places.setdefault(id(parameter), set()).add((layer, name))
        mine = {(network.get_submodule(weight.layer), weight.name) for weight in chosen.values()}
        for value, path in values.items():
            if places.get(value, set()) - mine:
                raise InputError(
                    f"Quantize: {path!r} is tied to a weight that is left out: name both layers or neither"
                )
            if len(places.get(value, ())) > 1 and (self.step.estimator == "lsq" or self.step.scheme not in UNIFORM):
                what = "estimator='lsq'" if self.step.estimator == "lsq" else f"scheme={self.step.scheme!r}"
                raise InputError(
                    f"Quantize: {path!r} is a tied weight, which {what} does not support: exclude its layers"
                )

    def _schemes(
        self, piece: Workpiece, layers: list[str], weights: list[_Weight], order: list[str]
    ) -> dict[str, Scheme]:
        """The schemes by path of the weight."""
        ends = self._ends(order)
        fixed = {weight.path: self.step.first_last_bits for weight in weights if weight.layer in ends}
        numbers = {weight.path: self.step.width or 8 for weight in weights}
        if isinstance(self.step.bits, Mapping):
            for pattern, number in self.step.bits.items():
                for path in _matching(piece.network, pattern, layers):
                    numbers |= {weight.path: number for weight in weights if weight.layer == path}
        numbers |= {path: number for path, number in fixed.items() if number is not None}
        if isinstance(self.step.bits, MixedPrecision):
            once = {id(weight.value): weight for weight in reversed(weights)}
            given = {weight.path: numbers[weight.path] for weight in once.values() if weight.path in fixed}
            values: dict[str, Tensor] = {weight.path: weight.value for weight in once.values()}
            numbers |= self.step.bits.allocate(
                values,
                given,
                kind=self.step.scheme,
                per=self.step.grain,
                layers={weight.path: piece.network.get_submodule(weight.layer) for weight in once.values()},
                rule="mse" if self.step.estimator == "lsq" else self.step.rule,
            )
            numbers |= {weight.path: numbers[once[id(weight.value)].path] for weight in weights}
        # Tied weights share one grid, the finer one.
        finest: dict[int, int] = {}
        for weight in weights:
            finest[id(weight.value)] = max(finest.get(id(weight.value), 0), numbers[weight.path])
        return {
            weight.path: self._scheme(piece, weight, finest[id(weight.value)], at_end=weight.path in fixed)
            for weight in weights
        }

    def _scheme(self, piece: Workpiece, weight: _Weight, number: int, *, at_end: bool) -> Scheme:
        layer = piece.network.get_submodule(weight.layer)
        axis, groups = channel_axis(layer), channel_groups(layer)
        if at_end and self.step.scheme in FIXED_BITS:
            return Scheme(number, "symmetric", "channel", axis, groups)
        return Scheme(number, self.step.scheme, self.step.grain, axis, groups)

    def _ends(self, order: list[str]) -> set[str]:
        return set() if self.step.first_last_bits is None or not order else {order[0], order[-1]}

    def _check_weight(self, piece: Workpiece, weight: _Weight, scheme: Scheme) -> None:
        mask = piece.masks.kept.get(weight.path)
        if mask is not None and not bool(mask.all()) and scheme.kind in WITHOUT_ZERO:
            raise InputError(
                f"Quantize: {weight.path!r} is pruned, and scheme={scheme.kind!r} has no zero for it: use "
                "another scheme, or exclude the layer"
            )

    def _quantize_weight(self, piece: Workpiece, weight: _Weight, scheme: Scheme) -> None:
        layer = piece.network.get_submodule(weight.layer)
        estimator: Estimator = "lsq" if self.step.estimator == "lsq" and scheme.kind == "symmetric" else "ste"
        rule = self.step.rule if scheme.kind in UNIFORM and estimator == "ste" else "minmax"
        quantize_weights(layer, scheme=scheme, estimator=estimator, rule=rule, names=[weight.name])
        piece.rename_mask(weight.path, join_path(weight.layer, f"parametrizations.{weight.name}.original"))

    def _quantize_inputs(self, piece: Workpiece, layers: list[str], order: list[str]) -> None:
        ends = self._ends(order)
        chosen = [path for path in layers if not isinstance(piece.network.get_submodule(path), nn.Embedding)]
        if not chosen:
            raise InputError("Quantize: act_bits needs a layer that runs and has activations as inputs: name others")
        for path in chosen:
            number = self.step.first_last_bits if path in ends else self.step.act_bits
            layer = piece.network.get_submodule(path)
            if hasattr(layer, NAME):
                raise InputError(f"Quantize: the input of {path!r} is quantized already: leave it out")
            quantize_input(layer, self.step.activation_quantizer(number or 8))
        batches = piece.batches("Quantize with act_bits")
        with (
            observing_inputs(piece.network),
            calibration.without_fast_path(),
            eval_mode(piece.network),
            torch.no_grad(),
        ):
            for inputs, _ in batches:
                piece.network(*calibration.inputs_of(inputs))

    def _tell(self, piece: Workpiece, bits: Mapping[str, int]) -> None:
        numbers = sorted(set(bits.values()))
        if len(numbers) == 1:
            piece.note(f"Quantize: bits of weights: {numbers[0]} everywhere")
        elif numbers:
            piece.note("Quantize: bits of weights: " + ", ".join(f"{path} {number}" for path, number in bits.items()))
        for number in numbers:
            if number != 8:
                piece.note(f"no kernel here computes with {number}-bit weights: storage only")
        if self.step.act_bits is not None:
            piece.note(f"inputs of layers are rounded to {self.step.act_bits} bit in float: PyTorch is no faster")
            if any(isinstance(module, nn.MultiheadAttention) for module in piece.network.modules()):
                piece.note("inputs of attention's output projections are not rounded: nn.MultiheadAttention calls none")


def _is_binary_connect(module: nn.Module) -> bool:
    return isinstance(module, WeightQuantizer) and module.scheme.kind == "binaryconnect"


def _matching(network: nn.Module, pattern: str, layers: list[str]) -> list[str]:
    known = {network.get_submodule(path) for path in layers}
    found = match_layers(
        network, pattern, fits=lambda layer: layer in known, what="layers to quantize", argument="bits"
    )
    return [path for path in found if path in layers]


def _running_order(piece: Workpiece) -> list[str]:
    """Paths of the layers with weights, in the order of their first calls, without those that never run as modules."""
    seen: dict[str, None] = {}
    layers = {
        path: module
        for path, module in piece.network.named_modules()
        if weight_names(module) and "parametrizations" not in path.split(".")
    }
    with (
        calibration.watching(layers, lambda path, *_: seen.setdefault(path)),
        calibration.calibrating(piece.network),
        torch.no_grad(),
    ):
        piece.network(*calibration.inputs_of(piece.example_inputs))
    return list(seen)
