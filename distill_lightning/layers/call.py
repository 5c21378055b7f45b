"""How a network is given inputs of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def call(network: Callable[..., Any], inputs: Any) -> Any:
    """Run a network on a batch's inputs: a dict by keyword, a tuple or list by position, anything else as it is."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)
