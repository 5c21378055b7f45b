"""Recipes of networks: how they were built, in plain types, so that a checkpoint can build them again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.layers import unwrapped

P = ParamSpec("P")
NetworkClass = TypeVar("NetworkClass", bound=type[nn.Module])
Recipe = dict[str, Any]
"""How a network was built, in plain types: ``{"factory": name, "arguments": {...}}``."""

# The arguments of factories that are networks themselves.
_NETWORKS = ("network", "backbone")
_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


def recipe_of(network: nn.Module) -> Recipe | None:
    """The recipe of a network that a factory of this package built; ``None`` for any other network.

    Example:
        >>> from distill_lightning.networks import SmallCNN, recipe_of
        >>> recipe_of(SmallCNN(num_classes=10))
        {'factory': 'SmallCNN', 'arguments': {'num_classes': 10, 'in_channels': 1, 'width': 24}}
    """
    recipe: Recipe | None = unwrapped(network).__dict__.get("_recipe")
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
    arguments = {
        name: build_from(dict(value)) if name in _NETWORKS and isinstance(value, Mapping) else value
        for name, value in recipe["arguments"].items()
    }
    return _FACTORIES[recipe["factory"]](**arguments)


def without_weights(known: Recipe | None) -> Recipe | None:
    """A recipe that reads no file and downloads nothing, because the weights come from elsewhere.

    Example:
        >>> from distill_lightning.networks.provenance import without_weights
        >>> inner = {"factory": "timm_network", "arguments": {"name": "resnet18", "pretrained": True}}
        >>> without_weights({"factory": "Pretrained", "arguments": {"network": inner, "checkpoint": "gone.pt"}})
        {'factory': 'timm_network', 'arguments': {'name': 'resnet18', 'pretrained': False}}
    """
    if known is None:
        return None
    arguments = dict(known["arguments"])
    if known["factory"] == "Pretrained":
        return without_weights(arguments["network"])
    for name in _NETWORKS:
        if isinstance(arguments.get(name), Mapping):
            arguments[name] = without_weights(arguments[name])
    if "pretrained" in arguments:
        arguments["pretrained"] = False
    if "backbone_weights" in arguments:
        arguments["backbone_weights"] = None
    return {"factory": known["factory"], "arguments": arguments}


def factory_with_recipe(factory: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
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


def class_with_recipe(network_class: NetworkClass) -> NetworkClass:
    """Make a class known to `build_from`; its constructor has to call `set_recipe`."""
    _FACTORIES[network_class.__name__] = network_class
    return network_class


def set_recipe(network: nn.Module, arguments: Mapping[str, Any] | None) -> None:
    """Store the arguments of a network's constructor on it, in plain types; ``None``: it cannot be built again.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks.provenance import recipe_of, set_recipe
        >>> network = nn.Linear(4, 3)
        >>> set_recipe(network, {"in_features": 4, "out_features": 3})
        >>> recipe_of(network)
        {'factory': 'Linear', 'arguments': {'in_features': 4, 'out_features': 3}}
    """
    recipe = None if arguments is None else {"factory": type(network).__name__, "arguments": dict(arguments)}
    network.__dict__["_recipe"] = recipe


def note_weights(network: nn.Module, path: str) -> None:
    """Note the file that a network's weights come from; a copy of the network knows it, too."""
    network.__dict__["_weights_from"] = path


def weights_from(network: nn.Module) -> list[str]:
    """The files that the weights of a network and its parts were loaded from.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks.provenance import note_weights, weights_from
        >>> network = nn.Sequential(nn.Linear(4, 3))
        >>> note_weights(network[0], "layer.pt")
        >>> weights_from(network)
        ['layer.pt']
    """
    noted = [module.__dict__.get("_weights_from") for module in network.modules()]
    return list(dict.fromkeys(path for path in noted if path is not None))


def drop_recipes(network: nn.Module) -> None:
    """Forget how a network and its submodules were built, where they were changed since.

    Example:
        >>> from distill_lightning.networks import SmallCNN, recipe_of
        >>> from distill_lightning.networks.provenance import drop_recipes
        >>> network = SmallCNN(num_classes=10)
        >>> drop_recipes(network)
        >>> recipe_of(network) is None
        True
    """
    for module in network.modules():
        module.__dict__.pop("_recipe", None)


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return recipe_of(value)
    return str(value) if isinstance(value, Path) else value


# What became of a network after it was built


class StructureKeeper(Protocol):
    """Notes in checkpoints, and restores, what was changed in networks after they were built."""

    def note_structure(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Note in a checkpoint what was done to a module's network."""

    def restore_structure(self, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Give a module's network the structure recorded in a checkpoint."""

    def plain_network(self, network: nn.Module) -> nn.Module:
        """The network, or a copy of it with computed weights replaced by their values."""


_KEEPERS: list[StructureKeeper] = []


def register_keeper(keeper: StructureKeeper) -> None:
    """Register what notes and restores changes of networks; `distill_lightning.compression` calls this as it loads."""
    _KEEPERS.append(keeper)


def note_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint what was done to a module's network since it was built, if anything was."""
    # What was never loaded has changed no network.
    for keeper in _KEEPERS:
        keeper.note_structure(module, checkpoint)


def restore_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module's network the structure recorded in a checkpoint, so that its weights fit.

    Raises:
        InputError: it is changed in another way already.
    """
    if checkpoint.get("compression") is not None and not _KEEPERS:
        importlib.import_module("distill_lightning.compression.structure.checkpoints")
    for keeper in _KEEPERS:
        keeper.restore_structure(module, checkpoint)


def plain_network(network: nn.Module) -> nn.Module:
    """The network, or a copy of it with computed weights replaced by their values."""
    for keeper in _KEEPERS:
        network = keeper.plain_network(network)
    return network
