"""Groups of the hidden units of RNN, GRU and LSTM, with the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distill_lightning.compression.access.parameters import layer_at
from distill_lightning.compression.shrink.axes import blocks
from distill_lightning.compression.shrink.channels import make_group
from distill_lightning.compression.shrink.groups import Group
from distill_lightning.compression.shrink.tracing import follow
from distill_lightning.errors import InputError


def unit_groups(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[Group]:
    """Find the hidden units that can be removed, in one group for each RNN, GRU or LSTM.

    Units are numbered by block, ``block * hidden_size + unit``, and blocks in PyTorch's order of ``h_n``: layer 0
    forward, layer 0 backward, layer 1 forward ...; see `in_blocks`. A unit is removed with its rows of every gate, its
    column of the recurrent weight, and its columns in the next layer and in whatever reads the output or final state.

    If the caller passes an initial state or receives the final one, its units are cut, too: ``state[block]`` of the
    shrunk network is ``state[block][:, keep]`` of the old one, so an initial state has to be sliced. An RNN whose
    initial state the network makes itself is left out.

    Args:
        network: a network as for `channel_groups`; it is left as it was.
        example_inputs: its input, or a tuple of its inputs.

    Returns:
        The groups in the order of the forward pass. RNNs with ``proj_size``, with a part of their output returned, or
        with units that go through an unknown operation are left out.

    Raises:
        InputError: the network cannot be followed, or no RNN of it can be shrunk.
    """
    found = follow(network, example_inputs)
    made = {place: found.bindings[place] for place in found.made}
    groups = []
    for place, roots in made.items():
        others = {root for other, own in made.items() if other != place for root in own}
        alone = len(set(roots)) == len(roots) and not others.intersection(roots)
        if place[1] == "units" and alone and found.fixed.keys().isdisjoint(roots):
            groups.append(make_group(found, roots, name=place[0], kind="units"))
    if not groups:
        raise InputError(
            f"{type(network).__name__} has no RNN, GRU or LSTM that can be shrunk: one with proj_size, with a part of "
            "its output returned, or whose units go through an unknown operation cannot"
        )
    return groups


def in_blocks(network: nn.Module, group: Group, keep: Sequence[Sequence[int]]) -> list[int]:
    """Convert indices of each layer and direction to indices for `shrink`.

    For each block, in the order of ``h_n``, ``keep`` has the units that stay, below ``hidden_size``; equally many in
    each.
    """
    rnn: Any = layer_at(network, group.name)
    if len(keep) != blocks(rnn):
        raise InputError(f"{group.name} has {blocks(rnn)} layers times directions, got units for {len(keep)}")
    for units in keep:
        if any(not 0 <= unit < rnn.hidden_size for unit in units):
            raise InputError(f"{group.name}: units are below {rnn.hidden_size}, got {list(units)[:20]}")
    return [block * rnn.hidden_size + unit for block, units in enumerate(keep) for unit in units]
