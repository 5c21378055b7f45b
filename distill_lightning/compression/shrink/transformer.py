"""Groups of the heads and feed-forward neurons of Transformers, and removal of whole layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.shrink.attention import Attention, foreign_attention, overridden
from distill_lightning.compression.shrink.axes import TransformerLayer
from distill_lightning.compression.shrink.groups import Group, whole
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode


def head_groups(network: nn.Module) -> list[Group]:
    """The heads of every `Attention`; a head has rows of three projections and columns of the output projection.

    Raises:
        InputError: the network still has `nn.MultiheadAttention`, whose heads cannot be removed, or no attention.
    """
    foreign = foreign_attention(network)
    for path, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and path not in foreign:
            raise InputError(f"{path or 'the network'} is nn.MultiheadAttention: call convert_attention(network) first")
    paths = [path for path, module in network.named_modules() if isinstance(module, Attention)]
    if not paths:
        why = "".join(f"; {path}: {reason}" for path, reason in foreign.items())
        raise InputError(f"{type(network).__name__} has no attention whose heads could be removed{why}")
    return [whole(network, path, axis="heads", kind="heads") for path in paths]


def neuron_groups(network: nn.Module) -> list[Group]:
    """The feed-forward neurons of PyTorch's Transformer layers: rows of ``linear1``, columns of ``linear2``.

    Raises:
        InputError: the network has no such layer.
    """
    foreign = foreign_neurons(network)
    paths = [
        path for path, module in network.named_modules() if isinstance(module, TransformerLayer) and path not in foreign
    ]
    if not paths:
        why = "".join(f"; {path}: {reason}" for path, reason in foreign.items())
        raise InputError(
            f"{type(network).__name__} has no TransformerEncoderLayer or TransformerDecoderLayer: the neurons of other "
            f"networks are channels, unit='channel'{why}"
        )
    return [whole(network, path, axis="neurons", kind="neurons") for path in paths]


def foreign_neurons(network: nn.Module) -> dict[str, str]:
    """Why Transformer layers keep their neurons, by path: they compute something else than PyTorch's with them."""
    found: dict[str, str] = {}
    for path, module in network.named_modules():
        if isinstance(module, TransformerLayer):
            kind = next(kind for kind in TransformerLayer if isinstance(module, kind))
            own = [method for method in overridden(module, kind) if method in ("forward", "_ff_block")]
            if own:
                found[path] = f"its class has its own {own[0]}()"
            elif not _keeps_apart(module):
                found[path] = "its activation mixes neurons"
    return found


@torch.no_grad()
def _keeps_apart(layer: Any) -> bool:
    """Whether a layer's activation makes of each neuron the same whatever the others are."""
    if not isinstance(layer.linear1, nn.Linear):
        return True  # refused elsewhere
    weight: Tensor = layer.linear1.weight
    neurons = torch.linspace(-3, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    try:
        with eval_mode(*(part for part in (layer.activation,) if isinstance(part, nn.Module))):
            whole, part = layer.activation(neurons), layer.activation(neurons[:, ::2])
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # it has a size of its own
    return whole.shape == neurons.shape and torch.allclose(whole[:, ::2], part, equal_nan=True)


def remove_layers(encoder: nn.TransformerEncoder, keep: Sequence[int]) -> nn.TransformerEncoder:
    """Remove layers of an encoder, in place; those that stay are the same objects, in their order.

    `set_sizes` uses the first layers of the encoder that it is given, so all layers must be built with the same
    arguments, as `nn.TransformerEncoder` does.
    """
    count = len(encoder.layers)
    if not keep or len(set(keep)) != len(keep) or not all(0 <= index < count for index in keep):
        raise InputError(
            f"TransformerEncoder: keep must be different indices below {count}, at least one: {list(keep)}"
        )
    encoder.layers = nn.ModuleList(layer for index, layer in enumerate(encoder.layers) if index in set(keep))
    encoder.num_layers = len(keep)
    return encoder
