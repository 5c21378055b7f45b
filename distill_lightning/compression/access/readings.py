"""Layers whose parameters a network's code reads itself, beside or instead of calling the layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distill_lightning.compression.access.calibration import calibrating, inputs_of
from distill_lightning.compression.access.copies import copy_network


def read_from_outside(network: nn.Module, paths: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """Run a copy of a network in both modes, and see of which layers it reads a parameter while the layer is not run.

    Such a layer cannot be replaced by one without this parameter. A mode in which the network does not run on the
    example inputs shows nothing.

    Args:
        network: the network.
        paths: paths of the layers.
        example_inputs: a tensor ``(N, ...)`` that the network takes, or a tuple of its arguments.

    Returns:
        The name of the first parameter that is read, by path of the layer.
    """
    seen: dict[str, str] = {}
    watched = copy_network(network)
    for path in paths:
        layer = watched.get_submodule(path)
        layer.__class__ = _watching(type(layer), path, seen)
    for training in (False, True):
        with calibrating(watched, training=training), torch.no_grad():
            try:
                watched(*copy.deepcopy(inputs_of(example_inputs)))
            except Exception:  # noqa: S112  # what the network needs here is not known, and not asked
                continue
    return seen


def _watching(kind: type[nn.Module], path: str, seen: dict[str, str]) -> type[nn.Module]:
    """The class of a layer, which notes what is read of it from outside."""
    running: list[None] = []

    class Watched(kind):  # type: ignore[valid-type, misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            running.append(None)
            try:
                return super().forward(*inputs, **named)
            finally:
                running.pop()

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if isinstance(value, nn.Parameter) and not running:
                seen.setdefault(path, name)
            return value

    return Watched
