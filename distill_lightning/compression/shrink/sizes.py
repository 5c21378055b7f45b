"""The sizes of a network in plain values, and rebuilding a network with these sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distill_lightning.compression.access.hooks import carry_hooks
from distill_lightning.compression.access.parameters import layer_at
from distill_lightning.compression.shrink.attention import (
    Attention,
    describe_attention,
    forbid_nested,
    rebuild_attention,
)
from distill_lightning.compression.shrink.axes import Conv, ConvTransposed, TurnedLinear, own_parameters
from distill_lightning.compression.shrink.norms import CountedLayerNorm, rebuild_norm
from distill_lightning.errors import InputError

Sizes = dict[str, dict[str, Any]]
"""The kind and sizes of layers by path, made of str, int, float and bool."""

_SIZES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("convolution", Conv, ("in_channels", "out_channels", "groups")),
    ("transposed", ConvTransposed, ("in_channels", "out_channels")),
    ("linear", nn.Linear, ("in_features", "out_features")),
    ("turned_linear", TurnedLinear, ("nx", "nf")),
    ("embedding", nn.Embedding, ("embedding_dim",)),
    ("norm", _NormBase, ("num_features",)),
    ("group_norm", nn.GroupNorm, ("num_channels", "num_groups")),
    ("counted_norm", CountedLayerNorm, ("features", "counted")),
    ("prelu", nn.PReLU, ("num_parameters",)),
    ("recurrent", nn.RNNBase, ("input_size", "hidden_size")),
    ("encoder", nn.TransformerEncoder, ("num_layers",)),
]


def sizes_of(network: nn.Module) -> Sizes:
    """The sizes of every layer that this package can shrink, from which `set_sizes` makes the same structure.

    They are plain values, which JSON and ``torch.load(weights_only=True)`` accept.
    """
    described = {path: layer_sizes(module) for path, module in network.named_modules()}
    return {path: entry for path, entry in described.items() if entry is not None}


def set_sizes(network: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give a network the described sizes, in place; its weights still have to be loaded afterwards.

    Another object is returned if the network itself is a layer that has to be replaced. A state dict of the described
    network loads into it with ``strict=True``.
    """
    # Parents come before their children, so that a layer exists when the sizes of its parts are set.
    for path, entry in description.items():
        original = layer_at(network, path)
        layer = resize_layer(original, entry)
        if layer is original:
            continue
        carry_hooks(original, layer)
        if original is network:
            network = layer
            continue
        for parent in list(network.modules()):
            for name, child in parent._modules.items():  # noqa: SLF001  # every name of a shared layer
                if child is original:
                    setattr(parent, name, layer)
    forbid_nested(network)
    return network


def layer_sizes(layer: nn.Module) -> dict[str, Any] | None:
    """Kind and sizes of one layer without its children; ``None`` for a layer without sizes."""
    if isinstance(layer, Attention):
        return {"kind": "attention", **describe_attention(layer)}
    for kind, types, names in _SIZES:
        if isinstance(layer, types):
            return {"kind": kind, **{name: int(getattr(layer, name)) for name in names}}
    own = {name: layer.get_parameter(name).shape for name in own_parameters(layer)}
    sizes = {f"{name}.{dim}": size for name, shape in own.items() for dim, size in enumerate(shape)}
    return {"kind": "parameters", **sizes} if sizes else None


def resize_layer(original: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """A layer of the described sizes: the original one, changed in place if they differ, or a new `Attention`.

    Tensors whose shape changes are zero.
    """
    sizes = {name: value for name, value in description.items() if name != "kind"}
    own = layer_sizes(original)
    if own == description:
        return original
    if description["kind"] == "attention" and isinstance(original, (nn.MultiheadAttention, Attention)):
        return rebuild_attention(original, sizes)
    if description["kind"] == "counted_norm" and isinstance(original, (nn.LayerNorm, CountedLayerNorm)):
        return rebuild_norm(original, sizes)
    if own is None or own["kind"] != description["kind"]:
        raise InputError(
            f"{type(original).__name__} cannot be rebuilt as {description['kind']!r}: build the network as before"
        )
    if isinstance(original, nn.TransformerEncoder):
        return _first_layers(original, sizes["num_layers"])
    for name, shape in _resized(original, sizes).items():
        old = getattr(original, name)
        if old is not None and old.shape != torch.Size(shape):
            new = old.detach().new_zeros(shape)
            setattr(original, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    if isinstance(original, nn.RNNBase):
        original.flatten_parameters()
    return original


def _first_layers(encoder: nn.TransformerEncoder, count: int) -> nn.TransformerEncoder:
    if count > encoder.num_layers:
        raise InputError(f"a TransformerEncoder of {encoder.num_layers} layers cannot be rebuilt with {count}")
    encoder.layers = encoder.layers[:count]
    encoder.num_layers = count
    return encoder


def _resized(layer: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Give a layer its sizes; the shapes of its tensors that follow from them."""
    if ranks := {name: layer.get_parameter(name).dim() for name in own_parameters(layer)}:
        return {name: tuple(sizes[f"{name}.{dim}"] for dim in range(rank)) for name, rank in ranks.items()}
    for name, value in sizes.items():
        setattr(layer, name, value)
    return next((of(layer) for kinds, of in _SHAPES if isinstance(layer, kinds)), {})


def _recurrent_shapes(layer: nn.RNNBase) -> dict[str, tuple[int, ...]]:
    rows = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1) * layer.hidden_size
    suffixes = ["", "_reverse"] if layer.bidirectional else [""]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layer.num_layers):
        inputs = len(suffixes) * layer.hidden_size if number else layer.input_size
        for suffix in suffixes:
            end = f"_l{number}{suffix}"
            shapes[f"weight_ih{end}"] = (rows, inputs)
            shapes[f"weight_hh{end}"] = (rows, layer.hidden_size)
            if layer.bias:
                shapes[f"bias_ih{end}"] = shapes[f"bias_hh{end}"] = (rows,)
    return shapes


_SHAPES: list[tuple[Any, Callable[[Any], dict[str, tuple[int, ...]]]]] = [
    (Conv, lambda layer: {
        "weight": (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size),
        "bias": (layer.out_channels,),
    }),
    (ConvTransposed, lambda layer: {
        "weight": (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size),
        "bias": (layer.out_channels,),
    }),
    (nn.Linear, lambda layer: {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}),
    (TurnedLinear, lambda layer: {"weight": (layer.nx, layer.nf), "bias": (layer.nf,)}),
    (nn.Embedding, lambda layer: {"weight": (layer.num_embeddings, layer.embedding_dim)}),
    (_NormBase, lambda layer: dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), (layer.num_features,)
    )),
    (nn.GroupNorm, lambda layer: dict.fromkeys(("weight", "bias"), (layer.num_channels,))),
    (nn.PReLU, lambda layer: {"weight": (layer.num_parameters,)}),
    (nn.RNNBase, _recurrent_shapes),
]  # fmt: skip
