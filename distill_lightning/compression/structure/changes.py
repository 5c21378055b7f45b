"""The changes of a network's structure in plain values, and their repetition on a freshly built network.

Changes of layers' sizes, and replacements of layers, are noted on the network in the order in which they are made.
What is put on weights (learned masks, shared values, quantizers) can be seen on the layers themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

import distill_lightning

# Families register on import; `compression/__init__` imports them all.
from distill_lightning.compression.access.computed import bake, describe_weights, rebuild_weights
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import layer_at
from distill_lightning.compression.factor.factoring import build_factors, replace_layer
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.compression.shrink.tying import restore_ties, ties_of
from distill_lightning.compression.values.activations import describe_input, rebuild_input
from distill_lightning.errors import InputError
from distill_lightning.networks import recipe_of
from distill_lightning.networks.budget import Budget, bytes_of_tensors

ChangeKind = Literal["sizes", "low_rank", "tied"]
Structure = dict[str, Any]
"""``{"format": 2, "changes": [{"kind": ..., "layers": {...}}], "layers": {path: {"weights": {...}, "input": ...}}}``,
where a change of sizes may have ``"amounts"``, see `note_amount`; of str, int, float, bool, lists and dicts, which JSON
and ``torch.load(weights_only=True)`` accept."""
FORMAT = 2
"""The format of `Structure`."""
# What the changes may take, at any rate and for each byte of the network that they are made to.
_SMALL = 2**28
_RATIO = 16
NOTHING: Structure = {"format": FORMAT, "changes": [], "layers": {}}
"""The structure of a network without visible changes; its weights may be masked."""


def note_change(network: nn.Module, kind: ChangeKind, layers: Mapping[str, Any] | None = None) -> None:
    """Record on a network that its structure has just been changed.

    Args:
        network: the network after the change.
        kind: ``"sizes"``: layers were shrunk, heads, units or layers removed, or attention converted; ``"low_rank"``;
            ``"tied"``.
        layers: for ``"low_rank"`` the ``description`` of each new layer by path; sizes and ties are read from the
            network.
    """
    changes = changes_of(network)
    amounts: list[dict[str, Any]] = []
    if kind == "sizes":
        layers = sizes_of(network)
        # A later entry contains all sizes.
        if changes and changes[-1]["kind"] == "sizes":
            amounts = changes[-1].get("amounts", [])
            changes = changes[:-1]
    elif kind == "tied":
        layers = {"groups": ties_of(network)}
    change: dict[str, Any] = {"kind": kind, "layers": dict(layers or {})}
    network.__dict__["_changes"] = [*changes, change | ({"amounts": amounts} if amounts else {})]


def note_amount(network: nn.Module, step: str, *, budget: str, amount: float) -> None:
    """Record with the last change how much a step has pruned to meet a budget; nothing reads it but people.

    Args:
        network: the network after `note_change`.
        step: the step's title.
        budget: what was asked for.
        amount: what was found.
    """
    *changes, last = changes_of(network)
    amounts = [*last.get("amounts", []), {"step": step, "budget": budget, "amount": amount}]
    network.__dict__["_changes"] = [*changes, {**last, "amounts": amounts}]


def changes_of(network: nn.Module) -> list[dict[str, Any]]:
    """The recorded changes, in their order."""
    changes: list[dict[str, Any]] = network.__dict__.get("_changes", [])
    return changes


def structure_of(network: nn.Module) -> Structure:
    """Everything that `rebuild_structure` has to do to a network that is built like this one."""
    layers: dict[str, dict[str, Any]] = {}
    for path, module in network.named_modules():
        told = {"weights": describe_weights(module), "input": describe_input(module)}
        if any(told.values()):
            layers[path] = {name: value for name, value in told.items() if value}
    return {"format": FORMAT, "changes": copy.deepcopy(changes_of(network)), "layers": layers}


def checkpoint_entry(network: nn.Module, attribute: str) -> dict[str, Any]:
    """What a checkpoint holds under ``"compression"``, for `load_compressed` and for resuming."""
    return {"attribute": attribute, "recipe": recipe_of(network), "structure": structure_of(network)}


def rebuild_structure(network: nn.Module, structure: Mapping[str, Any], *, limit: int | None = None) -> nn.Module:
    """Give a network the described structure, in place; a state dict of the described network then loads strictly.

    Args:
        network: built like the described one, and not changed since.
        structure: what `structure_of` returned.
        limit: largest number of bytes of the tensors that are made for it, each of which counts at least 64 KiB;
            ``None``: 16 for each byte of the network's own, at least 256 MiB.

    Returns:
        The network.

    Raises:
        InputError: the network has another structure or is changed already, another version wrote the description, or
            its sizes are above the limit.
    """
    if structure.get("format") != FORMAT:
        raise InputError(
            f"the structure of a compressed network is in format {structure.get('format', 1)}, but this version of "
            f"distill_lightning ({distill_lightning.__version__}) reads format {FORMAT}: compress the network again"
        )
    if changes_of(network):
        raise InputError(f"{type(network).__name__} is compressed already: build a new one with the same arguments")
    largest = max(_SMALL, _RATIO * bytes_of_tensors(network.state_dict())) if limit is None else limit
    with Budget(largest, source=f"the structure of {type(network).__name__}", way_out="give a larger limit"):
        for change in structure["changes"]:
            _rebuild_change(network, change["kind"], change["layers"])
        for path, told in structure["layers"].items():
            layer = layer_at(network, path)
            rebuild_weights(layer, told.get("weights", {}))
            if "input" in told:
                rebuild_input(layer, told["input"])
    network.__dict__["_changes"] = copy.deepcopy(list(structure["changes"]))
    return network


def plain_structure(structure: Mapping[str, Any]) -> Structure:
    """The structure of the same network with plain weights; inputs stay quantized."""
    layers = {path: {"input": told["input"]} for path, told in structure["layers"].items() if "input" in told}
    return {"format": FORMAT, "changes": list(structure["changes"]), "layers": layers}


@torch.no_grad()
def plain_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode, whose weights are plain parameters with the values that the network uses."""
    return bake(copy_network(network).eval())


def _rebuild_change(network: nn.Module, kind: str, layers: Mapping[str, Any]) -> None:
    if kind == "sizes":
        if set_sizes(network, layers) is not network:
            raise InputError(f"{type(network).__name__} is a single layer that was replaced: put it into a module")
    elif kind == "low_rank":
        for path, told in layers.items():
            replace_layer(network, path, build_factors(layer_at(network, path), told))
    elif kind == "tied":
        restore_ties(network, layers["groups"])
    else:
        raise InputError(f"a change of the unknown kind {kind!r}: a newer version of this package makes it")
