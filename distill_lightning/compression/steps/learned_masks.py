"""Masks that are learned in a phase; steps that prune with them put them on, set them and take them off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from distill_lightning.compression import movement
from distill_lightning.compression.parameters import split_path
from distill_lightning.compression.selection import Scope
from distill_lightning.compression.workpiece import Workpiece

Places = dict[str, list[str]]
"""The order of layers' parameters, by path."""
_PAST = -1e9
"""The score of weights that were pruned before, below every other: they count towards the amount and stay pruned."""


def put_on(piece: Workpiece, paths: Sequence[str], kind: movement.Kind, **options: str | float) -> Places:
    """Put learned masks on weights, see `movement.learn`; existing masks are kept under the new paths.

    Returns:
        What `take_off` needs.
    """
    layers = dict.fromkeys(split_path(path)[0] for path in paths)
    places = {layer: list(_parameters(piece.network, layer)) for layer in layers}
    for path, mask in movement.learn(piece.network, paths, kind=kind, **options).items():
        before = piece.masks.kept.get(path)
        if before is not None and not isinstance(mask, movement.HardConcrete):
            mask.scores.data.masked_fill_(~before.to(mask.scores.device), _PAST)
        piece.rename_mask(path, _inner(path))
    return places


def set_amount(network: nn.Module, paths: Sequence[str], amount: float | Mapping[str, float], *, scope: Scope) -> None:
    """Set the amount of movement masks, or the threshold of soft ones; see `movement.set_amount`."""
    masks = {path: mask for path, mask in movement.learned(network).items() if path in paths}
    hard = any(isinstance(mask, movement.TopK) for mask in masks.values())
    if hard and not isinstance(amount, Mapping):
        movement.set_amount(network, amount, scope=scope)
        return
    for path, mask in masks.items():
        if not isinstance(mask, movement.HardConcrete):
            mask.amount = amount[path] if isinstance(amount, Mapping) else amount


def take_off(piece: Workpiece, paths: Sequence[str], places: Places) -> None:
    """Make the weights plain parameters again, in their old places, and keep their zeros."""
    masks = movement.bake(piece.network)
    # An optimiser's state dict identifies parameters only by their order.
    for layer, names in places.items():
        parameters = _parameters(piece.network, layer)
        for name in names:
            parameters[name] = parameters.pop(name)
    for path in paths:
        piece.rename_mask(_inner(path), path)
        before = piece.masks.kept.get(path)
        if before is not None:
            masks.kept[path] = masks.kept[path] & before.to(masks.kept[path].device)
    piece.prune(masks)


def _parameters(network: nn.Module, layer: str) -> dict[str, nn.Parameter | None]:
    return network.get_submodule(layer)._parameters  # noqa: SLF001  # the only access to their order


def _inner(path: str) -> str:
    """Where a parameter is while a parametrization computes the weight from it."""
    module, name = split_path(path)
    return f"{module}.parametrizations.{name}.original" if module else f"parametrizations.{name}.original"
