"""Groups of the hidden units of RNN, GRU and LSTM, with the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.surgery.axes import blocks, length, slices
from distill_lightning.compression.surgery.channels import make_group
from distill_lightning.compression.surgery.groups import Group, Keep, Member, get_layer, kept_mask
from distill_lightning.compression.surgery.tracing import follow
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
        network: a network that `torch.fx` can trace (for others see `unit_group`); it is left as it was.
        example_inputs: its input, or a tuple of its inputs.

    Returns:
        The groups in the order of the forward pass. RNNs with ``proj_size``, with a part of their output returned, or
        with units that go through an unknown operation are left out.

    Raises:
        InputError: the network cannot be traced, or no RNN of it can be shrunk.
    """
    found = follow(network, example_inputs)
    made = {place: found.bindings[place] for place in found.made}
    groups = []
    for place, roots in made.items():
        others = {root for other, own in made.items() if other != place for root in own}
        alone = len(set(roots)) == len(roots) and not others.intersection(roots)
        if place[1] == "units" and alone and not found.fixed.intersection(roots):
            groups.append(make_group(found, roots, name=place[0], kind="units"))
    if not groups:
        raise InputError(
            f"{type(network).__name__} has no RNN, GRU or LSTM that can be shrunk: see unit_groups for what can, and "
            "unit_group to name the layers that read its output"
        )
    return groups


def unit_group(network: nn.Module, path: str, *, readers: Sequence[str]) -> Group:
    """The hidden units of one RNN, for networks that cannot be traced (packed sequences, loops).

    Args:
        network: any network.
        path: path of the RNN, GRU or LSTM.
        readers: paths of all layers (linear, RNN) whose input features are the RNN's output features, which are the
            last layer's units, forward, then backward.

    Raises:
        InputError: a path belongs to another kind of layer, an RNN has ``proj_size``, or a reader has another size.
    """
    rnn = get_layer(network, path)
    if not isinstance(rnn, nn.RNNBase):
        raise InputError(f"{path} is {type(rnn).__name__}: name an RNN, GRU or LSTM")
    size = length(rnn, "units")
    last = torch.arange(size)[-rnn.hidden_size * (2 if rnn.bidirectional else 1) :]
    members = [Member(path, "units", torch.arange(size))]
    for reader in readers:
        found = length(get_layer(network, reader), "in")
        if found != len(last):
            raise InputError(
                f"{reader} reads {found} features, but {path} returns {len(last)}: name layers that read it"
            )
        members.append(Member(reader, "in", last))
    return Group(path, "units", size, tuple(members))


def in_blocks(network: nn.Module, group: Group, keep: Sequence[Sequence[int]]) -> list[int]:
    """Convert indices of each layer and direction to indices for `shrink`.

    Args:
        network: the network of the group.
        group: a group of hidden units.
        keep: for each block, in the order of ``h_n``, the units that stay, below ``hidden_size``; equally many in each.

    Raises:
        InputError: the number of blocks is wrong, or a unit does not exist.
    """
    rnn: Any = get_layer(network, group.name)
    if len(keep) != blocks(rnn):
        raise InputError(f"{group.name} has {blocks(rnn)} layers times directions, got units for {len(keep)}")
    for units in keep:
        if any(not 0 <= unit < rnn.hidden_size for unit in units):
            raise InputError(f"{group.name}: units are below {rnn.hidden_size}, got {list(units)[:20]}")
    return [block * rnn.hidden_size + unit for block, units in enumerate(keep) for unit in units]


def gate_masks(network: nn.Module, group: Group, keep: Keep) -> dict[str, Tensor]:
    """Masks that keep units at zero at every step: their rows of every gate and the biases.

    With only these masked and an initial state of zeros, the network returns the same as the shrunk one, without
    changing the layers that read the units.

    Args:
        network: the network of the group.
        group: a group of hidden units.
        keep: the indices that stay, as for `shrink`.

    Returns:
        Masks by parameter name, bool in the parameter's shape: true where a weight stays.

    Raises:
        InputError: see `shrink`.
    """
    kept = kept_mask(group, keep)
    parameters = dict(network.named_parameters())
    masks = {}
    for name, dim, positions in slices(get_layer(network, group.name), "units"):
        if dim == 0:
            full = f"{group.name}.{name}" if group.name else name
            rows = kept[positions].view(-1, *[1] * (parameters[full].dim() - 1))
            masks[full] = rows.expand(parameters[full].shape).clone().to(parameters[full].device)
    return masks
