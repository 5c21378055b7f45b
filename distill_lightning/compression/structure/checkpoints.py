"""The structure of compressed networks in checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from distill_lightning.compression.access.computed import is_computed
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.structure.changes import (
    NOTHING,
    checkpoint_entry,
    plain_copy,
    rebuild_structure,
    structure_of,
)
from distill_lightning.errors import InputError
from distill_lightning.networks import provenance


def note_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Store in a checkpoint the changes of a module's network, from which its structure is restored.

    Args:
        module: a module whose network `CompressionCallback` compresses, or that was loaded from such a checkpoint.
        checkpoint: receives ``"compression"`` if the network is or was being compressed.
    """
    kept: dict[str, nn.Module] = module.__dict__.get("_uncompressed", {})
    for name in kept or ("student",):
        network = getattr(module, name, None)
        if network is None:
            continue
        if kept or structure_of(network) != NOTHING:
            checkpoint["compression"] = checkpoint_entry(network, name)


def restore_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module's network the structure that it had in a checkpoint, so that the weights fit.

    Args:
        module: made with the uncompressed network, of which it then keeps a copy, or compressed in this process.
        checkpoint: with or without ``"compression"``, see `CompressionCallback`.

    Raises:
        InputError: the network is compressed, and there is no copy of the uncompressed one.
    """
    kept: dict[str, nn.Module] = module.__dict__.get("_uncompressed", {})
    told = checkpoint.get("compression")
    wanted = dict.fromkeys(kept, NOTHING) if told is None else {told["attribute"]: told.get("structure", {})}
    for name, structure in wanted.items():
        network = getattr(module, name)
        now = structure_of(network)
        if now == structure:
            continue
        if now != NOTHING:
            if name not in kept:
                raise InputError(
                    f"{type(module).__name__}.{name} is compressed differently than in the checkpoint: build the "
                    "module again, with the uncompressed network"
                )
            device = next(iter(network.parameters())).device
            fresh = copy_network(kept[name]).to(device).train(network.training)
            # It stays the same object, to which others may refer.
            network.__class__, network.__dict__ = fresh.__class__, fresh.__dict__
        elif name not in kept:
            module.__dict__.setdefault("_uncompressed", {})[name] = copy_network(network)
        rebuild_structure(network, structure)


def plain_network(network: nn.Module) -> nn.Module:
    """The network, or a copy whose weights are plain values, where some are computed from others."""
    return plain_copy(network) if is_computed(network) else network


provenance.register_keeper(sys.modules[__name__])
