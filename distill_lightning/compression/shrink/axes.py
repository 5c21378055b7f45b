"""The axes along which a layer can shrink, and the tensors along each axis.

An axis is a number of positions; cutting it removes the same positions from every tensor along it:

=====================  ==============  ==========================================================
layer                  axis            positions
=====================  ==============  ==========================================================
convolution, `Linear`  ``"out"``       output channels
convolution, `Linear`  ``"in"``        input channels
`TurnedLinear`         the same        the same
grouped convolution    ``"out"``       output channels of a group, the same ones of every group
grouped convolution    ``"in"``        input channels of a group, likewise
depthwise convolution  ``"channels"``  its groups, with their one channel of the input or of the output
BatchNorm and others   ``"channels"``  its channels
GroupNorm              ``"groups"``    its groups
LayerNorm              ``"features"``  its features: see `CountedLayerNorm`
`Embedding`            ``"columns"``   its features, which leave with channels that they are added to
RNN, LSTM, GRU         ``"in"``        features of its input
RNN, LSTM, GRU         ``"units"``     hidden units: of layer 0 forward, then 0 backward, 1 forward ...
`Attention`            ``"heads"``     heads
Transformer layer      ``"neurons"``   neurons of its feed-forward network
any other module       ``"scale.0"``   the entries of its parameter ``scale`` along dimension 0
=====================  ==============  ==========================================================
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.norms import CountedLayerNorm
from distill_lightning.errors import InputError

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ConvTransposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_HERE = __name__.rpartition(".")[0]


class TurnedLinear(ABC):  # noqa: B024  # for isinstance() alone
    """The class of ``transformers.pytorch_utils.Conv1D``, GPT-2's linear layers, whether or not that is installed.

    Its weight is ``(nx, nf)``, that of `nn.Linear` turned round.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return any((k.__module__, k.__name__) == ("transformers.pytorch_utils", "Conv1D") for k in other.__mro__)


TransformerLayer = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Slice(NamedTuple):
    """One dimension of a tensor, which lies along an axis.

    Args:
        tensor: name of the tensor in the layer, dotted if it belongs to a child.
        dim: the dimension.
        positions: the position on the axis of each index along ``dim``, -1 for none; int64.
    """

    tensor: str
    dim: int
    positions: Tensor


def is_depthwise(conv: nn.Module) -> bool:
    """Whether a layer is a convolution that filters every channel separately."""
    return isinstance(conv, Conv) and conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def is_by_group(conv: nn.Module) -> bool:
    """Whether a convolution can lose groups only, because a group has but one channel of the input or of the output."""
    return isinstance(conv, Conv) and conv.groups > 1 and conv.groups in (conv.in_channels, conv.out_channels)


def slices(layer: nn.Module, axis: str) -> list[Slice]:
    """The slices along an axis of a layer; see the table above.

    Raises:
        InputError: the layer has no such axis.
    """
    return [found for found in _along(layer, axis) if _tensor(layer, found.tensor) is not None]


