"""Counting parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Parameters(NamedTuple):
    """How many parameters there are; tied ones count once, buffers do not count.

    Attributes:
        stored: all entries.
        nonzero: the entries that are not zero.
    """

    stored: int
    nonzero: int


def count_parameters(network: nn.Module) -> Parameters:
    """Count all parameters, trained or frozen."""
    parameters = list(network.parameters())
    return Parameters(sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters))
