"""The last layer of a network that predicts a distribution over real numbers."""

from __future__ import annotations

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
