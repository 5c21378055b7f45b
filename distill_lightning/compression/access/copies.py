"""Copies of networks, some of whose weights may be computed from others."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.hooks import HOOKS


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy, also of recurrent layers with computed weights, which PyTorch refuses to copy.

    A hook that is a method of something outside the network, a `LightningModule` for example, stays a method of that;
    one of a module of the network becomes that of the module's copy.
    """
    memo: dict[int, Any] = {id(owner): owner for owner in _owners_outside(network)}
    for module in network.modules():
        for weight in getattr(module, "_flat_weights", []):
            if weight is not None and not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
    copied = copy.deepcopy(network, memo)
    separate_classes(copied)
    return copied


def _owners_outside(network: nn.Module) -> Iterator[object]:
    """The objects whose methods are hooks, but for those that the network itself holds."""
    own = {id(value) for module in network.modules() for value in (module, *vars(module).values())}
    for module in network.modules():
        for hooks in HOOKS:
            for hook in vars(module).get(hooks, {}).values():
                owner = getattr(_called(hook), "__self__", None)
                if owner is not None and id(owner) not in own:
                    yield owner


def _called(hook: Any) -> Any:
    """What a hook calls, which may have some of its arguments already."""
    # PyTorch wraps some hooks of state dicts.
    hook = getattr(hook, "hook", hook)
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def separate_classes(network: nn.Module) -> None:
    """Give every layer with computed weights its own class, as `parametrize` had done before a deep copy.

    The class has the weights as properties, and removing a parametrization deletes them there: from all of its copies.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, body)
