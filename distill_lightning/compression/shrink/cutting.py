"""Cutting a layer along an axis: its tensors, and the sizes that it keeps beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.axes import (
    Conv,
    ConvTransposed,
    TransformerLayer,
    TurnedLinear,
    blocks,
    length,
    slices,
)
from distill_lightning.compression.shrink.norms import CountedLayerNorm
from distill_lightning.errors import InputError


def cut(layer: nn.Module, axis: str, keep: Tensor) -> None:
    """Shrink a layer along an axis, in place.

    The layer gets new parameters with their own storage and without gradients: make a new optimiser afterwards. Buffers
    are replaced in the same way, and the layer's sizes (``out_channels`` ...) are updated. ``keep`` is bool, one per
    position.
    """
    check_cut(layer, axis, keep)
    for found in slices(layer, axis):
        index = ((found.positions < 0) | keep[found.positions.clamp(min=0)]).nonzero().flatten()
        _replace(layer, found.tensor, found.dim, index)
    for kinds, resize in _SIZES:
        if isinstance(layer, kinds):
            resize(layer, axis, int(keep.sum()))


def check_cut(layer: nn.Module, axis: str, keep: Tensor) -> None:
    """Refuse the same arguments as `cut`, without changing anything.

    Raises:
        InputError: see `cut`.
    """
    name = type(layer).__name__
    if any(parametrize.is_parametrized(module) for module in layer.modules()):
        raise InputError(f"{name} is reparametrized: bake that in (torch.nn.utils.parametrize) before it is shrunk")
    if len(keep) != length(layer, axis):
        raise InputError(f"{name}: axis {axis!r} has {length(layer, axis)} positions, got {len(keep)}")
    if not keep.any():
        raise InputError(f"{name}: nothing would stay of axis {axis!r}: keep at least one position")
    if axis == "units" and len(set(_counts(layer, keep))) > 1:
        raise InputError(
            f"{name}: every layer and direction must keep the same number of units, got {_counts(layer, keep)}: "
            "choose the same number in each"
        )


def _counts(layer: nn.Module, keep: Tensor) -> list[int]:
    return [int(count) for count in keep.view(-1, int(layer.hidden_size)).sum(1)]  # type: ignore[arg-type]


def _replace(layer: nn.Module, name: str, dim: int, index: Tensor) -> None:
    parent, _, own = name.rpartition(".")
    owner = layer.get_submodule(parent)
    old = getattr(owner, own)
    # index_select makes a copy: a view would be saved with its whole storage.
    new = old.detach().index_select(dim, index.to(old.device))
    setattr(owner, own, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _conv(layer: Any, axis: str, count: int) -> None:
    if axis == "channels":
        layer.in_channels, layer.out_channels = (
            count * size // layer.groups for size in (layer.in_channels, layer.out_channels)
        )
        layer.groups = count
    else:
        setattr(layer, f"{axis}_channels", count * layer.groups)


def _group_norm(layer: nn.GroupNorm, _axis: str, count: int) -> None:
    layer.num_channels, layer.num_groups = count * layer.num_channels // layer.num_groups, count


def _recurrent(layer: nn.RNNBase, axis: str, count: int) -> None:
    if axis == "units":
        layer.hidden_size = count // blocks(layer)
    else:
        layer.input_size = count
    layer.flatten_parameters()


def _attention(layer: Attention, _axis: str, count: int) -> None:
    layer.num_heads, inner = count, count * layer.head_dim
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.out_features = inner
    layer.out_proj.in_features = inner


def _neurons(layer: Any, _axis: str, count: int) -> None:
    layer.linear1.out_features = layer.linear2.in_features = count


def _one(name: str) -> Callable[[Any, str, int], None]:
    return lambda layer, _axis, count: setattr(layer, name, count)


_SIZES: list[tuple[Any, Callable[[Any, str, int], None]]] = [
    ((*Conv, *ConvTransposed), _conv),
    (nn.Linear, lambda layer, axis, count: setattr(layer, f"{axis}_features", count)),
    (TurnedLinear, lambda layer, axis, count: setattr(layer, {"out": "nf", "in": "nx"}[axis], count)),
    (nn.Embedding, _one("embedding_dim")),
    (_NormBase, _one("num_features")),
    (nn.GroupNorm, _group_norm),
    (CountedLayerNorm, _one("features")),
    (nn.PReLU, _one("num_parameters")),
    (nn.RNNBase, _recurrent),
    (Attention, _attention),
    (TransformerLayer, _neurons),
]
