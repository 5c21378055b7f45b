"""Channels of convolutional networks and neurons of linear ones, with everything that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.surgery.groups import Group, GroupKind, Member
from distill_lightning.compression.surgery.tracing import Channels, Dependencies, follow
from distill_lightning.errors import InputError


def channel_groups(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[Group]:
    """The channels that can be removed from a network, in groups of those that lie along the same axes.

    A group holds what makes its channels (convolutions, linear layers; several where a shortcut adds their outputs),
    the norms they go through, depthwise convolutions, and what reads them. Never in a group: what the network returns,
    so its last layer keeps its outputs; what other grouped, transposed or reparametrized convolutions and layers with
    shared weights make or read; and what goes through an operation that is not known here.

    Args:
        network: that `torch.fx` can trace: sequential, residual and densely connected ones, with squeeze-and-excite,
            flattened feature maps and branches. It is left as it was.
        example_inputs: its input, or a tuple of its inputs; one sample of any size it takes is enough.

    Returns:
        In the order of the forward pass; see `shrink`.

    Raises:
        InputError: the network cannot be traced, or no channel of it can be removed.
    """
    found = follow(network, example_inputs)
    makers = [place for place in found.made if place[1] == "out"]
    families = _families(found, makers)
    # Hidden units that are added to channels: only the whole RNN could give way, so neither does.
    units = {root for place in found.made if place[1] == "units" for root in found.bindings[place]}
    fixed = found.fixed | units
    groups = [
        make_group(found, roots, name=path, kind="channels")
        for path, roots in families.items()
        if not fixed.intersection(roots)
    ]
    groups = [group for group in groups if group.size > 1]
    if not groups:
        raise InputError(
            f"{type(network).__name__} has no channels that can be removed: see channel_groups for what can"
        )
    return groups


def make_group(found: Dependencies, roots: list[int], *, name: str, kind: GroupKind) -> Group:
    """The group of some channels, with every axis that any of them lies along.

    Args:
        found: what following the network found.
        roots: the roots of the channels, in the group's order.
        name: name of the group.
        kind: the kind of the units.
    """
    index = {root: number for number, root in enumerate(roots)}
    members = []
    for (path, axis), along in found.bindings.items():
        if not index.keys().isdisjoint(along):
            members.append(Member(path, axis, torch.tensor([index.get(root, -1) for root in along])))
    return Group(name, kind, len(roots), tuple(members))


def _families(found: Dependencies, makers: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Roots by the path of the first layer that makes them; together are those that one layer makes."""
    linked = Channels()
    number = {root: linked.new(1) for place in makers for root in found.bindings[place]}
    for place in makers:
        first, *others = found.bindings[place]
        for root in others:
            linked.same(number[first], number[root])
    families: dict[int, tuple[str, dict[int, None]]] = {}
    for place in makers:
        _, roots = families.setdefault(linked.root(int(number[found.bindings[place][0]])), (place[0], {}))
        roots.update(dict.fromkeys(found.bindings[place]))
    return {path: list(roots) for path, roots in families.values()}
