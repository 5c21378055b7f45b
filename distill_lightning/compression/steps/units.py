"""Channels, hidden units, neurons, heads and layers: how they are found, chosen and removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill_lightning.compression.access.calibration import inputs_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.targets import Targets, match_layers
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.mask.selection import Amount, Scope, amount_of, choose
from distill_lightning.compression.shrink.attention import convert_attention, foreign_attention
from distill_lightning.compression.shrink.axes import blocks
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import Group, shrink
from distill_lightning.compression.shrink.recurrent import unit_groups
from distill_lightning.compression.shrink.transformer import (
    foreign_neurons,
    head_groups,
    neuron_groups,
    remove_layers,
)
from distill_lightning.compression.steps.weights import REDUCE, SCORERS
from distill_lightning.compression.steps.workpiece import RemovedUnits, Workpiece
from distill_lightning.compression.structure.changes import note_change
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide

UnitKind = Literal["channel", "hidden_unit", "neuron", "head", "layer"]
UNITS: tuple[UnitKind, ...] = ("channel", "hidden_unit", "neuron", "head", "layer")
Kept = dict[str, list[int]]
"""The units that stay, by name of their family."""


@dataclass(frozen=True, eq=False)
class Family:
    """Units of one layer, which compete with each other first.

    Args:
        name: path of a layer.
        size: number of units.
        blocks: number of equal parts that keep the same number of units: an RNN's layers and directions.
        group: the group of the units; ``None`` if they are the layers of the `nn.TransformerEncoder` at ``name``.
    """

    name: str
    size: int
    blocks: int = 1
    group: Group | None = None


def prepare(network: nn.Module, kind: UnitKind) -> nn.Module:
    """Convert a network's layers, in place, so that they can lose such units."""
    return convert_attention(network) if kind == "head" else network


def left_alone(network: nn.Module, kind: UnitKind) -> dict[str, str]:
    """Why layers that could lose such units by their class keep them, by path."""
    return foreign_attention(network) if kind == "head" else foreign_neurons(network) if kind == "neuron" else {}


def find_families(piece: Workpiece, kind: UnitKind, *, targets: Targets | None, exclude: Targets) -> list[Family]:
    """Find the units that can be removed from a network after `prepare`.

    Raises:
        InputError: there are none, or none of them matches.
    """
    network, inputs = piece.network, inputs_of(piece.example_inputs)
    if kind == "layer":
        found = [
            Family(path, len(module.layers))
            for path, module in network.named_modules()
            if isinstance(module, nn.TransformerEncoder)
        ]
    else:
        groups = _groups(network, kind, inputs)
        found = [
            Family(group.name, group.size, _blocks(network, group.name) if kind == "hidden_unit" else 1, group)
            for group in groups
        ]
    layers = {network.get_submodule(family.name) for family in found}
    what = "nn.TransformerEncoder" if kind == "layer" else f"layers that groups of {kind}s are named after"
    chosen = match_layers(network, targets, exclude, fits=lambda layer: layer in layers, what=what)
    return [family for family in found if family.name in chosen]


def parameter_names(network: nn.Module, families: Sequence[Family]) -> list[str]:
    """Names of the parameters that lose entries when the units are removed."""
    names: dict[str, None] = {}
    for family in families:
        names.update(dict.fromkeys(_names(network, family)))
    return list(names)


