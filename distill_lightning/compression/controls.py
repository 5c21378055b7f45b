"""What a compressed network has to be better than: one of its size that was never large, and one pruned at random."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distill_lightning.compression.measure import count_parameters
from distill_lightning.compression.parameters import cuda_devices
from distill_lightning.compression.recipe import changes_of, copy_network, note_change, plain_copy, rebuild
from distill_lightning.compression.schedules import Threshold
from distill_lightning.compression.steps import Prune, Step
from distill_lightning.compression.surgery import (
    Group,
    channel_groups,
    convert_attention,
    head_groups,
    neuron_groups,
    shrink,
    unit_groups,
)
from distill_lightning.errors import InputError

_TRIES = 14


def random_steps(steps: Sequence[Step]) -> list[Step]:
    """The same steps, but what is pruned is drawn.

    Raises:
        InputError: none of them prunes, or one does by a threshold.
    """
    others = [copy.deepcopy(step) for step in steps]
    pruning = [step for step in others if isinstance(step, Prune)]
    if not pruning:
        raise InputError("no step prunes: there is no criterion to compare with a random one")
    for step in pruning:
        if isinstance(step.schedule, Threshold):
            raise InputError(
                f"the threshold is one of the criterion's scores, and {step!r} would prune another amount by random "
                "ones"
            )
        step.criterion = "random"
    return others


def same_size_network(fresh: nn.Module, compressed: nn.Module, example_inputs: Any, *, seed: int) -> nn.Module:
    """A dense network with at most as many parameters as a compressed one has that are not zero.

    It gets the compressed network's structure; if that has more parameters than this (weights were pruned one by one),
    all its channels, hidden units, heads and neurons are thinned out alike until it has not. Layers whose sizes differ
    from the fresh network's are initialised anew.

    Args:
        fresh: built as the compressed network was at first, with other random weights; changed in place.
        compressed: whose size counts.
        example_inputs: see `Compressor`.
        seed: of the initialisation.

    Returns:
        The fresh network.

    Raises:
        InputError: it has nothing that can be thinned out, or even one of each is more.
    """
    target = count_parameters(plain_copy(compressed)).nonzero
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    rebuild(fresh, {"changes": changes_of(compressed), "layers": {}})
    if count_parameters(fresh).stored > target:
        _thin(fresh, target, example_inputs)
    with torch.random.fork_rng(devices=cuda_devices(fresh)):
        torch.manual_seed(seed)
        for path, module in fresh.named_modules():
            own = {f"{path}.{name}" if path else name: p for name, p in module.named_parameters(recurse=False)}
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and any(shapes.get(name) != parameter.shape for name, parameter in own.items()):
                reset()
    return fresh


def _thin(network: nn.Module, target: int, example_inputs: Any) -> None:
    low, high = 0.0, 1.0
    if _thinned(network, low, example_inputs) > target:
        raise InputError(
            f"{type(network).__name__}: {target} parameters are fewer than it has with one channel or unit everywhere: "
            "there is no dense network of this size"
        )
    for _ in range(_TRIES):
        middle = (low + high) / 2
        low, high = (middle, high) if _thinned(network, middle, example_inputs) <= target else (low, middle)
    _shrink_to(network, low, example_inputs)
    note_change(network, "sizes")


def _thinned(network: nn.Module, share: float, example_inputs: Any) -> int:
    """Parameters with this share of everything."""
    copied = copy_network(network)
    _shrink_to(copied, share, example_inputs)
    return count_parameters(copied).stored


def _shrink_to(network: nn.Module, share: float, example_inputs: Any) -> None:
    groups = _groups(network, example_inputs)
    shrink(network, {group: list(range(max(round(share * group.size), 1))) for group in groups})


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