def length(layer: nn.Module, axis: str) -> int:
    """Number of positions of an axis.

    Raises:
        InputError: the layer has no such axis.
    """
    # A norm may have the axis and no tensor along it.
    return 1 + max(int(found.positions.max()) for found in _along(layer, axis))


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def own_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that is none of PyTorch's or of this package's layers, nor one of their kind.

    ``self.scale`` of a block, for example.
    """
    known = [kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.", _HERE))]
    if any(kind not in _CONTAINERS for kind in known) or parametrize.is_parametrized(module):
        return []
    if isinstance(module, TurnedLinear):
        return []
    return [name for name, _ in module.named_parameters(recurse=False)]


def _along(layer: nn.Module, axis: str) -> list[Slice]:
    """The slices along an axis, those of tensors that the layer was built without included."""
    for kinds, axes in _AXES:
        if isinstance(layer, kinds) and axis in axes:
            return axes[axis](layer)
    name, _, dim = axis.rpartition(".")
    if name in own_parameters(layer):
        return [Slice(name, int(dim), torch.arange(layer.get_parameter(name).shape[int(dim)]))]
    raise InputError(f"{type(layer).__name__} has no axis {axis!r} to shrink along")


def _tensor(layer: nn.Module, name: str) -> Tensor | None:
    parent, _, own = name.rpartition(".")
    return getattr(layer.get_submodule(parent), own)  # type: ignore[no-any-return]


def blocks(layer: nn.RNNBase) -> int:
    """Number of layers times directions of an RNN."""
    return layer.num_layers * (2 if layer.bidirectional else 1)


def _out(layer: Any) -> list[Slice]:
    groups = getattr(layer, "groups", 1)
    positions = torch.arange(layer.weight.shape[0] // groups).repeat(groups)
    return [Slice("weight", 0, positions), Slice("bias", 0, positions)]


def _in(layer: Any) -> list[Slice]:
    return [Slice("weight", 1, torch.arange(layer.weight.shape[1]))]


def _ungrouped(layer: Any) -> None:
    if getattr(layer, "groups", 1) != 1:
        raise InputError(f"a convolution of {layer.groups} groups cannot lose single channels: leave it out")


def _turned_out(layer: Any) -> list[Slice]:
    positions = torch.arange(layer.nf)
    return [Slice("weight", 1, positions), Slice("bias", 0, positions)]


def _turned_in(layer: Any) -> list[Slice]:
    return [Slice("weight", 0, torch.arange(layer.nx))]


def _transposed_out(layer: Any) -> list[Slice]:
    _ungrouped(layer)
    positions = torch.arange(layer.out_channels)
    return [Slice("weight", 1, positions), Slice("bias", 0, positions)]


def _transposed_in(layer: Any) -> list[Slice]:
    _ungrouped(layer)
    return [Slice("weight", 0, torch.arange(layer.in_channels))]


def _grouped(layer: Any) -> list[Slice]:
    if layer.groups == 1:
        raise InputError("only a grouped convolution has its input and output channels on one axis")
    positions = torch.arange(layer.groups).repeat_interleave(layer.out_channels // layer.groups)
    return [Slice("weight", 0, positions), Slice("bias", 0, positions)]


def _group_norm(layer: Any) -> list[Slice]:
    positions = torch.arange(layer.num_groups).repeat_interleave(layer.num_channels // layer.num_groups)
    return [Slice("weight", 0, positions), Slice("bias", 0, positions)]


def _features(layer: Any) -> list[Slice]:
    features = layer.features if isinstance(layer, CountedLayerNorm) else layer.normalized_shape[0]
    return [Slice("weight", 0, torch.arange(features)), Slice("bias", 0, torch.arange(features))]


def _columns(layer: Any) -> list[Slice]:
    return [Slice("weight", 1, torch.arange(layer.embedding_dim))]


def _norm(layer: Any) -> list[Slice]:
    positions = torch.arange(layer.num_features)
    return [Slice(name, 0, positions) for name in ("weight", "bias", "running_mean", "running_var")]


def _suffixes(layer: Any) -> list[str]:
    return ["", "_reverse"] if layer.bidirectional else [""]


def _rnn_in(layer: Any) -> list[Slice]:
    return [Slice(f"weight_ih_l0{suffix}", 1, torch.arange(layer.input_size)) for suffix in _suffixes(layer)]


def _units(layer: Any) -> list[Slice]:
    if layer.proj_size:
        raise InputError(f"an LSTM with proj_size={layer.proj_size} cannot lose hidden units: build it without")
    units, suffixes = layer.hidden_size, _suffixes(layer)
    gates = layer.weight_hh_l0.shape[0] // units
    found = []
    for number in range(layer.num_layers):
        below = torch.arange(units * len(suffixes)) + (number - 1) * units * len(suffixes)
        for direction, suffix in enumerate(suffixes):
            own = torch.arange(units) + (number * len(suffixes) + direction) * units
            end = f"_l{number}{suffix}"
            rows = own.repeat(gates)
            names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if layer.bias else [])
            found += [Slice(f"{name}{end}", 0, rows) for name in names]
            found.append(Slice(f"weight_hh{end}", 1, own))
            if number:
                found.append(Slice(f"weight_ih{end}", 1, below))
    return found


def _refuse_factored(layer: Any, names: Sequence[str]) -> None:
    for name in names:
        part = getattr(layer, name)
        if not isinstance(part, nn.Linear):
            raise InputError(
                f"{name} of {type(layer).__name__} is {type(part).__name__}, which cannot lose rows or columns: shrink "
                "it before it is factored"
            )


def _heads(layer: Any) -> list[Slice]:
    _refuse_factored(layer, ["q_proj", "k_proj", "v_proj", "out_proj"])
    positions = torch.arange(layer.num_heads).repeat_interleave(layer.head_dim)
    projections = [Slice(f"{name}_proj.{kind}", 0, positions) for name in "qkv" for kind in ("weight", "bias")]
    return [*projections, Slice("out_proj.weight", 1, positions)]


def _neurons(layer: Any) -> list[Slice]:
    _refuse_factored(layer, ["linear1", "linear2"])
    positions = torch.arange(layer.linear1.out_features)
    return [
        Slice("linear1.weight", 0, positions),
        Slice("linear1.bias", 0, positions),
        Slice("linear2.weight", 1, positions),
    ]


_AXES: list[tuple[Any, dict[str, Callable[[Any], list[Slice]]]]] = [
    (Conv, {"out": _out, "in": _in, "channels": _grouped}),
    (ConvTransposed, {"out": _transposed_out, "in": _transposed_in}),
    (nn.Linear, {"out": _out, "in": _in}),
    (TurnedLinear, {"out": _turned_out, "in": _turned_in}),
    (nn.Embedding, {"columns": _columns}),
    (_NormBase, {"channels": _norm}),
    (nn.GroupNorm, {"groups": _group_norm}),
    ((nn.LayerNorm, CountedLayerNorm), {"features": _features}),
    (nn.PReLU, {"channels": lambda layer: [Slice("weight", 0, torch.arange(layer.num_parameters))]}),
    (nn.RNNBase, {"in": _rnn_in, "units": _units}),
    (Attention, {"heads": _heads}),
    (TransformerLayer, {"neurons": _neurons}),
]
