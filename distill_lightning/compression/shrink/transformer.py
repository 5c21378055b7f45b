"""Groups of the heads and feed-forward neurons of Transformers, and removal of whole layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.axes import TransformerLayer
from distill_lightning.compression.shrink.groups import Group, whole
from distill_lightning.errors import InputError


def head_groups(network: nn.Module) -> list[Group]:
    """The heads of every `Attention`; a head has rows of three projections and columns of the output projection.

    Raises:
        InputError: the network still has `nn.MultiheadAttention`, whose heads cannot be removed, or no attention.
    """
    for path, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise InputError(f"{path or 'the network'} is nn.MultiheadAttention: call convert_attention(network) first")
    paths = [path for path, module in network.named_modules() if isinstance(module, Attention)]
    if not paths:
        raise InputError(f"{type(network).__name__} has no attention whose heads could be removed")
    return [whole(network, path, axis="heads", kind="heads") for path in paths]


def neuron_groups(network: nn.Module) -> list[Group]:
    """The feed-forward neurons of PyTorch's Transformer layers: rows of ``linear1``, columns of ``linear2``.

    Raises:
        InputError: the network has no such layer.
    """
    paths = [path for path, module in network.named_modules() if isinstance(module, TransformerLayer)]
    if not paths:
        raise InputError(
            f"{type(network).__name__} has no TransformerEncoderLayer or TransformerDecoderLayer: the neurons of other "
            "networks are channels, unit='channel'"
        )
    return [whole(network, path, axis="neurons", kind="neurons") for path in paths]


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
