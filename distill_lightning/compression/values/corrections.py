"""Methods without training that make a network easier to quantize, or correct it afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from distill_lightning.compression.access.calibration import inputs_of, watching
from distill_lightning.compression.shrink.groups import tied_modules
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import eval_mode

Pairs = list[tuple[str, str]]

# Operations that commute with a positive factor of a channel.
_HOMOGENEOUS_MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_HOMOGENEOUS_FUNCTIONS = (torch.relu, F.relu, torch.flatten, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_HOMOGENEOUS_METHODS = ("relu", "flatten", "relu_")


# Finding consecutive layers


def _layers_in_order(network: nn.Module) -> Iterator[tuple[str, str, list[fx.Node]]]:
    """Pairs of modules in which only the second one reads the first one's output.

    Yields both names and the nodes between them.
    """
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # tracing may raise anything, because the network's own code runs on proxies
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{type(network).__name__} cannot be traced ({reason}): name the pairs of layers yourself"
        ) from error
    modules = dict(network.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    for node in calls:
        between: list[fx.Node] = []
        last = node
        while len(last.users) == 1:
            following = next(iter(last.users))
            if following.op == "call_module":
                if targets.count(str(node.target)) == targets.count(str(following.target)) == 1:
                    yield str(node.target), str(following.target), between
                if not isinstance(modules[str(following.target)], _HOMOGENEOUS_MODULES):
                    break
            elif not _keeps_factors(following):
                break
            between = [*between, following]
            last = following


def _keeps_factors(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _HOMOGENEOUS_FUNCTIONS
    return node.op == "call_method" and node.target in _HOMOGENEOUS_METHODS


# Cross-layer equalisation


def equalisable_pairs(network: nn.Module) -> Pairs:
    """The names of pairs of layers with nothing but ReLU, pooling and similar operations between them.

    There must be no BatchNorm between them, and no shared weights.

    Raises:
        InputError: the network cannot be traced, because its forward depends on data.
    """
    modules = dict(network.named_modules())
    # A weight that is used at several places cannot be scaled for one of them.
    tied = tied_modules(network)
    return [
        (first, second)
        for first, second, between in _layers_in_order(network)
        if _plain(modules[first]) and _plain(modules[second]) and not {modules[first], modules[second]} & tied
        if _keeps_channels_apart(modules[first], modules[second], [_operation(node, modules) for node in between])
    ]


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """A lower-case name of what a node does."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).lower()


def _keeps_channels_apart(first: nn.Module, second: nn.Module, between: list[str]) -> bool:
    """Whether the first layer's output channels are the second one's input channels, or blocks of its inputs."""
    flattens = [name for name in between if name == "flatten"]
    if isinstance(first, nn.Linear):
        # The channels are the last dimension, which pooling and flattening mix.
        return isinstance(second, nn.Linear) and not any("pool" in name or name == "flatten" for name in between)
    return bool(flattens) == isinstance(second, nn.Linear)


def _plain(layer: nn.Module) -> bool:
    return _is_float(layer) and not isinstance(layer, _ConvTransposeNd)


def _is_float(layer: nn.Module | None) -> TypeGuard[nn.Linear | _ConvNd]:
    """Whether a layer's weight can be changed; that of a quantized layer is computed."""
    return isinstance(layer, (_ConvNd, nn.Linear)) and not parametrize.is_parametrized(layer)


@torch.no_grad()
def equalise(network: nn.Module, *, pairs: Pairs | None = None, sweeps: int = 40) -> int:
    r"""Equalise the weight ranges of the channels between two layers, in place; the outputs stay the same.

    Each output channel of the first layer is divided by :math:`s_i = \sqrt{r^1_i / r^2_i}`, and the second layer's
    weights for it are multiplied by :math:`s_i`, where :math:`r` are the largest absolute weights. Only positively
    homogeneous functions may lie between them. Chains need several sweeps over all pairs until the ranges no longer
    change. Returns the number of sweeps.

    Nagel, van Baalen, Blankevoort, Welling: *Data-Free Quantization Through Weight Equalization and Bias Correction*,
    https://arxiv.org/abs/1906.04721
    """
    pairs = equalisable_pairs(network) if pairs is None else pairs
    modules, tied = dict(network.named_modules()), tied_modules(network)
    for first, second in pairs:
        if first not in modules or second not in modules or not (_plain(modules[first]) and _plain(modules[second])):
            raise InputError(f"cannot equalise {first!r} and {second!r}: both must be linear or conv layers in float")
        if {modules[first], modules[second]} & tied:
            raise InputError(f"cannot equalise {first!r} and {second!r}: one shares its weight with another layer")
    for sweep in range(1, sweeps + 1):
        change = max((_equalise(modules[first], modules[second], first, second) for first, second in pairs), default=0)
        if change < 1e-7:
            return sweep
    return sweeps


