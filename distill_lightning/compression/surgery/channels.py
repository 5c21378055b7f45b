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
    fixed = found.channels.fixed_roots() | {
        int(root) for place in found.made if place[1] == "units" for root in found.channels.roots(found.bindings[place])
    }
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
        roots: of the channels, in the group's order.
        name: of the group.
        kind: what is counted.
    """
    index = {root: number for number, root in enumerate(roots)}
    members = []
    for (path, axis), numbers in found.bindings.items():
        channels = torch.tensor([index.get(root, -1) for root in found.channels.roots(numbers).tolist()])
        if bool((channels >= 0).any()):
            members.append(Member(path, axis, channels))
    return Group(name, kind, len(roots), tuple(members))


def _families(found: Dependencies, makers: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Roots by the path of the first layer that makes them; together are those that one layer makes."""
    linked = Channels()
    number = {root: linked.new(1) for place in makers for root in _roots(found, place)}
    for place in makers:
        own = _roots(found, place)
        for root in own[1:]:
            linked.same(number[own[0]], number[root])
    families: dict[int, tuple[str, list[int]]] = {}
    for place in makers:
        for root in _roots(found, place):
            _, roots = families.setdefault(linked.root(int(number[root])), (place[0], []))
            if root not in roots:
                roots.append(root)
    return dict(families.values())


def _roots(found: Dependencies, place: tuple[str, str]) -> list[int]:
    roots: list[int] = found.channels.roots(found.bindings[place]).tolist()
    return roots
