"""Quantization of a layer's input activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distill_lightning.compression.values.estimators import dorefa_activation, lsq, pact
from distill_lightning.compression.values.ranges import Observer, ObserverRule
from distill_lightning.compression.values.scheme import Scheme, fake_quantize, grid
from distill_lightning.errors import InputError, check_one_of

ActivationEstimator = Literal["ste", "lsq", "pact", "dorefa"]

NAME = "input_quantizer"
"""The name of the input quantizer in its layer."""


class ActivationQuantizer(nn.Module):
    """Quantizes the activations that pass through it, with one scale.

    First it observes: inside `observing_inputs` activations pass unchanged, and the scale starts from what was seen.
    With the ``"ema"`` observer and the straight-through estimator the range also follows the activations in train mode,
    with or without such a calibration.

    Args:
        scheme: ``"symmetric"``, ``"affine"`` or ``"pow2"``, per tensor. PACT and DoReFa have no negative activations,
            and need an affine one.
        estimator: ``"ste"``: the observed range; ``"lsq"``: a learned scale; ``"pact"``: a learned threshold;
            ``"dorefa"``: [0, 1].
        observer: see `Observer`.
        momentum: see `Observer`.
        percentile: see `Observer`.

    Raises:
        InputError: the scheme and the estimator cannot be combined, or one is unknown.
    """

    scale: Tensor
    zero_point: Tensor
    alpha: Tensor

    def __init__(
        self,
        *,
        scheme: Scheme,
        estimator: ActivationEstimator = "ste",
        observer: ObserverRule = "minmax",
        momentum: float = 0.1,
        percentile: float = 99.99,
    ) -> None:
        super().__init__()
        if scheme.kind not in ("symmetric", "affine", "pow2") or scheme.per != "tensor":
            raise InputError(f"activations are quantized uniformly, per='tensor', not {scheme.kind} per {scheme.per}")
        check_one_of("estimator", estimator, get_args(ActivationEstimator))
        if estimator in ("pact", "dorefa") and scheme.kind != "affine":
            raise InputError(f"estimator={estimator!r} has codes from 0: give kind='affine', not {scheme.kind!r}")
        if estimator == "lsq" and scheme.kind == "pow2":
            raise InputError("estimator='lsq' learns any scale: give kind='symmetric' or 'affine'")
        self.scheme, self.estimator = scheme, estimator
        self.observer = Observer(observer, momentum=momentum, percentile=percentile)
        self.observing = False
        # Zero means: no range yet.
        self.register_buffer("zero_point", torch.zeros(1, 1))
        if estimator == "lsq":
            self.scale = nn.Parameter(torch.zeros(1, 1))
        elif estimator == "pact":
            self.alpha = nn.Parameter(torch.zeros(1, 1))
        else:
            self.register_buffer("scale", torch.zeros(1, 1))
        self.ready = estimator == "dorefa"
        self.register_load_state_dict_post_hook(_look_whether_ready)  # type: ignore[no-untyped-call]

    def forward(self, values: Tensor) -> Tensor:
        """Activations of any shape, quantized, in their type."""
        if self.observing:
            observed: Tensor = self.observer(values)
            return observed
        if self.training and self.estimator == "ste" and self.observer.rule == "ema":
            self.observer.follow(values)
            self._take_range(self.observer.low, self.observer.high)
        if self.estimator == "dorefa":
            return dorefa_activation(values, bits=self.scheme.bits)
        self._check_ready()
        if self.estimator == "pact":
            return pact(values, _positive(self.alpha), bits=self.scheme.bits)
        if self.estimator == "lsq":
            # As in the paper, the scale's gradient is normalised by the features of one sample.
            factor = 1 / math.sqrt(max(values[0].numel() if values.ndim else 1, 1) * self.scheme.highest)
            return lsq(values, _positive(self.scale), self.scheme, zero_point=self.zero_point, factor=factor)
        return fake_quantize(values, self.scale, self.zero_point, self.scheme)

    @torch.no_grad()
    def finish(self) -> None:
        """Start the scale from what was observed.

        Raises:
            InputError: nothing was observed, or PACT saw no positive activation.
        """
        if self.estimator == "dorefa":
            return
        low, high = self.observer.range(self.scheme)
        if self.estimator == "pact" and not bool(high > 0):
            raise InputError("estimator='pact' saw no positive activation: quantize this layer with 'lsq' or 'ste'")
        self._take_range(low, high)

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments for the same structure in plain values (the scheme as a dict)."""
        return {
            "scheme": self.scheme.describe(),
            "estimator": self.estimator,
            "observer": self.observer.rule,
            "momentum": self.observer.momentum,
            "percentile": self.observer.percentile,
        }

    @torch.no_grad()
    def _take_range(self, low: Tensor, high: Tensor) -> None:
        if self.estimator == "pact":
            self.alpha.fill_(high)
        else:
            scale, zero_point = grid(low.reshape(1, 1), high.reshape(1, 1), self.scheme)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self.ready = True

    def _check_ready(self) -> None:
        if not self.ready:
            raise InputError(
                "an activation quantizer has no range yet: run training batches through the network inside "
                "observing_inputs(network)"
            )


