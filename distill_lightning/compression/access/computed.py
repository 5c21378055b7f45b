"""Weights that are computed from other parameters: one protocol for masked, shared, hashed and quantized ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.copies import separate_classes
from distill_lightning.compression.access.parameters import join_path
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode

_FAMILIES: dict[str, type[ComputedWeight]] = {}


class Stored(NamedTuple):
    """How a computed weight is written to a file, without what follows from the rest.

    Attributes:
        codec: name of the codec.
        content: what the codec packs, by the names of its arguments.
    """

    codec: str
    content: dict[str, Any]


class ComputedWeight(nn.Module, ABC):
    """Computes a layer's weight from what is trained in its place, for `torch.nn.utils.parametrize`.

    A family of computed weights is a class below this one: ``forward`` computes the weight, `describe` and
    `from_description` carry its structure through checkpoints, `stored` says how the weight is written in few bytes,
    and `pruned` how many of its entries are held at zero. `compute` puts an entry on a layer, `bake` replaces computed
    weights by their values.
    """

    family: ClassVar[str]
    """The name of the family in descriptions."""
    keeps_parameter: ClassVar[bool] = True
    """Whether the weight itself is what is trained. Otherwise its place is taken by a tensor of another shape."""
    frozen = False
    """Whether what is trained in the weight's place does not train for now."""
    order: Sequence[str] = ()
    """The layer's parameters in their order, which an optimiser's saved state depends on."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "family" in vars(cls):
            _FAMILIES[cls.family] = cls

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values from which `from_description` makes the same structure."""

    @classmethod
    @abstractmethod
    def from_description(cls, weight: Tensor, told: Mapping[str, Any]) -> Self:
        """An entry of the described structure for a weight of this shape, whose state is still to be loaded."""

    def stored(self, original: Tensor) -> Stored | None:
        """How the weight is written, given what is trained in its place; ``None``: like any other tensor."""
        return None

    def pruned(self) -> int:
        """The number of entries of the weight that are held at zero."""
        return 0

    def size_of(self, original: Tensor) -> int:
        """The number of entries of the weight, given what is trained in its place."""
        return original.numel()

    @property
    def bits(self) -> int | None:
        """Bits in which an entry of the weight can be stored; ``None``: those of a float."""
        return None


