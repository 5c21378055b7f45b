"""How a network is given inputs of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def call(network: Callable[..., Any], inputs: Any) -> Any:
    """Run a network on a batch's inputs: a dict by keyword, a tuple or list by position, anything else as it is.

    Args:
        network: that is run.
        inputs: what it reads, `distill_lightning.Batch.input` for example.

    Returns:
        What the network returns.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import call
        >>> network = nn.Bilinear(2, 3, 1)
        >>> call(network, (torch.zeros(4, 2), torch.zeros(4, 3))).shape
        torch.Size([4, 1])
        >>> call(network, {"input1": torch.zeros(4, 2), "input2": torch.zeros(4, 3)}).shape
        torch.Size([4, 1])
    """
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)
