"""The weights of a layer, which compression works on; biases and norms are not among them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weight_names(layer: nn.Module) -> list[str]:
    """The parameters of a layer that are its weights, without those of its children; computed ones are included.

    Linear, convolutional and embedding layers have ``weight``; recurrent layers have those of every layer and
    direction; attention has its input projections (the output projection is a separate layer). Others have none.
    """
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    own += list(layer.parametrizations) if parametrize.is_parametrized(layer) else []  # type: ignore[arg-type]
    if isinstance(layer, nn.RNNBase):
        return sorted(name for name in own if name.startswith(_RECURRENT))
    if isinstance(layer, nn.MultiheadAttention):
        return [name for name in _ATTENTION if name in own]
    simple = isinstance(layer, (nn.Linear, nn.Embedding, _ConvNd))
    return ["weight"] if simple and "weight" in own else []


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a weight's output channels: 1 for transposed convolutions, otherwise 0."""
    return int(isinstance(layer, _ConvTransposeNd))


def channel_groups(layer: nn.Module) -> int:
    """The groups of output channels of which `channel_axis` holds those of one: those of a transposed convolution."""
    return layer.groups if isinstance(layer, _ConvTransposeNd) else 1


def histogram_of(weight: Tensor, bins: int = 80) -> dict[str, Any]:
    """The distribution of a weight's entries, in plain values, with those that are zero apart.

    Returns:
        ``"zeros"``, their number; ``"low"`` and ``"high"``, the range of the other entries; and ``"counts"``, how many
        of these are in each of the equal bins of that range, of which there are none if all are zero.
    """
    flat = weight.detach().flatten().double()
    others = flat[flat != 0]
    if not len(others):
        return {"zeros": len(flat), "low": 0.0, "high": 0.0, "counts": []}
    counts, edges = np.histogram(others.cpu().numpy(), bins)
    low, high = float(edges[0]), float(edges[-1])
    return {"zeros": len(flat) - len(others), "low": low, "high": high, "counts": counts.tolist()}
