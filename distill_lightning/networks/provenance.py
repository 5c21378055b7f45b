"""How a network was built, in plain types, so that a checkpoint can build it again."""

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
    """How one of this package's factories built ``network``; ``None`` for a network built elsewhere."""
    recipe: Recipe | None = network.__dict__.get("_recipe")
    return recipe


def build_from(recipe: Recipe) -> nn.Module:
    """Build a network again from its recipe, with fresh weights (or the file's, if it was `Pretrained`).

    Only this package's own factories are ever called, whatever the recipe names.

    Raises:
        InputError: the recipe names no factory of this package.
    """
    if recipe.get("factory") not in _FACTORIES:
        raise InputError(f"no network factory {recipe.get('factory')!r}: known are {', '.join(_FACTORIES)}")
    arguments = dict(recipe["arguments"])
    if isinstance(arguments.get("network"), Mapping):
        arguments["network"] = build_from(arguments["network"])
    return _FACTORIES[recipe["factory"]](**arguments)


def recorded(factory: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Have a factory note its recipe on the networks it returns."""
    name = factory.__name__
    names = factory.__code__.co_varnames

    @wraps(factory)
    def recording(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        arguments = {key: _plain(value) for key, value in given.items()}
        network = factory(*args, **kwargs)
        # A network from elsewhere inside leaves nothing to rebuild from.
        unknown = any(isinstance(given[key], nn.Module) and value is None for key, value in arguments.items())
        network.__dict__["_recipe"] = None if unknown else {"factory": name, "arguments": arguments}
        return network

    _FACTORIES[name] = recording
    return recording


def remembered(network_class: NetworkClass) -> NetworkClass:
    """Have a class known to `build_from`; its constructor calls `remember`."""
    _FACTORIES[network_class.__name__] = network_class
    return network_class


def remember(network: nn.Module, arguments: Mapping[str, Any] | None) -> None:
    """Note on a network what its constructor was called with, in plain types; ``None``: it cannot be built again."""
    recipe = None if arguments is None else {"factory": type(network).__name__, "arguments": dict(arguments)}
    network.__dict__["_recipe"] = recipe


def check_sizes(who: str, sizes: Mapping[str, int | None]) -> None:
    """Refuse sizes that are not positive.

    Raises:
        InputError: one is not; the message begins with ``who``.
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
