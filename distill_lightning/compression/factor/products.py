"""Dense layers with the products of factors, which return the same as the factored layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.compression.factor.convolutions import ConvChain
from distill_lightning.compression.factor.layers import LowRankEmbedding, LowRankLinear, TrainEmbedding, TrainLinear


@torch.no_grad()
def write_product(layer: nn.Module, factored: nn.Module) -> None:
    """Write the product of factors into the dense layer that they replace, in place.

    Args:
        layer: the dense layer.
        factored: what `factorize` has made of it; it is multiplied in float64 and left as it is.
    """
    exact: Any = copy.deepcopy(factored).double()
    values = dict(exact.named_parameters(recurse=False))
    if isinstance(factored, LowRankLinear):
        values = {"weight": exact[1].weight @ exact[0].weight, "bias": exact[1].bias}
    elif isinstance(factored, LowRankEmbedding):
        values = {"weight": exact[0].weight @ exact[1].weight.T}
    elif isinstance(factored, TrainLinear):
        unit = torch.eye(exact.in_features, dtype=torch.float64, device=exact.cores[0].device)
        values = {"weight": (exact(unit) - exact(torch.zeros_like(unit))).T, "bias": exact.bias}
    elif isinstance(factored, TrainEmbedding):
        values = {"weight": exact(torch.arange(exact.num_embeddings, device=exact.cores[0].device))}
    elif isinstance(factored, ConvChain):
        values = {"weight": _kernel(exact), "bias": exact[-1].bias}
    else:
        values |= {name: getattr(exact, f"{name}_left") @ getattr(exact, f"{name}_right") for name in exact.ranks}
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.copy_(values[name])


def _kernel(chain: ConvChain) -> Tensor:
    """The kernel of the convolution that a chain equals."""
    stages = [stage for stage in chain if isinstance(stage, nn.Conv2d)]
    high, wide = (max(stage.kernel_size[axis] for stage in stages) for axis in range(2))
    # The answers to a single one in each channel are the kernel, mirrored.
    ones = torch.eye(chain.in_channels, dtype=torch.float64, device=stages[0].weight.device)
    answer = F.pad(ones[:, :, None, None], (wide - 1, wide - 1, high - 1, high - 1))
    for stage in stages:
        answer = F.conv2d(answer, stage.weight, groups=stage.groups)
    return answer.flip(2, 3).transpose(0, 1)
