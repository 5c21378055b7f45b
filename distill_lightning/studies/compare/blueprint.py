"""What every run of a comparison gets in the place of one object that Python has given to all of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distill_lightning.errors import InputError, refusing
from distill_lightning.networks import build_from, recipe_of

# So many standard errors between two draws of one distribution are no chance.
_SIGMAS = 8
# Fewer numbers do not tell their distribution.
_FEW = 16


class Blueprint:
    """Makes networks like a given one, with weights drawn anew from PyTorch's random state.

    A network of this package is built again from its recipe. Of any other one a copy is made, whose layers draw their
    weights by their own ``reset_parameters``, in the order in which they were added to it: for a network of plain
    PyTorch layers that is what its constructor does, bit for bit.

    Args:
        key: of the configuration, for messages.
        network: the given one; it stays as it is.

    Raises:
        InputError: the network's weights are not such as its layers draw. They were trained, or its constructor draws
            them in another way, or they belong to no layer that could: a function must make the network then.
    """

    def __init__(self, key: str, network: nn.Module) -> None:
        self._network = network
        with torch.random.fork_rng(devices=[]), refusing(f"{key}: no copy can be made", TypeError, RuntimeError):
            # torch.manual_seed would seed the GPUs, too.
            torch.default_generator.manual_seed(0)
            fresh = dict(_values(self()))
        may_be_read = recipe_of(network) is not None
        for name, value in _values(network):
            reason = _difference(value, fresh.get(name), may_be_read=may_be_read)
            if reason:
                kind = type(network).__name__
                raise InputError(
                    f"{key}: a network object stands for fresh ones like it, and {name} of this {kind} {reason}: give "
                    f"a function that makes one, as in {key}=lambda: {kind}(...), or one that returns a copy, "
                    "lambda: copy.deepcopy(network), where every run is to begin with these weights"
                )

    def __call__(self) -> nn.Module:
        """A fresh one."""
        recipe = recipe_of(self._network)
        if recipe is not None:
            return build_from(recipe)
        network = copy.deepcopy(self._network)
        for module in network.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]  # a layer's own
        return network


class Copies:
    """Makes copies of an object as it is.

    Args:
        key: of the configuration, for messages.
        value: the object.
    """

    def __init__(self, key: str, value: Any) -> None:
        self._key, self._value = key, value

    def __call__(self) -> Any:
        """A copy.

        Raises:
            InputError: none can be made.
        """
        way_out = f"{self._key}: no run can have a copy of this {type(self._value).__name__}, give a function"
        with refusing(way_out, TypeError, RuntimeError, AttributeError):
            return copy.deepcopy(self._value)


def _values(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that have a value."""
    for named in (network.named_parameters(), network.named_buffers()):
        for name, value in named:
            if not is_lazy(value):
                yield name, value


@torch.no_grad()
def _difference(value: Tensor, fresh: Tensor | None, *, may_be_read: bool) -> str:
    """Why a value was not drawn as a fresh one is; empty: it may have been.

    Args:
        value: of the given network.
        fresh: of the one like it.
        may_be_read: whether a fresh one may have read its values from a file.
    """
    if fresh is None or fresh.shape != value.shape:
        return "is not there in a fresh one"
    own, other = value.double().cpu().flatten(), fresh.double().cpu().flatten()
    if torch.equal(own, other):
        # A constant, or a table that is computed; random numbers would be others.
        is_drawn = value.requires_grad and not may_be_read and not bool((own == own[:1]).all())
        return "is drawn by no layer's reset_parameters" if is_drawn else ""
    if not value.is_floating_point() or (bool((other == other[0]).all()) and len(own) > 1):
        return "is not what its layer begins with, as if it were trained"
    if len(own) < _FEW:
        return ""
    spread, deviation = float(other.std(correction=0)), float(own.std(correction=0))
    is_near = abs(float(own.mean() - other.mean())) <= _SIGMAS * spread * math.sqrt(2 / len(own))
    # Of a normal distribution; that of a uniform one varies less.
    is_wide = deviation > 0 and abs(math.log(deviation / spread)) <= _SIGMAS / math.sqrt(len(own))
    return "" if is_near and is_wide else "is not distributed as its layer draws it"
