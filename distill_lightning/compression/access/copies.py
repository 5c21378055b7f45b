"""Copies of networks, some of whose weights may be computed from others."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy; works also for recurrent layers with computed weights, which PyTorch refuses to copy."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for weight in getattr(module, "_flat_weights", []):
            if weight is not None and not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
    copied = copy.deepcopy(network, memo)
    separate_classes(copied)
    return copied


def separate_classes(network: nn.Module) -> None:
    """Give every layer with computed weights its own class, as `parametrize` had done before a deep copy.

    The class has the weights as properties, and removing a parametrization deletes them there: from all of its copies.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, body)
