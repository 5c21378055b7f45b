"""The changes of a network's structure in plain values, and their repetition on a freshly built network.

Changes of layers' sizes, and replacements of layers, are noted on the network in the order in which they are made.
What is put on weights (learned masks, shared values, quantizers) can be seen on the layers themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression import low_rank, movement, packing, quantizers, surgery, tying
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode
from distill_lightning.networks import recipe_of

ChangeKind = Literal["sizes", "low_rank", "tied"]
Description = dict[str, Any]
"""``{"changes": [{"kind": ..., "layers": {...}}, ...], "layers": {path: {kind: ...}}}``, of str, int, float, bool,
lists and dicts, which JSON and ``torch.load(weights_only=True)`` accept."""


class _Kind(NamedTuple):
    """How something on a layer's weights or input is described and rebuilt."""

    describe: Callable[[nn.Module], dict[str, Any] | None]
    rebuild: Callable[[nn.Module, Mapping[str, Any]], nn.Module]


_ON_LAYERS = {
    "learned": _Kind(movement.describe, movement.rebuild),
    "shared": _Kind(packing.describe_shared, packing.rebuild_shared),
    "hashed": _Kind(packing.describe_hashed, packing.rebuild_hashed),
    "quantized": _Kind(quantizers.describe, quantizers.rebuild),
    "input": _Kind(quantizers.describe_input, quantizers.rebuild_input),
}


def note_change(network: nn.Module, kind: ChangeKind, layers: Mapping[str, Any] | None = None) -> None:
    """Record on a network that its structure has just been changed.

    Args:
        network: the network after the change.
        kind: ``"sizes"``: layers were shrunk, heads, units or layers removed, or attention converted; ``"low_rank"``;
            ``"tied"``.
        layers: for ``"low_rank"``, what `rebuild` needs: ``low_rank.describe`` of each new layer by path; sizes and
            ties are read from the network.
    """
    changes = changes_of(network)
    if kind == "sizes":
        layers = surgery.describe(network)
        # A later entry contains all sizes.
        changes = changes[:-1] if changes and changes[-1]["kind"] == "sizes" else changes
    elif kind == "tied":
        layers = {"groups": tying.describe_tied(network)}
    network.__dict__["_changes"] = [*changes, {"kind": kind, "layers": dict(layers or {})}]


def changes_of(network: nn.Module) -> list[dict[str, Any]]:
    """The recorded changes, in their order."""
    changes: list[dict[str, Any]] = network.__dict__.get("_changes", [])
    return changes


def describe(network: nn.Module) -> Description:
    """Everything that `rebuild` has to do to a network that is built like this one."""
    layers: dict[str, dict[str, Any]] = {}
    for path, module in _layers(network):
        told = {name: kind.describe(module) for name, kind in _ON_LAYERS.items()}
        told = {name: value for name, value in told.items() if value}
        if told:
            layers[path] = told
    return {"changes": copy.deepcopy(changes_of(network)), "layers": layers}


def checkpoint_entry(network: nn.Module, attribute: str) -> dict[str, Any]:
    """What a checkpoint holds under ``"compression"``, for `load_compressed` and for resuming.

    Args:
        network: compressed or not.
        attribute: the module's attribute that holds the network.
    """
    return {"attribute": attribute, "recipe": recipe_of(network), "description": describe(network)}


def rebuild(network: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a network the described structure, in place; a state dict of the described network then loads strictly.

    Args:
        network: built like the described one, and not changed since.
        description: what `describe` returned.

    Returns:
        The network.

    Raises:
        InputError: the network has another structure, or it is changed already.
    """
    if changes_of(network):
        raise InputError(f"{type(network).__name__} is compressed already: build a new one with the same arguments")
    for change in description["changes"]:
        _rebuild_change(network, change["kind"], change["layers"])
    for path, told in description["layers"].items():
        layer = _layer_at(network, path)
        for name, value in told.items():
            _ON_LAYERS[name].rebuild(layer, value)
    network.__dict__["_changes"] = copy.deepcopy(list(description["changes"]))
    return network


def structure_only(description: Mapping[str, Any]) -> Description:
    """A description for a network of plain weights, without what was put on them; inputs stay quantized."""
    layers = {path: {"input": told["input"]} for path, told in description["layers"].items() if "input" in told}
    return {"changes": list(description["changes"]), "layers": layers}


def bake(network: nn.Module) -> nn.Module:
    """Replace computed weights by their values, in place: masks, shared values and quantizers are removed.

    The outputs in eval mode stay the same bit for bit. Quantizers of layers' inputs stay.

    Returns:
        The network.
    """
    _separate_classes(network)
    # In eval mode, because some parametrizations draw in train mode. All values first: tied layers compute theirs from
    # one weight, which baking the first of them overwrites.
    with eval_mode(network), parametrize.cached(), torch.no_grad():
        for _, layer in _layers(network):
            if parametrize.is_parametrized(layer):
                for name in cast("nn.ModuleDict", layer.parametrizations):
                    getattr(layer, name)
        movement.bake(network)
        for _, layer in _layers(network):
            packing.bake_shared(layer)
            packing.bake_hashed(layer)
            quantizers.bake(layer)
    return network


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy; works also for recurrent layers with computed weights, which PyTorch refuses to copy."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for weight in getattr(module, "_flat_weights", []):
            if weight is not None and not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
    copied = copy.deepcopy(network, memo)
    _separate_classes(copied)
    return copied


@torch.no_grad()
def plain_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode, whose weights are plain parameters with the values that the network uses."""
    return bake(copy_network(network).eval())


def _rebuild_change(network: nn.Module, kind: str, layers: Mapping[str, Any]) -> None:
    if kind == "sizes":
        if surgery.rebuild(network, layers) is not network:
            raise InputError(f"{type(network).__name__} is a single layer that was replaced: put it into a module")
    elif kind == "low_rank":
        for path, told in layers.items():
            low_rank.replace_layer(network, path, low_rank.rebuild(_layer_at(network, path), told))
    elif kind == "tied":
        tying.rebuild_tied(network, layers["groups"])
    else:
        raise InputError(f"a change of the unknown kind {kind!r}: a newer version of this package makes it")


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules but those inside parametrizations; a list, because parametrizations come and go."""
    return [(path, module) for path, module in network.named_modules() if "parametrizations" not in path.split(".")]


def _layer_at(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"{type(network).__name__} has no layer {path!r} to rebuild: build the network like the described one"
        ) from error


def _separate_classes(network: nn.Module) -> None:
    """Give every layer with computed weights its own class, as `parametrize` had done before a deep copy.

    The class has the weights as properties, and removing a parametrization deletes them there: from all of its copies.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, body)


def is_computed(network: nn.Module) -> bool:
    """Whether some weights are computed: by a learned mask, shared values or a quantizer."""
    return any(parametrize.is_parametrized(module) for module in network.modules())
