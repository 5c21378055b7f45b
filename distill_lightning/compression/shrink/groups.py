"""Groups of units that are removed from a network together: their members, scores, masks and removal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.parameters import join_path, layer_at, names_of_parameters, split_path
from distill_lightning.compression.shrink.axes import Slice, length, slices
from distill_lightning.compression.shrink.cutting import check_cut, cut
from distill_lightning.compression.shrink.norms import count_features
from distill_lightning.errors import InputError

GroupKind = Literal["channels", "units", "heads", "neurons"]
Keep = Sequence[int] | Tensor
"""Indices of the units that stay, in any order; the network keeps its own order."""


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one layer, along which a group lies.

    Args:
        path: path of the layer in the network.
        axis: see `distill_lightning.compression.shrink.axes`.
        channels: the index in the group of each position on the axis, -1 for none; int64.
    """

    path: str
    axis: str
    channels: Tensor

    def __repr__(self) -> str:
        return f"{self.path}:{self.axis}"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels, hidden units, heads or neurons, each of which can be removed in all members at once.

    `shrink` needs nothing but groups, so another dependency analysis can be used: whatever finds members by path and
    axis can build them.

    Args:
        name: path of the first layer that makes the channels.
        kind: the kind of the units.
        size: number of channels, units, heads or neurons.
        members: all axes along which they lie.
    """

    name: str
    kind: GroupKind
    size: int
    members: tuple[Member, ...]

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.size} {self.kind}: {', '.join(map(repr, self.members))})"

    def scores(self, network: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
        """The score of each channel: the sum of the values of all weights that would be removed with it.

        Args:
            network: the network of the group.
            values: a value per weight, by name in ``network.named_parameters()``, in the parameter's shape; missing
                names are left out.

        Returns:
            ``(size,)``, of the values' type.

        Raises:
            InputError: there is no value for a parameter of this group.
        """
        total: Tensor | None = None
        for member in self.members:
            for tensor, dim, positions in _slices(network, member):
                if tensor not in values:
                    continue
                value = values[tensor].movedim(dim, 0).reshape(len(positions), -1).sum(1)
                index = torch.where(positions < 0, -1, member.channels[positions.clamp(min=0)]).to(value.device)
                total = value.new_zeros(self.size) if total is None else total
                total.index_add_(0, index[index >= 0], value[index >= 0])
        if total is None:
            raise InputError(f"{self!r} has no score: give values by parameter name, for example {self.name}.weight")
        return total

    def parameter_names(self, network: nn.Module) -> list[str]:
        """Names of the parameters that lose entries with the units, in ``network.named_parameters()``."""
        return list(dict.fromkeys(name for name, _, _, _ in self._parts(network)))

    def masks(self, network: nn.Module, keep: Keep) -> dict[str, Tensor]:
        """The weights that would be removed, as masks; nothing is removed.

        A network whose masked weights are zero returns the same as the shrunk network. These are the weights of the
        filters and of the norms after them, and the columns of every layer that reads the channels.

        Args:
            network: the network of the group.
            keep: the indices that stay.

        Returns:
            Masks by parameter name, bool in the parameter's shape: true where a weight stays, false where it becomes
            zero.

        Raises:
            InputError: see `shrink`.
        """
        kept = kept_mask(self, keep)
        masks: dict[str, Tensor] = {}
        for name, parameter, part, member in self._parts(network):
            stays, shape = _positions_kept(member, kept), parameter.shape
            along = (part.positions < 0) | stays[part.positions.clamp(min=0)]
            along = along.view([-1 if d == part.dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)
            along = along.to(parameter.device)
            masks[name] = masks[name] & along if name in masks else along.clone()
        return masks

    def _parts(self, network: nn.Module) -> Iterator[tuple[str, Tensor, Slice, Member]]:
        """Name, parameter, dimension with its positions, and member, of every parameter that loses entries."""
        for member in self.members:
            layer = layer_at(network, member.path)
            # Of the layer alone: a large network has thousands of parameters, and hundreds of groups.
            own = dict(layer.named_parameters())
            for part in slices(layer, member.axis):
                if part.tensor in own:
                    yield join_path(member.path, part.tensor), own[part.tensor], part, member


def shrink(network: nn.Module, keep: Mapping[Group, Keep]) -> nn.Module:
    """Remove the units that are not kept from every tensor of the groups, in place.

    Parameters that change are replaced by new ones with their own storage and without gradients; the others stay the
    same objects. Make a new optimiser afterwards, because an old one keeps the old parameters. Find the groups again
    before the next call, because these refer to the old sizes.

    Args:
        network: the network of the groups, or a copy of it (`copy.deepcopy`), since groups name layers by path.
        keep: the indices that stay, by group.

    Returns:
        The same network.

    Raises:
        InputError: an index is not in the group or given twice; nothing of a group or layer would stay; the layers of
            an RNN would have different numbers of hidden units; a layer is reparametrized or shares its weights; or a
            group belongs to another network, or was found before the last call. Nothing is changed then.
    """
    stays: dict[tuple[str, str], Tensor] = {}
    for group, indices in keep.items():
        kept = kept_mask(group, indices)
        for member in group.members:
            own = _positions_kept(member, kept)
            place = (member.path, member.axis)
            here = length(layer_at(network, member.path), member.axis)
            if len(own) != here:
                raise InputError(
                    f"{group.name} was found when {member!r} had {len(own)} positions, but it has {here}: find the "
                    "groups of this network again"
                )
            # A layer that reads two groups side by side loses channels of both in one cut.
            stays[place] = stays[place] & own if place in stays else own
    tied = tied_modules(network)
    for (path, axis), own in stays.items():
        layer = network.get_submodule(path)
        if any(module in tied for module in layer.modules()):
            raise InputError(f"{path} shares its weights with another layer, so neither can shrink: untie them first")
        check_cut(layer, axis, own)
    for (path, axis), own in stays.items():
        if not own.all():
            layer = count_features(network, path) if axis == "features" else network.get_submodule(path)
            cut(layer, axis, own)
    return network


def kept_mask(group: Group, keep: Keep) -> Tensor:
    """Bool ``(size,)``, true where a channel stays.

    Raises:
        InputError: an index is out of range or given twice, or there is none.
    """
    indices = [int(index) for index in keep]
    if not indices:
        raise InputError(f"{group.name}: at least one of the {group.size} {group.kind} must stay")
    if len(set(indices)) != len(indices) or not 0 <= min(indices) <= max(indices) < group.size:
        raise InputError(f"{group.name}: keep must be different indices below {group.size}, got {indices[:20]}")
    mask = torch.zeros(group.size, dtype=torch.bool)
    mask[indices] = True
    return mask


def whole(network: nn.Module, path: str, *, axis: str, kind: GroupKind) -> Group:
    """The group of all positions along a layer's axis that belongs to no other layer."""
    size = length(layer_at(network, path), axis)
    return Group(path, kind, size, (Member(path, axis, torch.arange(size)),))


def tied_modules(network: nn.Module) -> set[nn.Module]:
    """The modules with a parameter that also belongs to another module, or has another name in the same module."""
    shared = [names for names in names_of_parameters(network).values() if len(names) > 1]
    return {network.get_submodule(split_path(name)[0]) for names in shared for name in names}


def _positions_kept(member: Member, kept: Tensor) -> Tensor:
    return (member.channels < 0) | kept[member.channels.clamp(min=0)]


def _slices(network: nn.Module, member: Member) -> Iterable[tuple[str, int, Tensor]]:
    for tensor, dim, positions in slices(layer_at(network, member.path), member.axis):
        yield join_path(member.path, tensor), dim, positions