def score_units(piece: Workpiece, families: Sequence[Family], criterion: str) -> dict[str, Tensor]:
    """Score units: the sum over the weights that are removed with each of them, or the mean.

    The criterion is a key of `SCORERS`, but not one of single layers, or ``"bn_scale"``. Scores are ``(size,)`` by name
    of the family.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(piece.seed)
        return {family.name: torch.rand(family.size, generator=generator) for family in families}
    if criterion == "bn_scale":
        return {family.name: _bn_scale(piece.network, family) for family in families}
    names = parameter_names(piece.network, families)
    mean = REDUCE.get(criterion, "mean") == "mean"
    if mean:
        # Scales of norms are of another magnitude than weights, so they are left out of the mean.
        names = [name for name in names if piece.network.get_parameter(name).dim() > 1]
    values = SCORERS[criterion](piece, names)
    # Expanded, because a network may have hundreds of families and each would fill as much memory as the weights.
    ones = {name: value.new_ones(()).expand_as(value) for name, value in values.items()} if mean else None
    return {family.name: _sums(piece.network, family, values, ones) for family in families}


def choose_units(
    families: Sequence[Family],
    scores: Mapping[str, Tensor],
    amount: Amount | None,
    *,
    scope: Scope,
    by_threshold: bool = False,
    relative: bool = False,
    round_to: int = 1,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> Kept:
    """Choose the units that stay.

    Args:
        families: the families of units.
        scores: ``(size,)`` scores by name of the family.
        amount: share of the units to remove; see `choose`. One unit of each family always stays.
        scope: see `choose`.
        relative: whether units compete by their score relative to the mean of their family; not with a threshold.
        by_threshold: whether the amount is a threshold of the scores instead: units with lower scores are removed.
        round_to: the number of units that stay is a multiple of this, so a little less than the amount is removed.
        kept: the units that have stayed so far; the others stay removed, and count towards the amount.
    """
    ranked, away = {}, {}
    for family in families:
        stays = torch.zeros(family.size, dtype=torch.bool)
        stays[list(range(family.size) if kept is None else kept[family.name])] = True
        score = wide(scores[family.name]).cpu().masked_fill(~stays, -torch.inf).view(family.blocks, -1)
        # Blocks lose equally many units, so the worst units of all blocks are removed together.
        ranked[family.name] = score.sort(dim=1, stable=True)
        away[family.name] = ranked[family.name].values.isinf().any(0)
    values = {name: ranking.values.sum(0) for name, ranking in ranked.items()}
    if relative and not by_threshold:
        for family in families:
            left = values[family.name][~away[family.name]]
            values[family.name] = values[family.name] / left.mean().clamp(min=torch.finfo(left.dtype).tiny)
    if by_threshold:
        worth = {family.name: amount_of(amount or 0.0, family.name) * family.blocks for family in families}
        staying = {name: (values[name] >= worth[name]) & ~away[name] for name in values}
    else:
        staying = choose(values, amount or 0.0, scope=scope, gone=away)
    result = {}
    for family in families:
        size = family.size // family.blocks
        places = ranked[family.name].indices + size * torch.arange(family.blocks)[:, None]
        count = min(-(-max(int(staying[family.name].sum()), 1) // round_to) * round_to, size)
        # Removed units do not return for a round number.
        count = min(count, int((~away[family.name]).sum()))
        result[family.name] = sorted(places[:, size - count :].flatten().tolist())
    return result


def remove(
    network: nn.Module, *, kind: UnitKind, families: Sequence[Family], kept: Mapping[str, Sequence[int]]
) -> None:
    """Remove the units that are not kept from a network, in place.

    Args:
        network: a network of the families' architecture, before or after `prepare`.
        kind: kind of the units.
        families: the families of units.
        kept: the units that stay.
    """
    prepare(network, kind)
    for family in families:
        encoder = network.get_submodule(family.name)
        if family.group is None and isinstance(encoder, nn.TransformerEncoder):
            remove_layers(encoder, kept[family.name])
    shrink(network, {family.group: kept[family.name] for family in families if family.group is not None})


def removed(kind: UnitKind, families: Sequence[Family], kept: Mapping[str, Sequence[int]]) -> list[RemovedUnits]:
    """The units that are not kept, family by family, in plain values; families that keep all are left out."""
    found = []
    for family in families:
        gone = tuple(sorted(set(range(family.size)) - set(kept[family.name])))
        members = () if family.group is None else family.group.members
        others = tuple(dict.fromkeys(member.path for member in members if member.path != family.name))
        if gone:
            found.append(RemovedUnits(family.name, kind, family.size, gone, others))
    return found


def change(piece: Workpiece, act: Callable[[nn.Module], object]) -> None:
    """Change a network's structure together with its masks; masks that would mask nothing are dropped.

    Args:
        piece: the workpiece.
        act: changes a network of this architecture in place; it may move weights but not compute with them.
    """
    masks: dict[str, Tensor] = {}
    if piece.masks.kept:
        # Masks are moved like weights: as the weights of a copy.
        shadow = copy_network(piece.network)
        with torch.no_grad():
            for name, parameter in shadow.named_parameters():
                mask = piece.masks.kept.get(name)
                parameter.fill_(1) if mask is None else parameter.copy_(mask)
        act(shadow)
        masks = {name: parameter.detach() != 0 for name, parameter in shadow.named_parameters()}
    act(piece.network)
    piece.masks.load_state_dict({name: mask for name, mask in masks.items() if not mask.all()})
    note_change(piece.network, "sizes")
    piece.changed = True


def unit_masks(network: nn.Module, families: Sequence[Family], kept: Mapping[str, Sequence[int]]) -> Masks:
    """Masks under which a network returns the same as without the units that are not kept."""
    masks: dict[str, Tensor] = {}
    for family in families:
        if family.group is not None and len(kept[family.name]) < family.size:
            for name, mask in family.group.masks(network, kept[family.name]).items():
                masks[name] = masks[name] & mask if name in masks else mask
    return Masks(masks)


def group_norms(network: nn.Module, families: Sequence[Family]) -> Tensor:
    r"""The sum over all units of the square root of their size times their norm, with a graph."""
    squares = {name: wide(network.get_parameter(name)).square() for name in parameter_names(network, families)}
    ones = {name: torch.ones_like(square) for name, square in squares.items()}
    total = []
    for family in families:
        if family.group is not None:
            norm = family.group.scores(network, squares)
            # A unit of zeros has no direction in which to shrink; without the bound its gradient would be NaN.
            norm = norm.clamp(min=torch.finfo(norm.dtype).tiny).sqrt()
            total.append((family.group.scores(network, ones).sqrt() * norm).sum())
    return torch.stack(total).sum()


def on_copy(piece: Workpiece, kind: UnitKind) -> Workpiece:
    """The workpiece with a copy of its network after `prepare`; the workpiece itself if that changes nothing."""
    return replace(piece, network=prepare(copy_network(piece.network), kind)) if kind == "head" else piece


def _groups(network: nn.Module, kind: UnitKind, inputs: tuple[Any, ...]) -> list[Group]:
    if kind == "head":
        return head_groups(network)
    if kind == "neuron":
        return neuron_groups(network)
    if kind == "hidden_unit":
        return unit_groups(network, inputs)
    return channel_groups(network, inputs)


def _blocks(network: nn.Module, path: str) -> int:
    return blocks(cast("nn.RNNBase", network.get_submodule(path)))


def _names(network: nn.Module, family: Family) -> list[str]:
    if family.group is not None:
        return family.group.parameter_names(network)
    inside = f"{family.name}.layers." if family.name else "layers."
    return [name for name, _ in network.named_parameters() if name.startswith(inside)]


def _sums(
    network: nn.Module, family: Family, values: Mapping[str, Tensor], ones: Mapping[str, Tensor] | None
) -> Tensor:
    """The sum of the values of each unit, or with ones beside them the mean."""
    if family.group is not None:
        total = family.group.scores(network, values)
        return total if ones is None else total / family.group.scores(network, ones)
    prefix = f"{family.name}.layers." if family.name else "layers."
    scores = []
    for number in range(family.size):
        own = [wide(value).flatten() for name, value in values.items() if name.startswith(f"{prefix}{number}.")]
        scores.append(torch.cat(own).sum() if ones is None else torch.cat(own).mean())
    return torch.stack(scores)


def _bn_scale(network: nn.Module, family: Family) -> Tensor:
    members = () if family.group is None else family.group.members
    norms = [member.path for member in members if isinstance(network.get_submodule(member.path), _BatchNorm)]
    scales = {f"{path}.weight": network.get_submodule(path).weight for path in norms}
    values = {name: scale.detach().abs() for name, scale in scales.items() if isinstance(scale, Tensor)}
    if family.group is None or not values:
        raise InputError(f"criterion 'bn_scale': {family.name!r} has no BatchNorm with a scale: exclude it")
    return family.group.scores(network, values)