def compute(layer: nn.Module, name: str, entry: ComputedWeight) -> None:
    """Have a layer's weight computed, in place.

    What is trained is ``parametrizations.<name>.original`` afterwards; where that has another shape than the weight,
    or where the entry has parameters of its own, build the optimiser afterwards.
    """
    weight = getattr(layer, name)
    entry.to(weight.device).train(layer.training)
    others = computed(layer).values()
    entry.order = next((other.order for other in others), list(layer._parameters))  # noqa: SLF001  # with those that are None
    if not entry.keeps_parameter:
        # No other layer with the parameter, no previous optimiser and no gradient may still refer to it.
        setattr(layer, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    if getattr(layer, "sparse", False):
        entry.register_forward_hook(_with_dense_gradient)
    parametrize.register_parametrization(layer, name, entry)
    if entry.frozen:
        original_of(layer, name).requires_grad = False


class _DenseGradient(torch.autograd.Function):
    """The weight itself; what computes it gets a dense gradient also from an embedding that makes sparse ones."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # noqa: ARG004  # autograd asks for it
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # as above
        return grads[0].to_dense() if grads[0].is_sparse else grads[0]


def _with_dense_gradient(entry: nn.Module, inputs: Any, weight: Tensor) -> Tensor:  # noqa: ARG001  # a hook's arguments
    return cast("Tensor", _DenseGradient.apply(weight))


def free_weights(layer: nn.Module, names: Sequence[str] | None, *, act: str) -> list[str]:
    """The weights of a layer that are to be computed from now on.

    ``act`` is what is done to them, for the message.
    """
    known = weight_names(layer)
    chosen = known if names is None else list(names)
    if not chosen or set(chosen) - set(known):
        raise InputError(f"{type(layer).__name__} has the weights {known}, cannot {act} {chosen}")
    for name in chosen:
        if parametrize.is_parametrized(layer, name):
            raise InputError(
                f"{name!r} of {type(layer).__name__} is quantized, shared or masked already: bake the network first"
            )
    return chosen


def computed(layer: nn.Module) -> dict[str, ComputedWeight]:
    """What computes the weights of one layer, by the name of the weight."""
    if not parametrize.is_parametrized(layer):
        return {}
    parametrizations: Any = layer.parametrizations
    return {
        name: entry
        for name, entries in parametrizations.items()
        for entry in entries
        if isinstance(entry, ComputedWeight)
    }


def computed_in(network: nn.Module) -> dict[str, ComputedWeight]:
    """What computes the weights of a network, by the path of the weight."""
    return {
        join_path(path, name): entry
        for path, layer in network.named_modules()
        for name, entry in computed(layer).items()
    }


def fewest_bits(network: nn.Module) -> int | None:
    """Bits of the smallest codes of a network's weights; ``None`` if all are floats."""
    bits = [entry.bits for entry in computed_in(network).values() if entry.bits is not None]
    return min(bits, default=None)


def is_computed(network: nn.Module) -> bool:
    """Whether some weights of a network are computed: by a learned mask, shared values or a quantizer."""
    return any(parametrize.is_parametrized(module) for module in network.modules())


def original_of(layer: nn.Module, name: str) -> nn.Parameter:
    """What is trained in the place of a computed weight."""
    parametrizations: Any = layer.parametrizations
    original: nn.Parameter = parametrizations[name].original
    return original


def describe_weights(layer: nn.Module) -> dict[str, Any]:
    """The structure of a layer's computed weights by name, in plain values; empty if there are none."""
    return {name: {"family": entry.family, **entry.describe()} for name, entry in computed(layer).items()}


def rebuild_weights(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a plain layer the described structure, in place; the described layer's state dict then loads strictly."""
    for name, told in description.items():
        family = _FAMILIES.get(told.get("family"))
        if family is None:
            raise InputError(f"weights of the family {told.get('family')!r}, which another version wrote")
        if name not in weight_names(layer) and not hasattr(layer, name):
            raise InputError(f"{type(layer).__name__} has no weight {name!r} to compute: is it the right layer?")
        options = {key: value for key, value in told.items() if key != "family"}
        compute(layer, name, family.from_description(getattr(layer, name), options))
    return layer


@torch.no_grad()
def bake_layer(layer: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Replace computed weights of one layer by their values in eval mode, for good.

    Returns their names. They are parameters of the shapes that they were used in.
    """
    entries = computed(layer)
    chosen = list(entries) if names is None else list(names)
    for name in chosen:
        if not entries[name].keeps_parameter:
            original_of(layer, name).grad = None  # it has another shape than the weight
        with eval_mode(layer):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        if entries[name].frozen:
            getattr(layer, name).requires_grad = True
    for name in entries[chosen[0]].order if chosen else ():
        # A weight comes last when it is a parameter again.
        if name in layer._parameters:  # noqa: SLF001
            layer._parameters[name] = layer._parameters.pop(name)  # noqa: SLF001
    return chosen


def bake(network: nn.Module) -> nn.Module:
    """Replace computed weights by their values, in place: masks, shared values and quantizers are removed.

    The outputs in eval mode stay the same bit for bit. Quantizers of layers' inputs stay.

    Returns:
        The network.
    """
    separate_classes(network)
    layers = [layer for layer in network.modules() if computed(layer)]
    # In eval mode, because some families draw in train mode. All values first: tied layers compute theirs from one
    # weight, which baking the first of them overwrites.
    with eval_mode(network), parametrize.cached(), torch.no_grad():
        for layer in layers:
            for name in computed(layer):
                getattr(layer, name)
        for layer in layers:
            bake_layer(layer)
    return network
