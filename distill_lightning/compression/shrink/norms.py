"""Layer normalisation that has lost features, and still counts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.compression.access.hooks import carry_hooks, has_state_hooks


class CountedLayerNorm(nn.Module):
    r"""Layer normalisation over ``features`` of what were ``counted`` features; the others count as zeros.

    .. math::

        m = \frac1n \sum_{i \le k} x_i, \qquad
        v = \frac1n \Big(\sum_{i \le k} (x_i - m)^2 + (n - k)\, m^2\Big), \qquad
        y_i = w_i \frac{x_i - m}{\sqrt{v + \epsilon}} + b_i

    with :math:`n` counted features of which :math:`k` are left. So a network without some of its features computes what
    it computed with these at zero, which plain layer normalisation of the features that are left does not.

    Args:
        features: number of features, ``k``.
        counted: ``n``, at least as many.
        dim: the dimension along which they lie: -1, or 1 for feature maps ``(N, C, H, W)``.
        eps: added to the variance.
        affine: whether there is a weight.
        bias: whether there is a bias beside the weight.

    Shape:
        Any with ``features`` along ``dim``; the output has the same.

    Example:
        >>> import torch
        >>> from distill_lightning.compression.shrink.norms import CountedLayerNorm
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> CountedLayerNorm(2, counted=4)(x[:, :2]).allclose(torch.nn.LayerNorm(4)(x)[:, :2])
        True
    """

    def __init__(
        self, features: int, *, counted: int, dim: int = -1, eps: float = 1e-5, affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.features, self.counted, self.dim, self.eps = features, counted, dim, eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine and bias else None

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.features}, counted={self.counted}, dim={self.dim}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; see the class."""
        dim, n = self.dim, self.counted
        mean = x.sum(dim, keepdim=True) / n
        centred = x - mean
        gone = (n - self.features) * mean.square()
        variance = (centred.square().sum(dim, keepdim=True) + gone) / n
        y = centred * torch.rsqrt(variance + self.eps)
        shape = (-1,) if dim == -1 else (-1, *[1] * (x.dim() - 2))
        if self.weight is not None:
            y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def counted_dim(norm: nn.Module) -> int | None:
    """The dimension that a layer normalises over, -1 or 1; ``None`` if it computes something else, too."""
    if isinstance(norm, CountedLayerNorm):
        return norm.dim
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or _has_hooks(norm):
        return None
    if type(norm).forward is nn.LayerNorm.forward:
        return -1
    with torch.no_grad():
        return next((dim for dim in (-1, 1) if _is_over(norm, dim)), None)


def _is_over(norm: nn.LayerNorm, dim: int) -> bool:
    size = norm.normalized_shape[0]
    x = torch.arange(12.0 * size).sin().view(2, size, 2, 3).movedim(1, dim)
    x = x if norm.weight is None else x.to(norm.weight)
    wanted = F.layer_norm(x.movedim(dim, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps).movedim(-1, dim)
    try:
        found = norm(x)
    except (RuntimeError, ValueError, AssertionError):  # the features lie elsewhere
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def _has_hooks(module: nn.Module) -> bool:
    called = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001
    return bool(called) or has_state_hooks(module)


def count_features(network: nn.Module, path: str) -> CountedLayerNorm:
    """Replace a network's `nn.LayerNorm` by a `CountedLayerNorm` with the same parameters, in place."""
    norm: Any = network.get_submodule(path)
    if isinstance(norm, CountedLayerNorm):
        return norm
    counted = _counted(norm, {"features": norm.normalized_shape[0], "counted": norm.normalized_shape[0]})
    counted.weight, counted.bias = norm.weight, norm.bias
    carry_hooks(norm, counted)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # noqa: SLF001  # every name of a shared layer
            if child is norm:
                setattr(parent, name, counted)
    return counted


def rebuild_norm(norm: nn.LayerNorm | CountedLayerNorm, sizes: Mapping[str, Any]) -> CountedLayerNorm:
    """A `CountedLayerNorm` of the described sizes in place of a norm, with zeros for weights."""
    counted = _counted(norm, sizes)
    for name, parameter in counted.named_parameters():
        old = norm.get_parameter(name)
        setattr(counted, name, nn.Parameter(old.detach().new_zeros(parameter.shape), old.requires_grad))
    return counted


def _counted(norm: Any, sizes: Mapping[str, Any]) -> CountedLayerNorm:
    dim = counted_dim(norm)
    return CountedLayerNorm(
        **sizes, dim=-1 if dim is None else dim, eps=norm.eps, affine=norm.weight is not None,
        bias=norm.bias is not None,
    ).train(norm.training)  # fmt: skip
