"""Trials of removing units and of converting attention, see `try_change`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill_lightning.compression.shrink.attention import convert_attention, foreign_attention
from distill_lightning.compression.steps.trial import try_change
from distill_lightning.compression.steps.units import Family, UnitKind, change, on_copy, remove, unit_masks
from distill_lightning.compression.steps.workpiece import Workpiece


def convert(piece: Workpiece, title: str) -> None:
    """Convert a network's attention so that it can lose heads, in place.

    Args:
        piece: the workpiece; why some is left alone is noted.
        title: the step, for messages.

    Raises:
        InputError: the network would return something else.
    """
    network, foreign = piece.network, foreign_attention(piece.network)
    for path, reason in foreign.items():
        piece.leave(path, reason)
    paths = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention) and path not in foreign
    ]
    if paths:
        try_change(piece, title, paths, change=convert_attention, expect=lambda _, __: None)
        change(piece, convert_attention)


def try_removal(
    piece: Workpiece, title: str, *, kind: UnitKind, families: Sequence[Family], kept: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a removal of units after which the network returns something else than with the same units masked.

    Args:
        piece: the workpiece, which is not changed.
        title: the step, for the message.
        kind: kind of the units.
        families: the families of units that are found after `prepare`.
        kept: the units that stay.

    Raises:
        InputError: see `try_change`.
    """
    known = {family.name: family for family in families if len(kept[family.name]) < family.size}
    shown = on_copy(piece, kind).network
    try_change(
        piece,
        title,
        list(known),
        change=lambda network, names: remove(network, kind=kind, families=[known[name] for name in names], kept=kept),
        expect=lambda network, names: mask_units(network, shown, [known[name] for name in names], kept),
        cut=partial(_cut_state, list(known.values()), kept) if kind == "hidden_unit" else None,
    )


@torch.no_grad()
def mask_units(
    network: nn.Module, like: nn.Module, families: Sequence[Family], kept: Mapping[str, Sequence[int]]
) -> None:
    """Make a network return the same as without the units that are not kept, in place, without removing them.

    Args:
        network: the network, before or after `prepare`.
        like: a network of the same architecture after `prepare`.
        families: the families of units.
        kept: the units that stay.
    """
    parameters = dict(network.named_parameters())
    for name, mask in unit_masks(like, families, kept).kept.items():
        # Attention before `prepare` has the same output projection, by which a head has no effect.
        if name in parameters and parameters[name].shape == mask.shape:
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    for family in families:
        encoder = network.get_submodule(family.name)
        if family.group is None and isinstance(encoder, nn.TransformerEncoder):
            for number in set(range(family.size)) - set(kept[family.name]):
                encoder.layers[number].register_forward_hook(lambda _, inputs, __: inputs[0])


def _cut_state(families: Sequence[Family], kept: Mapping[str, Sequence[int]], tensor: Tensor) -> Tensor:
    """What is left of a state ``(blocks, ..., hidden_size)``; any other tensor as it is."""
    for family in families:
        size = family.size // family.blocks
        if tensor.dim() > 1 and tensor.shape[0] == family.blocks and tensor.shape[-1] == size:
            stays = torch.tensor(kept[family.name], device=tensor.device).view(family.blocks, -1) % size
            return torch.stack([block.index_select(-1, own) for block, own in zip(tensor, stays, strict=True)])
    return tensor
