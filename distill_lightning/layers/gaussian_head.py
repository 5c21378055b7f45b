"""The last layer of a network that predicts a distribution over real numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.functional.gaussian import LOG_VAR_BOUNDS


class GaussianHead(nn.Linear):
    """A linear layer to the parameters of a diagonal Gaussian: ``d`` means, then ``d`` log-variances.

    The log-variances are clamped to ``bounds`` and are 0 for every input before training. If the bounds exclude 0, they
    start 1 (or half the interval, if that is less) inside the nearer bound, because there is no gradient at a bound.

    Args:
        in_features: length of a feature.
        num_targets: ``d``, the number of targets.
        bounds: the smallest and the largest log-variance.

    Raises:
        InputError: ``num_targets`` is not positive, or the bounds are not an interval.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import GaussianHead
        >>> head = GaussianHead(4, num_targets=2)
        >>> mean, log_var = head(torch.ones(3, 4)).chunk(2, dim=1)
        >>> mean.shape, log_var.tolist()
        (torch.Size([3, 2]), [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, in_features: int, num_targets: int, *, bounds: tuple[float, float] = LOG_VAR_BOUNDS) -> None:
        if num_targets < 1:
            raise InputError(f"GaussianHead: num_targets must be at least 1, got {num_targets}")
        if not bounds[0] < bounds[1]:
            raise InputError(f"GaussianHead: bounds must be (smallest, largest) log-variance, got {bounds}")
        super().__init__(in_features, 2 * num_targets)
        self.num_targets = num_targets
        self.bounds = bounds
        with torch.no_grad():
            self.weight[num_targets:] = 0
            self.bias[num_targets:] = _inside(*bounds)

    def forward(self, feature: Tensor) -> Tensor:
        """Parameters ``(N, 2 d)`` for features ``(N, in_features)``."""
        mean, log_var = super().forward(feature).chunk(2, dim=1)
        return torch.cat([mean, log_var.clamp(*self.bounds)], dim=1)

    def means(self) -> nn.Linear:
        """A linear layer that returns only the means, with copies of their weights, for the exported student."""
        layer = nn.Linear(self.in_features, self.num_targets)
        with torch.no_grad():
            layer.weight.copy_(self.weight[: self.num_targets])
            layer.bias.copy_(self.bias[: self.num_targets])
        return layer.to(self.weight)


def _inside(low: float, high: float) -> float:
    inset = min(1.0, (high - low) / 2)
    if low < 0 < high:
        return 0.0
    return low + inset if low >= 0 else high - inset


def without_deviation(network: nn.Module) -> nn.Module:
    """A copy of a network that returns only the means of its Gaussian, ``(N, d)``, the same up to rounding.

    Args:
        network: ends in a `GaussianHead`.

    Raises:
        InputError: the network has no such head, or several.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import GaussianHead, without_deviation
        >>> network = nn.Sequential(nn.Linear(8, 4), GaussianHead(4, num_targets=2))
        >>> network(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
        >>> without_deviation(network)(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """
    heads = [name for name, module in network.named_modules() if isinstance(module, GaussianHead)]
    if len(heads) != 1:
        raise InputError(f"{type(network).__name__} has {len(heads)} GaussianHead layers where one is needed")
    head = network.get_submodule(heads[0])
    if head is network:
        return network.means()  # type: ignore[operator,no-any-return]  # the network is the head
    plain = copy.deepcopy(network)
    parent, _, name = heads[0].rpartition(".")
    setattr(plain.get_submodule(parent), name, head.means())  # type: ignore[operator]  # checked above
    for module in plain.modules():
        # The recipe of a network (distill_lightning.networks) would build it with the head.
        module.__dict__.pop("_recipe", None)
    return plain
