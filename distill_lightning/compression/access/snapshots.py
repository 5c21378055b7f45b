"""A network as it was at a moment, to which it returns."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def taken_back(network: nn.Module) -> Iterator[None]:
    """If something is raised inside this context, the network is as it was before, the same objects included.

    These are its modules with their classes, attributes, hooks and modes, its parameters with ``requires_grad``, its
    buffers, and all values. It takes the memory of a copy of the network.
    """
    modules = [(module, type(module), _contents(vars(module))) for module in network.modules()]
    tensors: dict[Tensor, tuple[Tensor, bool]] = {}
    for module, _, _ in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensors[tensor] = tensor.detach().clone(), tensor.requires_grad
    try:
        yield
    except BaseException:
        for module, kind, contents in modules:
            module.__class__ = kind
            _put_back(vars(module), contents)
        with torch.no_grad():
            for tensor, (value, needs_gradient) in tensors.items():
                if tensor.shape != value.shape or tensor.dtype != value.dtype:
                    tensor.data = value
                else:
                    tensor.copy_(value)
                tensor.requires_grad_(needs_gradient)
        raise


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what is in it if it is a container, since handles of hooks refer to the container itself."""
    return {name: (value, copy.copy(value) if _is_container(value) else None) for name, value in attributes.items()}


def _put_back(attributes: dict[str, Any], contents: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, inside) in contents.items():
        if inside is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(inside)
        attributes[name] = value


def _is_container(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, set)
