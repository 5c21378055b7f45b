"""Loss terms that drive weights, or groups of them, towards zero; each is a scalar with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill_lightning.compression.access.parameters import parameters_of
from distill_lightning.compression.mask.learned import HardConcrete, SoftThreshold, learned
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


def l1(network: nn.Module, paths: Iterable[str]) -> Tensor:
    r"""The sum of absolute weights, :math:`\sum |w|`."""
    return _total([wide(weight).abs().sum() for weight in parameters_of(network, paths).values()])


def group_lasso(network: nn.Module, paths: Iterable[str]) -> Tensor:
    r"""The sum over rows of the norm times the square root of the size: :math:`\sum_g \sqrt{|g|} \lVert w_g \rVert_2`.

    A row is an index of the first dimension: a filter, or the inputs of a neuron.

    Wen, Wu, Wang, Chen, Li: *Learning Structured Sparsity in Deep Neural Networks*, https://arxiv.org/abs/1608.03665
    """
    rows = [wide(weight).reshape(len(weight), -1) for weight in parameters_of(network, paths).values()]
    return _total([math.sqrt(row.shape[1]) * torch.linalg.vector_norm(row, dim=1).sum() for row in rows])


def bn_gamma(network: nn.Module) -> Tensor:
    r"""The sum of BatchNorm's absolute scales, :math:`\sum |\gamma|`.

    Raises:
        InputError: the network has no BatchNorm with a scale.
    """
    scales = [module.weight for module in network.modules() if isinstance(module, _BatchNorm) and module.affine]
    if not scales:
        raise InputError(f"bn_gamma: {type(network).__name__} has no BatchNorm with a scale: use group_lasso")
    return _total([wide(scale).abs().sum() for scale in scales])


def l0(network: nn.Module) -> Tensor:
    """The expected number of non-zero weights, over all `HardConcrete` gates."""
    gates = learned(network, HardConcrete).values()
    if not gates:
        raise InputError(f"l0: {type(network).__name__} has no gates: use it inside a LearnMask(L0(...)) phase")
    return _total([wide(mask.open_probability()).sum() * mask.size for mask in gates])


def soft_movement(network: nn.Module) -> Tensor:
    """The mean over layers of the mean sigmoid of `SoftThreshold` scores."""
    masks = learned(network, SoftThreshold).values()
    if not masks:
        raise InputError(
            f"soft_movement: {type(network).__name__} has no scores: use it inside a LearnMask(SoftMovement(...)) phase"
        )
    return torch.stack([mask.penalty() for mask in masks]).mean()


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
