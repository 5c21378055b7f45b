"""Groups of the channels of convolutional networks and the neurons of linear ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.shrink.groups import Group, GroupKind, Member
from distill_lightning.compression.shrink.numbers import Channels
from distill_lightning.compression.shrink.tracing import Dependencies, follow
from distill_lightning.errors import InputError


def channel_groups(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[Group]:
    """Find the channels that can be removed from a network, in groups that lie along the same axes.

    A group contains the layers that make its channels (convolutions and linear layers; several if a shortcut adds their
    outputs), the embeddings that are added to these, the norms and depthwise convolutions that they pass through, and
    the layers that read them. Some channels
    leave only together: those at one place of every group of a grouped convolution, those of a group of a group norm,
    those of equal halves, or those of a head. Layer normalisation of fewer features counts the others as zeros, see
    `CountedLayerNorm`. Never in a group are the network's outputs, so its last layer keeps them; channels that
    reparametrized layers or layers with shared weights make or read; and channels that pass through an unknown
    operation, or whose number the network calculates with.

    Args:
        network: any network that does not decide by the numbers in its data what it computes. It is run once, also in
            training mode if some layers have not run then, and left as it was.
        example_inputs: its input, or a tuple of its inputs; one sample of any supported size is enough.

    Returns:
        The groups in the order of the forward pass; see `shrink`.

    Raises:
        InputError: the network cannot be followed, or no channel of it can be removed.
    """
    found = follow(network, example_inputs)
    makers = [place for place in found.made if place[1] == "out"]
    families = _families(found, makers)
    # Hidden units that are added to channels: the whole RNN would have to shrink, so neither does.
    units = {root for place in found.made if place[1] == "units" for root in found.bindings[place]}
    fixed = found.fixed.keys() | units
    groups = [
        make_group(found, roots, name=path, kind="channels")
        for path, roots in families.items()
        if not fixed.intersection(roots)
    ]
    groups = [group for group in groups if group.size > 1]
    if not groups:
        raise InputError(
            f"{type(network).__name__} has no channels that can be removed: preview() says why each layer keeps its own"
        )
    return groups


def fixed_channels(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> dict[str, str]:
    """Why layers keep all of their channels, by path; layers whose channels can be removed are left out."""
    found = follow(network, example_inputs)
    apart = "something else than the layer reads its weights: weight standardisation, for example"
    return dict.fromkeys(found.apart, apart) | {
        path: f"its channels stay: {reason}"
        for path, axis in found.made
        if axis == "out"
        for reason in [next((found.fixed[root] for root in found.bindings[path, axis] if root in found.fixed), None)]
        if reason is not None
    }


def make_group(found: Dependencies, roots: list[int], *, name: str, kind: GroupKind) -> Group:
    """The group of some channels, with every axis along which any of them lies.

    The roots are those of the channels, in the group's order.
    """
    index = {root: number for number, root in enumerate(roots)}
    own = {place for root in roots for place in found.places[root]}
    members = [
        Member(*place, torch.tensor([index.get(root, -1) for root in along]))
        for place, along in found.bindings.items() if place in own
    ]  # fmt: skip
    return Group(name, kind, len(roots), tuple(members))


def _families(found: Dependencies, makers: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Roots by the path of the first layer that makes them; channels of the same layer are together."""
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
