r"""Pruning single layers by the exact second order of their own output.

For a layer with weight rows :math:`w` and inputs :math:`x` the error of its output,

.. math:: \frac{1}{2} \, \mathrm{mean}_x \sum_{rows} (w' x - w x)^2,

is quadratic, and its Hessian :math:`H = \mathrm{mean}(x x^T)` the same for every row. This is for linear layers and
convolutions (unfolded, every group with its own Hessian); parts of recurrent and attention layers are not modules.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import Batches
from distill_lightning.compression.access.moments import input_moments
from distill_lightning.compression.access.parameters import parameters_of, split_path
from distill_lightning.compression.mask.masks import Masks, lowest
from distill_lightning.compression.mask.selection import Granularity
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


def layer_hessians(network: nn.Module, paths: Iterable[str], batches: Batches) -> dict[str, Tensor]:
    """The `input_moments` of the layers of some weights, by the weights' paths.

    Raises:
        InputError: a path belongs to another kind of layer, or to one that does not run as a module.
    """
    return input_moments(network, {path: _layer_of(network, path) for path in parameters_of(network, paths)}, batches)


def obs(network: nn.Module, paths: Iterable[str], batches: Batches, *, damping: float = 0.01) -> dict[str, Tensor]:
    r"""Optimal Brain Surgeon within the layer: :math:`w_q^2 / (2 [H^{-1}]_{qq})`.

    This is the rise of the layer's error without one weight when the others of its row are adjusted. ``damping`` is
    added to the Hessian's diagonal, as a multiple of its mean.

    Hassibi, Stork: *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*, NIPS 1992
    """
    weights = parameters_of(network, paths)
    found = layer_hessians(network, weights, batches)
    return {
        path: _scored(weight, 1 / inverse(found[path], damping=damping).diagonal(dim1=1, dim2=2))
        for path, weight in weights.items()
    }


def inverse(hessian: Tensor, *, damping: float = 0.01) -> Tensor:
    """The inverse of damped Hessians.

    Args:
        hessian: ``(G, D, D)``.
        damping: added to the diagonal, as a multiple of its mean.

    Returns:
        ``(G, D, D)``, symmetric.

    Raises:
        InputError: the damping is negative, or a Hessian is singular in spite of it.
    """
    if damping < 0:
        raise InputError(f"damping must not be negative, got {damping}")
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    damped = hessian + damping * diagonal.mean(1)[:, None, None] * eye
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.any():
        raise InputError(
            f"the second moments of a layer's inputs are singular with damping={damping}: raise it, or give more data"
        )
    return torch.cholesky_inverse(factor)


@torch.no_grad()
def sweep(
    weight: Tensor,
    hessian: Tensor,
    *,
    amount: float | None = None,
    granularity: str = "weight",
    mask: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """SparseGPT: prune a layer column by column, and compensate for each in the columns that follow.

    The mask is chosen block by block, from weights that have been adjusted until then, or given.

    Frantar, Alistarh: *SparseGPT*, https://arxiv.org/abs/2301.00774

    Args:
        weight: ``(O, ...)``, the weight of a linear layer or a convolution; its rows belong evenly to the groups.
        hessian: ``(G, D, D)``, from `layer_hessians`.
        amount: share of pruned weights, in ``[0, 1]``: exactly ``round(amount * weights)``.
        granularity: ``"weight"``, or ``"2:4"`` for 2 of every 4 consecutive columns of a row, without an amount.
        mask: bool, in the weight's shape, True where a weight stays; instead of amount and granularity.
        damping: added to the Hessian's diagonal, as a multiple of its mean.
        block: number of columns whose effect on the rest is summed before it is applied; it changes the choice, not the
            error.

    Returns:
        The new weight, in the type and shape of the old one, and its mask.

    Raises:
        InputError: not exactly one of amount, n:m and mask is given, or the columns are not a multiple of m; see
            also `inverse`.
    """
    unit = Granularity.parse(granularity)
    groups, columns = hessian.shape[:2]
    _check_sweep(unit, amount, mask, columns)
    if unit.kind == "n:m":
        block = max(block // unit.second, 1) * unit.second
    rows = wide(weight).reshape(groups, -1, columns).clone()
    kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.reshape(rows.shape).clone()
    # Row q of this factor is, up to its scale, row q of the inverse Hessian of the columns from q on.
    factor = torch.linalg.cholesky(inverse(hessian.to(rows), damping=damping), upper=True)
    scale = factor.diagonal(dim1=1, dim2=2)
    for first in range(0, columns, block):
        end = min(first + block, columns)
        if amount is not None:
            # Counted from the beginning, so that rounding errors of the blocks do not add up.
            count = round(amount * groups * rows.shape[1] * end) - int((~kept).sum())
            scores = (rows[:, :, first:end] / scale[:, None, first:end]).square()
            kept[:, :, first:end] = ~lowest(scores.flatten(), count).view_as(scores)
        errors = torch.zeros_like(rows[:, :, first:end])
        for column in range(first, end):
            if unit.kind == "n:m" and column % unit.second == 0:
                following = slice(column, column + unit.second)
                scores = (rows[:, :, following] / scale[:, None, following]).square()
                best = scores.argsort(dim=-1, descending=True, stable=True)[..., : unit.first]
                kept[:, :, following] = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, value=True)
            removed = rows[:, :, column].masked_fill(kept[:, :, column], 0)
            error = removed / scale[:, None, column]
            rows[:, :, column:end] -= error[:, :, None] * factor[:, None, column, column:end]
            errors[:, :, column - first] = error
        rows[:, :, end:] -= errors @ factor[:, first:end, end:]
    rows.masked_fill_(~kept, 0)
    return rows.reshape(weight.shape).to(weight.dtype), kept.reshape(weight.shape)


@torch.no_grad()
def prune_layers(
    network: nn.Module,
    paths: Iterable[str],
    batches: Batches,
    *,
    amount: float | None = None,
    granularity: str = "weight",
    masks: Masks | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> Masks:
    """`sweep` over layers of a network, in place; each has the inputs from before any of them was pruned.

    Masks that were chosen elsewhere may be given instead of an amount and a granularity; the options are those of
    `sweep`.
    """
    weights = parameters_of(network, paths)
    missing = [path for path in weights if masks is not None and path not in masks.kept]
    if missing:
        raise InputError(f"there is no mask for {missing[0]!r}: leave it out of the paths, or add one")
    kept = {}
    for path, hessian in layer_hessians(network, weights, batches).items():
        new, kept[path] = sweep(
            weights[path],
            hessian,
            amount=amount,
            granularity=granularity,
            mask=None if masks is None else masks.kept[path].to(weights[path].device),
            damping=damping,
            block=block,
        )
        weights[path].copy_(new)
    return Masks(kept)


def _check_sweep(unit: Granularity, amount: float | None, mask: Tensor | None, columns: int) -> None:
    if unit.kind not in ("weight", "n:m"):
        raise InputError(
            f"OBS prunes single weights or n of m, not granularity {unit.kind!r}: set granularity='weight' or '2:4'"
        )
    if (amount is not None) + (mask is not None) + (unit.kind == "n:m") != 1:
        raise InputError("OBS needs exactly one of an amount, a granularity such as '2:4', and a mask")
    if amount is not None and not 0 <= amount <= 1:
        raise InputError(f"amount is a share of all weights, between 0 and 1, got {amount}")
    if unit.kind == "n:m" and columns % unit.second:
        raise InputError(f"{columns} columns are not a multiple of {unit.second}: exclude the layer")


def _scored(weight: Tensor, curvature: Tensor) -> Tensor:
    """Half the curvature ``(G, D)`` times the squared weight, in its shape."""
    rows = wide(weight.detach()).reshape(len(curvature), -1, curvature.shape[1])
    return (rows.square() * curvature[:, None] / 2).reshape(weight.shape)


def _layer_of(network: nn.Module, path: str) -> nn.Module:
    module, name = split_path(path)
    layer = network.get_submodule(module)
    if name != "weight" or not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise InputError(
            f"{path!r} is a parameter of {type(layer).__name__}: only Linear and Conv2d can be pruned in this way"
        )
    return layer
