"""Groups of channels found by the torch-pruning library, also for networks that decide by their data."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.axes import Conv, is_depthwise, length
from distill_lightning.compression.shrink.groups import Group, Member, shrink, tied_modules
from distill_lightning.errors import InputError

_OPAQUE = (nn.MultiheadAttention, Attention, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
_ROUNDING = 1e-3


def channel_groups_by_torch_pruning(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> list[Group]:
    """Find the channels that can be removed from a network with torch-pruning's dependency graph.

    An alternative to `channel_groups` for the same `shrink`, scores, masks and sizes. It reads the graph of
    autograd instead of the code, so branches and loops in Python do not matter. Because the library treats unknown
    operations as elementwise (a softmax over channels, for example), every group is tested: it is left out if removing
    its channels and masking their weights give different outputs on the example inputs. Prefer `channel_groups`, which
    knows its operations and needs no such test, where it works.

    Never in a group are the network's outputs; attention, RNNs, embeddings and what they read or make; parameters
    outside of layers; grouped and transposed convolutions; and layers with shared weights or parametrizations.

    Args:
        network: any network that autograd can differentiate. It is left as it was.
        example_inputs: its input, or a tuple of its inputs; one sample of any supported size is enough.

    Returns:
        The groups in the order of the forward pass; see `shrink`.

    Raises:
        InputError: torch-pruning is not installed or fails on this network, or no channel can be removed.

    Fang, Ma, Song, Mi, Wang: *DepGraph: Towards Any Structural Pruning*, https://arxiv.org/abs/2301.12900
    """
    library = _library()
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    name = type(network).__name__
    try:
        # A copy: the library sets modes and hooks, and needs gradients of everything.
        traced, inputs = copy_network(network).eval().requires_grad_(True), copy.deepcopy(inputs)  # noqa: FBT003
        order = _Order(traced)
        with torch.enable_grad():
            graph = library.DependencyGraph().build_dependency(traced, inputs, forward_fn=order.run, verbose=False)
            found = list(graph.get_all_groups(root_module_types=[*Conv, nn.Linear]))
    except Exception as error:  # assertions, attribute errors: it may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: torch-pruning cannot follow it on these example_inputs ({reason})") from error
    names = {module: path for path, module in traced.named_modules()}
    fixed = _fixed(traced)
    converted = [_convert(graph, group, names, fixed, order.places) for group in found]
    groups = [group for group in converted if group is not None and group.size > 1]
    groups = groups if _hold(traced, groups, inputs) else [g for g in groups if _hold(traced, [g], inputs)]
    if not groups:
        raise InputError(
            f"torch-pruning finds no channels in {name} that can be removed: see channel_groups_by_torch_pruning"
        )
    return sorted(groups, key=lambda group: order.places[group.name])


def _library() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise InputError(
            "torch-pruning is not installed: pip install 'distill-lightning[pruning]', or use backend='own'"
        ) from error


class _Order:
    """Runs a network, and records the order in which its layers are first called."""

    def __init__(self, network: nn.Module) -> None:
        self.places: dict[str, int] = {}
        self._names = {module: path for path, module in network.named_modules()}

    def run(self, network: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
        """The tensors that the network returns.

        Each passes through one more operation, so that the graph also ends visibly where the network returns a layer's
        output as it is, and that layer's channels are recognised as the network's outputs.
        """
        hooks = [module.register_forward_pre_hook(self._note) for module in self._names]
        try:
            output = network(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [tensor * 1 for tensor in _tensors(output) if tensor.grad_fn is not None]

    def _note(self, module: nn.Module, _: Any) -> None:
        self.places.setdefault(self._names[module], len(self.places))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)


@torch.no_grad()
def _hold(network: nn.Module, groups: Sequence[Group], inputs: Sequence[Any]) -> bool:
    """Whether removing every other channel of a network and masking their weights give the same outputs."""
    keep = {group: range(0, group.size, 2) for group in groups}
    masked, shrunk = copy_network(network), copy_network(network)
    for group, kept in keep.items():
        for name, stays in group.masks(masked, kept).items():
            masked.get_parameter(name).masked_fill_(~stays, 0)
    try:
        shrink(shrunk, keep)
        outputs = [list(_tensors(one(*copy.deepcopy(inputs)))) for one in (masked, shrunk)]
        return all(
            one.shape == other.shape and bool((one - other).norm() <= _ROUNDING * one.norm())
            for one, other in zip(*outputs, strict=True)
        )
    except (RuntimeError, ValueError):  # the shapes no longer fit
        return False


def _fixed(network: nn.Module) -> set[nn.Module]:
    """The modules whose channels stay regardless of the graph."""
    fixed = tied_modules(network)
    for module in network.modules():
        if isinstance(module, _OPAQUE):
            fixed.update(module.modules())
        elif parametrize.is_parametrized(module):
            fixed.add(module)
    return fixed


def _convert(
    graph: Any, group: Any, names: Mapping[nn.Module, str], fixed: set[nn.Module], places: Mapping[str, int]
) -> Group | None:
    """The group as this package's `Group`; ``None`` if something in it cannot or must not shrink."""
    channels: dict[tuple[str, str], Tensor] = {}
    for number in range(len(group)):
        # Its members show their channels only when they are requested one by one.
        dependency, indices, roots = group[number].dep, group[number].idxs, group[number].root_idxs
        module = dependency.target.module
        if isinstance(module, nn.Parameter) or dependency.target.type == graph.ops.OPTYPE.OUTPUT:
            return None
        if module not in names or _is_elementwise(module):
            continue  # an operation, which leads on to other layers
        axis = _axis(module, out=graph.is_out_channel_pruning_fn(dependency.handler))
        if axis is None or module in fixed or None in roots:
            return None
        along = channels.setdefault((names[module], axis), torch.full((length(module, axis),), -1))
        along[torch.tensor(indices)] = torch.tensor(roots)
    members = [Member(*place, along) for place, along in channels.items()]
    members.sort(key=lambda member: places[member.path])
    name = next(member.path for member in members if member.axis == "out")
    return Group(name, "channels", len(group[0].idxs), tuple(members))


def _is_elementwise(module: nn.Module) -> bool:
    return not list(module.parameters()) and not isinstance(module, _NormBase)


def _axis(module: nn.Module, *, out: bool) -> str | None:
    """The axis of a layer that torch-pruning cuts; ``None`` if this package has no such axis."""
    if isinstance(module, (_NormBase, nn.PReLU)):
        return "channels"
    if is_depthwise(module):
        return "channels"
    if isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1):
        return "out" if out else "in"
    return None
