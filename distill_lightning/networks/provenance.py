"""Recipes of networks: how they were built, in plain types, so that a checkpoint can build them again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import nn

from distill_lightning.errors import InputError

P = ParamSpec("P")
NetworkClass = TypeVar("NetworkClass", bound=type[nn.Module])
Recipe = dict[str, Any]
"""How a network was built, in plain types: ``{"factory": name, "arguments": {...}}``."""

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


def recipe_of(network: nn.Module) -> Recipe | None:
    """The recipe of a network that a factory of this package built; ``None`` for any other network.

    Example:
        >>> from distill_lightning.networks import SmallCNN, recipe_of
        >>> recipe_of(SmallCNN(num_classes=10))
        {'factory': 'SmallCNN', 'arguments': {'num_classes': 10, 'in_channels': 1, 'width': 24}}
    """
    recipe: Recipe | None = network.__dict__.get("_recipe")
    return recipe


def build_from(recipe: Recipe) -> nn.Module:
    """Build a network again from its recipe, with fresh weights (or those of the file, if it was `Pretrained`).

    Only this package's own factories are ever called, whatever the recipe names.

    Raises:
        InputError: the recipe does not name a factory of this package.

    Example:
        >>> from distill_lightning.networks import build_from
        >>> network = build_from({"factory": "SmallCNN", "arguments": {"num_classes": 10}})
        >>> network.head.out_features
        10
    """
    if recipe.get("factory") not in _FACTORIES:
        raise InputError(f"unknown network factory {recipe.get('factory')!r}: known ones are {', '.join(_FACTORIES)}")
    arguments = dict(recipe["arguments"])
    if isinstance(arguments.get("network"), Mapping):
        arguments["network"] = build_from(arguments["network"])
    return _FACTORIES[recipe["factory"]](**arguments)


def recorded(factory: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Make a factory store its recipe on the networks that it returns."""
    name = factory.__name__
    names = factory.__code__.co_varnames

    @wraps(factory)
    def recording(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        arguments = {key: _plain(value) for key, value in given.items()}
        network = factory(*args, **kwargs)
        # With a network inside that was built elsewhere, this one cannot be rebuilt either.
        unknown = any(isinstance(given[key], nn.Module) and value is None for key, value in arguments.items())
        network.__dict__["_recipe"] = None if unknown else {"factory": name, "arguments": arguments}
        return network

    _FACTORIES[name] = recording
    return recording


def remembered(network_class: NetworkClass) -> NetworkClass:
    """Make a class known to `build_from`; its constructor has to call `remember`."""
    _FACTORIES[network_class.__name__] = network_class
    return network_class


def remember(network: nn.Module, arguments: Mapping[str, Any] | None) -> None:
    """Store the arguments of a network's constructor on it, in plain types; ``None``: it cannot be built again.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks.provenance import recipe_of, remember
        >>> network = nn.Linear(4, 3)
        >>> remember(network, {"in_features": 4, "out_features": 3})
        >>> recipe_of(network)
        {'factory': 'Linear', 'arguments': {'in_features': 4, 'out_features': 3}}
    """
    recipe = None if arguments is None else {"factory": type(network).__name__, "arguments": dict(arguments)}
    network.__dict__["_recipe"] = recipe


def check_sizes(who: str, sizes: Mapping[str, int | None]) -> None:
    """Refuse sizes below 1.

    Raises:
        InputError: a size is below 1 or missing; the message begins with ``who``.

    Example:
        >>> from distill_lightning.networks.provenance import check_sizes
        >>> check_sizes("SmallCNN", {"num_classes": 10, "width": 0})
        Traceback (most recent call last):
        distill_lightning.errors.InputError: SmallCNN: width must be at least 1, got 0
    """
    for name, value in sizes.items():
        if value is None or value < 1:
            raise InputError(f"{who}: {name} must be at least 1, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return recipe_of(value)
    return str(value) if isinstance(value, Path) else value


# What became of a network after it was built


class Structure(Protocol):
    """Tells and restores what was done to networks since they were built; `distill_lightning.compression` is one."""

    def note_structure(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Note in a checkpoint what was done to a module's network."""

    def restore_structure(self, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Give a module's network the structure that a checkpoint tells."""

    def plain_network(self, network: nn.Module) -> nn.Module:
        """The network, or a copy whose weights are no longer computed from others."""


_STRUCTURES: list[Structure] = []


def add_structure(structure: Structure) -> None:
    """Have networks told and restored by what changes them; `distill_lightning.compression` calls this as it loads."""
    _STRUCTURES.append(structure)


def note_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint what was done to a module's network since it was built, if anything was."""
    # What was never loaded has changed no network.
    for structure in _STRUCTURES:
        structure.note_structure(module, checkpoint)


def restore_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module's network the structure that it had when a checkpoint was made, so that its weights fit.

    Raises:
        InputError: it is changed in another way already.
    """
    if checkpoint.get("compression") is not None and not _STRUCTURES:
        importlib.import_module("distill_lightning.compression.structure")
    for structure in _STRUCTURES:
        structure.restore_structure(module, checkpoint)


def plain_network(network: nn.Module) -> nn.Module:
    """The network, or a copy of it whose weights have the values that it computes them to be."""
    for structure in _STRUCTURES:
        network = structure.plain_network(network)
    return network