def _positive(learned: Tensor) -> Tensor:
    # An optimiser step may carry it across zero.
    return learned.abs().clamp_min(torch.finfo(learned.dtype).tiny)


def _look_whether_ready(quantizer: Any, _: Any) -> None:
    """Update the flag after a state dict was loaded; reading the scale itself would wait for the device."""
    estimator = quantizer.estimator
    learned = quantizer.alpha if estimator == "pact" else quantizer.scale
    quantizer.ready = estimator == "dorefa" or bool(learned != 0)


@contextmanager
def observing_inputs(network: nn.Module) -> Iterator[None]:
    """Inside this context, a network's activation quantizers observe without quantizing; then they set their scales.

    Raises:
        InputError: a quantizer saw no activation.
    """
    quantizers = [module for module in network.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
    for quantizer in quantizers:
        quantizer.finish()


def quantize_input(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize a layer's input, in place: its first argument, which may be a packed sequence.

    The query, key and value of attention are all quantized. The quantizer, which no other layer has, becomes the
    layer's child ``input_quantizer``.
    """
    if hasattr(layer, NAME):
        raise InputError(f"the input of {type(layer).__name__} is quantized already")
    weight = next((value for value in layer.parameters() if value.is_floating_point()), None)
    if weight is not None:
        quantizer.to(weight.device)
    quantizer.train(layer.training)
    layer.add_module(NAME, quantizer)
    layer.register_forward_pre_hook(_quantized_arguments, with_kwargs=True)


def describe_input(layer: nn.Module) -> dict[str, Any] | None:
    """The quantizer of a layer's input in plain values; ``None`` if there is none."""
    quantizer = getattr(layer, NAME, None)
    return quantizer.describe() if isinstance(quantizer, ActivationQuantizer) else None


def rebuild_input(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Quantize the input of a layer as described, in place; the described layer's state dict then loads strictly."""
    options = {**description, "scheme": Scheme(**description["scheme"])}
    quantize_input(layer, ActivationQuantizer(**options))
    return layer


def _quantized_arguments(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = getattr(layer, NAME)
    names = ("query", "key", "value") if isinstance(layer, nn.MultiheadAttention) else ("input",)
    done: dict[int, Any] = {}

    def quantized(value: Any) -> Any:
        # Self-attention passes the same tensor three times, and is computed faster if it is the same object.
        if id(value) not in done:
            done[id(value)] = _quantized(quantizer, value)
        return done[id(value)]

    positional = tuple(quantized(value) if place < len(names) else value for place, value in enumerate(args))
    return positional, {name: quantized(value) if name in names else value for name, value in kwargs.items()}


def _quantized(quantizer: nn.Module, value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSequence(quantizer(value.data), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return quantizer(value)
