"""Equal weight ranges of the channels between two layers, which makes a network easier to quantize."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from distill_lightning.compression.access.calibration import calibrating, inputs_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import split_path
from distill_lightning.compression.shrink.groups import tied_modules
from distill_lightning.errors import InputError, in_a_line

Pairs = list[tuple[str, str]]

TOLERANCE = 1e-5
"""The largest difference of outputs that count as the same, as a share of the largest output."""

# Operations that commute with a positive factor of a channel.
_HOMOGENEOUS_MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_HOMOGENEOUS_FUNCTIONS = (torch.relu, F.relu, torch.flatten, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_HOMOGENEOUS_METHODS = ("relu", "flatten", "relu_")


# Finding consecutive layers


def _layers_in_order(network: nn.Module) -> tuple[list[tuple[str, str, list[fx.Node]]], set[nn.Module]]:
    """Pairs of modules in which only the second one reads the first one's output.

    Returns:
        Both names of each pair and the nodes between them; and the modules whose weights the network reads itself.
    """
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # tracing may raise anything, because the network's own code runs on proxies
        reason = in_a_line(error, at_most=120)
        raise InputError(
            f"{type(network).__name__} cannot be traced ({reason}): name the pairs of layers yourself"
        ) from error
    attributes = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    read = {network.get_submodule(split_path(name)[0]) for name in attributes}
    return list(_pairs_in(graph, dict(network.named_modules()))), read


def _pairs_in(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, list[fx.Node]]]:
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


def equalisable_pairs(network: nn.Module) -> Pairs:
    """The names of pairs of layers with nothing but ReLU, pooling and similar operations between them.

    There must be no BatchNorm between them, no hook that sees or changes what passes between them, and no other place
    that reads their weights.

    Raises:
        InputError: the network cannot be traced, because its forward depends on data.
    """
    modules = dict(network.named_modules())
    # A weight that is used at several places cannot be scaled for one of them.
    found, read = _layers_in_order(network)
    tied = tied_modules(network) | read
    return [
        (first, second)
        for first, second, between in found
        if _plain(modules[first]) and _plain(modules[second]) and not {modules[first], modules[second]} & tied
        if _keeps_channels_apart(modules[first], modules[second], between, modules)
        if not any(_is_hooked(modules[path]) for path in (first, second, *_modules_of(between)))
    ]


def _modules_of(nodes: Iterable[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "call_module"]


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which may do anything to what goes through it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001  # there is no public name


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """A lower-case name of what a node does."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).lower()


def _keeps_channels_apart(
    first: nn.Module, second: nn.Module, between: list[fx.Node], modules: dict[str, nn.Module]
) -> bool:
    """Whether the first layer's output channels are the second one's input channels, or blocks of its inputs."""
    operations = [_operation(node, modules) for node in between]
    flattening = [node for node, name in zip(between, operations, strict=True) if name == "flatten"]
    if isinstance(first, nn.Linear):
        # The channels are the last dimension, which pooling and flattening mix.
        return isinstance(second, nn.Linear) and not any("pool" in name or name == "flatten" for name in operations)
    if not all(_flattened(node, modules) == (1, -1) for node in flattening):
        # Only all dimensions but that of the samples are blocks of channels.
        return False
    return bool(flattening) == isinstance(second, nn.Linear)


def _flattened(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Any, Any]:
    """The first and the last dimension that a node flattens into one."""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        return layer.start_dim, layer.end_dim
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return given.get("start_dim", 0), given.get("end_dim", -1)


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


@torch.no_grad()
def pairs_that_keep_outputs(network: nn.Module, pairs: Pairs, example_inputs: Any) -> Pairs:
    """Those of some pairs whose channels can be scaled without another output: a trial on a copy, with any factors.

    Args:
        network: it is left as it is.
        pairs: names of pairs of layers.
        example_inputs: a tensor, or a tuple of arguments.
    """
    trial = copy_network(network)

    def outputs() -> list[Tensor]:
        torch.manual_seed(0)
        found = tree_leaves(trial(*inputs_of(example_inputs)))
        return [
            part.clone() for part in found if isinstance(part, Tensor) and part.is_floating_point() and part.numel()
        ]

    def keeps(first: Any, second: Any) -> bool:
        channels = len(first.weight)
        if _by_input_channel(second, channels) is None:
            return False
        changed = [value for value in (first.weight, first.bias, second.weight) if value is not None]
        before = [value.clone() for value in changed]
        # Powers of two change no digit.
        signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        _divide(first, second, (2.0**signs).to(first.weight))
        found = outputs()
        for value, whole in zip(changed, before, strict=True):
            value.copy_(whole)
        return all(
            float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max())
            for one, other in zip(found, wanted, strict=True)
        )

    with calibrating(trial):
        wanted = outputs()
        return [pair for pair in pairs if keeps(*map(trial.get_submodule, pair))]


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
    _divide(first, second, factor)
    return float((factor - 1).abs().max())


def _divide(first: Any, second: Any, factor: Tensor) -> None:
    """Divide a layer's output channels by factors, and multiply what the next one makes of them."""
    first.weight.div_(factor.reshape(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(factor)
    if isinstance(second, nn.Linear):
        second.weight.mul_(factor.repeat_interleave(second.in_features // len(factor)))
    elif second.groups == 1:
        second.weight.mul_(factor.reshape(1, -1, *[1] * (second.weight.ndim - 2)))
    else:
        second.weight.mul_(_of_grouped(factor, second))


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
