"""Networks that were compressed since they were built, in checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from distill_lightning.compression.recipe import (
    checkpoint_entry,
    copy_network,
    describe,
    is_computed,
    plain_copy,
    rebuild,
)
from distill_lightning.errors import InputError
from distill_lightning.networks import provenance

NOTHING: dict[str, Any] = {"changes": [], "layers": {}}
"""The description of a network to which nothing was done that can be seen on it: weights may be zero by masks."""


def note_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint what was done to a module's network, from which `rebuild` makes its structure.

    Args:
        module: whose network `CompressionCallback` compresses, or that was loaded from such a checkpoint.
        checkpoint: gets ``"compression"``, if anything does or did.
    """
    kept: dict[str, nn.Module] = module.__dict__.get("_uncompressed", {})
    for name in kept or ("student",):
        network = getattr(module, name, None)
        if network is None:
            continue
        if kept or describe(network) != NOTHING:
            checkpoint["compression"] = checkpoint_entry(network, name)


def restore_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module's network the structure that it had when a checkpoint was made, so that its weights fit.

    Args:
        module: made with the uncompressed network, of which it then keeps a copy, or compressed in this process.
        checkpoint: with or without ``"compression"``, see `CompressionCallback`.

    Raises:
        InputError: the network is compressed, and nobody kept what it was before.
    """
    kept: dict[str, nn.Module] = module.__dict__.get("_uncompressed", {})
    told = checkpoint.get("compression")
    wanted = dict.fromkeys(kept, NOTHING) if told is None else {told["attribute"]: told["description"]}
    for name, description in wanted.items():
        network = getattr(module, name)
        now = describe(network)
        if now == description:
            continue
        if now != NOTHING:
            if name not in kept:
                raise InputError(
                    f"{type(module).__name__}.{name} is compressed otherwise than in the checkpoint: make the module "
                    "anew, with the network as it was at first"
                )
            device = next(iter(network.parameters())).device
            fresh = copy_network(kept[name]).to(device).train(network.training)
            # It stays the same object, which others have, too.
            network.__class__, network.__dict__ = fresh.__class__, fresh.__dict__
        elif name not in kept:
            module.__dict__.setdefault("_uncompressed", {})[name] = copy_network(network)
        rebuild(network, description)


def plain_network(network: nn.Module) -> nn.Module:
    """The network, or a copy whose weights are plain values, where some are computed from others."""
    return plain_copy(network) if is_computed(network) else network


provenance.add_structure(sys.modules[__name__])
