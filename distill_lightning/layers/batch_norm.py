"""Forward passes that leave BatchNorm as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """Inside this context, forward passes leave BatchNorm's running statistics as they are.

    In train mode a batch is normalised by its own statistics, as usual; layers in eval mode use the running ones.

    Args:
        network: whose statistics are left as they are; its other layers are not affected.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import kept_statistics
        >>> network = nn.BatchNorm1d(1)
        >>> with kept_statistics(network):
        ...     output = network(torch.tensor([[1.0], [3.0]]))
        >>> output.detach().round(decimals=2).flatten().tolist(), network.running_mean.tolist()
        ([-1.0, 1.0], [0.0])
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.track_running_stats = True
            norm.running_mean, norm.running_var = mean, var