def _equalise(first: Any, second: Any, *names: str) -> float:
    """Equalise one pair, and return the largest deviation of a factor from 1."""
    reach = first.weight.abs().flatten(1).amax(dim=1)
    channels = len(reach)
    consumed = _by_input_channel(second, channels)
    if consumed is None:
        raise InputError(
            f"cannot equalise {names[0]!r} with {channels} outputs and {names[1]!r}, which has other inputs"
        )
    other = consumed.abs().amax(dim=1)
    # A dead channel stays as it is.
    factor = torch.where((reach > 0) & (other > 0), (reach / other).sqrt(), 1)
    first.weight.div_(factor.reshape(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(factor)
    if isinstance(second, nn.Linear):
        second.weight.mul_(factor.repeat_interleave(second.in_features // channels))
    elif second.groups == 1:
        second.weight.mul_(factor.reshape(1, -1, *[1] * (second.weight.ndim - 2)))
    else:
        second.weight.mul_(_of_grouped(factor, second))
    return float((factor - 1).abs().max())


def _by_input_channel(layer: Any, channels: int) -> Tensor | None:
    """A layer's weights for each of its input channels, ``(channels, ...)``; ``None`` if it has other channels."""
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        if layer.in_features % channels:
            return None
        # Flattened features: every channel is a block of inputs.
        return weight.reshape(len(weight), channels, -1).transpose(0, 1).flatten(1)
    if layer.in_channels != channels:
        return None
    grouped = weight.flatten(2).reshape(layer.groups, len(weight) // layer.groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(channels, -1)


def _of_grouped(factor: Tensor, layer: _ConvNd) -> Tensor:
    """Factors of input channels, in the shape of a grouped convolution's weight ``(out, in / groups, 1, ...)``."""
    per_group = factor.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return per_group.reshape(*layer.weight.shape[:2], *[1] * (layer.weight.ndim - 2))


# Bias correction


@torch.no_grad()
def correct_biases(network: nn.Module, reference: nn.Module, batches: Sequence[Any]) -> list[str]:
    """Correct the biases of a quantized network, in place, so that every layer's mean output is the float network's.

    Layers are corrected in the order in which they first run, because each changes the inputs of the next ones. Both
    networks run in eval mode. Layers without a bias are left alone. Returns the names of the layers that were
    corrected.
    """
    if not batches:
        raise InputError("bias correction needs at least one batch of training inputs")
    wanted = _mean_outputs(reference, _with_bias(reference), batches)
    layers = _with_bias(network)
    if not wanted:
        raise InputError(
            f"{type(reference).__name__} has no linear or conv layer with a bias to correct: leave bias_correction out"
        )
    if wanted.keys() - layers.keys():
        raise InputError("bias correction needs two networks with the same linear or conv layers, with biases")
    for name, mean in wanted.items():
        found = _mean_outputs(network, {name: layers[name]}, batches)
        bias: Any = layers[name].bias
        bias.add_((mean - found[name]).to(bias.dtype))
    return list(wanted)


def _with_bias(network: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and module.bias is not None
    }


def _mean_outputs(network: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The mean of each layer's output channels over the batches, in float64, in the order of their first calls."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        unbatched = output.ndim == 1 or (isinstance(layer, _ConvNd) and output.ndim == layer.weight.ndim - 1)
        channels = -1 if isinstance(layer, nn.Linear) else int(not unbatched)
        rows = wide(output).double().movedim(channels, -1).flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.reshape(-1, rows.shape[-1]).sum(dim=0)
        counts[name] = counts.get(name, 0) + rows.numel() // rows.shape[-1]

    with watching(layers, count, outputs=True), eval_mode(network):
        for batch in batches:
            network(*inputs_of(batch))
    return {name: total / counts[name] for name, total in sums.items()}
