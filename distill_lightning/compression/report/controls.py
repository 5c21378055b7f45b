"""Controls for a compressed network: one of its size that was never large, and one that is pruned at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.mask.lottery import LISTS, reinitialize, reset_layer
from distill_lightning.compression.shrink.attention import convert_attention
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import Group, shrink
from distill_lightning.compression.shrink.recurrent import in_blocks, unit_groups
from distill_lightning.compression.shrink.transformer import head_groups, neuron_groups
from distill_lightning.compression.steps import Step
from distill_lightning.compression.structure.changes import (
    NOTHING,
    changes_of,
    note_change,
    plain_copy,
    rebuild_structure,
)
from distill_lightning.compression.values.quantizer import WeightQuantizer
from distill_lightning.errors import InputError
from distill_lightning.networks import build_from, recipe_of
from distill_lightning.networks.provenance import without_weights
from distill_lightning.networks.weights import load_strictly

_TRIES = 14


def random_steps(steps: Sequence[Step]) -> list[Step]:
    """The same steps, but with random choices of what is pruned.

    Raises:
        InputError: none of them prunes, or one prunes by a threshold or by learned gates, which fix no amount.
    """
    at_random = [step.at_random() for step in steps]
    if not any(at_random):
        raise InputError("no step prunes: there is no criterion to compare with a random one")
    return [other or step for step, other in zip(steps, at_random, strict=True)]


def same_size_network(fresh: nn.Module, compressed: nn.Module, example_inputs: Any, *, seed: int) -> nn.Module:
    """A dense network with at most as many parameters as a compressed one has left after pruning.

    It gets the compressed network's structure; if that has more parameters than this (weights were pruned one by one),
    all its channels, hidden units, heads and neurons are thinned out by the same share until it has not. All weights
    are drawn anew, also where the fresh network has trained ones: by the network's own initialisation, if a factory of
    this package made it, and by ``reset_parameters`` of each layer whose size has changed; else of all layers.

    Args:
        fresh: built like the compressed network before its compression; changed in place.
        compressed: the network whose size counts, without weights that are zero (biases and padding rows count). Of
            quantized weights those count that are not zero before rounding, so pass it with its quantizers: once they
            are baked, pruned zeros cannot be recognised.
        example_inputs: see `Compressor`.
        seed: seed of the initialisation.

    Returns:
        The fresh network.

    Raises:
        InputError: it has nothing that can be thinned out, even one of each is more, or a module with parameters of its
            own cannot initialise them.
    """
    target = _unpruned(compressed)
    is_drawn = _draw(fresh, seed=seed)
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    rebuild_structure(fresh, {**NOTHING, "changes": changes_of(compressed)})
    if count_parameters(fresh).stored > target:
        _thin(fresh, target, example_inputs)
    changed = _layers_of(fresh, {name for name, p in fresh.named_parameters() if shapes.get(name) != p.shape})
    reinitialize(fresh, seed=seed, init=(lambda layer: _reset(layer, changed)) if is_drawn else None)
    return fresh


def _draw(network: nn.Module, *, seed: int) -> bool:
    """Give a network the weights that its factory draws; returns whether it has a factory."""
    known = without_weights(recipe_of(network))
    if known is None:
        return False
    with torch.random.fork_rng(devices=cuda_devices(network)):
        torch.manual_seed(seed)
        load_strictly(network, build_from(known).state_dict(), source="its own factory")
    return True


def _layers_of(network: nn.Module, names: Set[str]) -> set[nn.Module]:
    """The layers that have some parameters; parameters in a list belong to the layer that holds the list."""
    found = set()
    for path in {name.rpartition(".")[0] for name in names}:
        layer = network.get_submodule(path)
        found.add(network.get_submodule(path.rpartition(".")[0]) if isinstance(layer, LISTS) else layer)
    return found


def _reset(layer: nn.Module, changed: Set[nn.Module]) -> None:
    if layer in changed:
        reset_layer(layer)


def _unpruned(network: nn.Module) -> int:
    """Parameters without the weights that masks have set to zero; quantized ones as they are before rounding."""
    copied = copy_network(network).eval()
    computed = [module for module in copied.modules() if parametrize.is_parametrized(module)]
    for layer in computed:
        weights: Any = layer.parametrizations
        for name in [name for name, entries in weights.items() if _is_quantized(entries)]:
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    plain = plain_copy(copied)
    matrices = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    # A row of padding is zero from the beginning; one that is tied to an output layer counts once.
    padding = {
        id(layer.weight): layer.weight[layer.padding_idx]
        for layer in plain.modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    }
    return count_parameters(plain).stored - _zeros(matrices) + _zeros(padding.values())


def _is_quantized(entries: Iterable[nn.Module]) -> bool:
    return any(isinstance(entry, WeightQuantizer) for entry in entries)


def _zeros(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors)


def _thin(network: nn.Module, target: int, example_inputs: Any) -> None:
    low, high = 0.0, 1.0
    if _thinned(network, low, example_inputs) > target:
        raise InputError(
            f"{type(network).__name__}: {target} parameters are fewer than it has with one of everything that can be "
            f"thinned out ({_kinds(network, example_inputs)}): there is no dense network of this size"
        )
    for _ in range(_TRIES):
        middle = (low + high) / 2
        low, high = (middle, high) if _thinned(network, middle, example_inputs) <= target else (low, middle)
    _shrink_to(network, low, example_inputs)
    note_change(network, "sizes")


def _thinned(network: nn.Module, share: float, example_inputs: Any) -> int:
    """The number of parameters with this share of everything."""
    copied = copy_network(network)
    _shrink_to(copied, share, example_inputs)
    return count_parameters(copied).stored


def _shrink_to(network: nn.Module, share: float, example_inputs: Any) -> None:
    groups = _groups(network, example_inputs)
    shrink(network, {group: _first(network, group, share) for group in groups})


def _first(network: nn.Module, group: Group, share: float) -> list[int]:
    """The first indices of a group; for hidden units those of every layer and direction, which keep equally many."""
    if group.kind != "units":
        return list(range(max(round(share * group.size), 1)))
    rnn = cast("nn.RNNBase", network.get_submodule(group.name))
    kept = range(max(round(share * rnn.hidden_size), 1))
    return in_blocks(network, group, [kept] * (group.size // rnn.hidden_size))


def _kinds(network: nn.Module, example_inputs: Any) -> str:
    """The kinds of units that can be thinned out, in words."""
    return ", ".join(dict.fromkeys(group.kind for group in _groups(network, example_inputs)))


def _groups(network: nn.Module, example_inputs: Any) -> list[Group]:
    kinds = {type(module) for module in network.modules()}

    def has(*wanted: type) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    groups: list[Group] = []
    if has(nn.MultiheadAttention):
        convert_attention(network)
    if has(nn.RNNBase):
        groups += unit_groups(network, example_inputs)
    if has(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        groups += [*head_groups(network), *neuron_groups(network)]
    if not groups:
        groups = channel_groups(network, example_inputs)
    return groups
