"""Convolutions as chains of smaller ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from distill_lightning.compression.factor.decompositions import (
    canonical,
    exact,
    fit_train_ranks,
    relative_error,
    tensor_train,
    tucker2,
    unfold,
)
from distill_lightning.compression.factor.layers import copy_into, product_of, take_over
from distill_lightning.compression.factor.ranks import UnfactorableError
from distill_lightning.errors import InputError

ConvMethod = Literal["svd_channel", "svd_spatial", "tucker2", "cp", "tt"]
CONV_METHODS: tuple[str, ...] = get_args(ConvMethod)


class LayerCost(NamedTuple):
    """The cost of a layer for one sample (for one position if a linear layer has many); biases are not counted."""

    weights: int
    macs: int


class ConvChain(nn.Sequential):
    """A convolution as a chain of standard convolutions; the bias is in the last one.

    ============== ================================================================ =================
    method         chain, ``k`` being the window, over channels ``C -> ... -> O``   ranks
    ============== ================================================================ =================
    `svd_channel`  ``k x k`` to ``R``, ``1 x 1``                                    ``[R]``
    `svd_spatial`  ``k x 1`` to ``R``, ``1 x k``                                    ``[R]``
    `tucker2`      ``1 x 1`` to ``R``, ``k x k`` to ``S``, ``1 x 1``                ``[R, S]``
    `cp`           ``1 x 1`` to ``R``, depthwise ``k x 1`` and ``1 x k``, ``1 x 1`` ``[R]``
    `tt`           ``1 x 1`` to ``R``, ``k x 1`` to ``S``, ``1 x k`` to ``T``, ``1 x 1`` ``[R, S, T]``
    ============== ================================================================ =================

    Stride, padding and dilation belong to the convolution whose window has that axis, so every chain equals the
    convolution with the recomposed kernel at every position, including the border.

    Args:
        layer: the dense convolution, not grouped.
        method: one of the above.
        ranks: the ranks, as many as the method has.

    Raises:
        InputError: the convolution is grouped, or the number of ranks is wrong.
    """

    def __init__(self, layer: nn.Conv2d, *, method: ConvMethod, ranks: Sequence[int]) -> None:
        stages = chain_stages(layer, method, ranks)
        last = len(stages) - 1
        super().__init__(
            *(
                nn.Conv2d(
                    **stage,
                    bias=at == last and layer.bias is not None,
                    padding_mode=layer.padding_mode,
                    device="meta",
                    dtype=layer.weight.dtype,
                )
                for at, stage in enumerate(stages)
            )
        )
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.method, self.ranks = method, list(ranks)
        self.description = {"kind": "conv_chain", "method": method, "ranks": self.ranks}
        take_over(self, layer, layer.weight)

    def fill(self, layer: nn.Conv2d, *, moment: Tensor | None = None, damping: float = 0.01) -> float:
        """Copy the factors of a dense layer's kernel.

        Args:
            layer: a layer of the shape for which the chain was built.
            moment: second moment of the patches, ``(C H W, C H W)``; only for `svd_channel`.
            damping: see `whitened_svd`.

        Returns:
            The relative error of the kernel.
        """
        kernel = exact(layer.weight)
        found = _decompose(kernel, self.method, self.ranks, moment=moment, damping=damping)
        stages = [stage for stage in self if isinstance(stage, nn.Conv2d)]
        for stage, weight in zip(stages, found[:-1], strict=True):
            copy_into({stage.weight: weight.reshape(stage.weight.shape)})
        copy_into({stages[-1].bias: layer.bias})
        return relative_error(found[-1], kernel)


def chain_stages(layer: nn.Conv2d, method: ConvMethod, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """The options of a chain's convolutions, in their order.

    Raises:
        InputError: the convolution is grouped, the method is unknown, or the number of ranks is wrong.
    """
    if layer.groups != 1:
        raise UnfactorableError(
            f"a convolution with groups={layer.groups} cannot be factored: exclude it from the targets"
        )
    if method not in CONV_METHODS:
        raise InputError(f"method {method!r} is not for a Conv2d: use one of {', '.join(CONV_METHODS)}")
    widths = {"svd_channel": 1, "svd_spatial": 1, "tucker2": 2, "cp": 1, "tt": 3}[method]
    if len(ranks) != widths or min(ranks) < 1:
        raise InputError(f"method {method!r} needs {widths} rank(s) of at least 1, got {list(ranks)}")
    into, out, point = layer.in_channels, layer.out_channels, _stage(layer, ())
    both, down, across = _stage(layer, (0, 1)), _stage(layer, (0,)), _stage(layer, (1,))
    first = ranks[0]
    if method == "svd_channel":
        shape = [(both, into, first, 1), (point, first, out, 1)]
    elif method == "svd_spatial":
        shape = [(down, into, first, 1), (across, first, out, 1)]
    elif method == "tucker2":
        shape = [(point, into, first, 1), (both, first, ranks[1], 1), (point, ranks[1], out, 1)]
    elif method == "cp":
        middle = [(down, first, first, first), (across, first, first, first)]
        shape = [(point, into, first, 1), *middle, (point, first, out, 1)]
    else:
        middle = [(down, first, ranks[1], 1), (across, ranks[1], ranks[2], 1)]
        shape = [(point, into, first, 1), *middle, (point, ranks[2], out, 1)]
    return [
        {"in_channels": begin, "out_channels": end, "groups": groups, **options}
        for options, begin, end, groups in shape
    ]


def chain_cost(stages: Sequence[dict[str, Any]], input_size: Sequence[int] | None) -> LayerCost:
    """Weights and multiply-accumulates of a chain for one image.

    The input size is ``(H, W)`` of the dense layer; without it multiply-accumulates are not counted (0).
    """
    weights = macs = 0
    size = (0, 0) if input_size is None else (input_size[0], input_size[1])
    for stage in stages:
        own = stage["out_channels"] * stage["in_channels"] // stage["groups"] * math.prod(stage["kernel_size"])
        size = (_length(stage, size[0], 0), _length(stage, size[1], 1)) if input_size is not None else size
        weights, macs = weights + own, macs + own * math.prod(size)
    return LayerCost(weights, macs)


def dense_stages(layer: nn.Conv2d) -> list[dict[str, Any]]:
    """The convolution itself, as a chain of one."""
    options = _stage(layer, (0, 1))
    return [{"in_channels": layer.in_channels, "out_channels": layer.out_channels, "groups": layer.groups, **options}]


def full_ranks(layer: nn.Conv2d, method: ConvMethod) -> list[int]:
    """The ranks at which a method's chain is exact; for `cp` an upper bound."""
    into, out, (high, wide) = layer.in_channels, layer.out_channels, layer.kernel_size
    if method == "svd_channel":
        return [min(out, into * high * wide)]
    if method == "svd_spatial":
        return [min(into * high, out * wide)]
    if method == "tucker2":
        return [min(into, out * high * wide), min(out, into * high * wide)]
    if method == "cp":
        sizes = (into, out, high, wide)
        return [math.prod(sizes) // max(sizes)]
    return fit_train_ranks([into, high, wide, out], [out * into * high * wide] * 3)


def fit_chain_ranks(layer: nn.Conv2d, method: ConvMethod, ranks: Sequence[int]) -> list[int]:
    """Lower ranks that are larger than the others can use: if one is small, a larger one has nothing to span."""
    fitted = [min(rank, limit) for rank, limit in zip(ranks, full_ranks(layer, method), strict=True)]
    if method == "tucker2":
        window = math.prod(layer.kernel_size)
        inner = min(fitted[0], fitted[1] * window)
        return [inner, min(fitted[1], inner * window)]
    if method == "tt":
        return fit_train_ranks([layer.in_channels, *layer.kernel_size, layer.out_channels], fitted)
    return fitted


def chain_unfoldings(kernel: Tensor, method: ConvMethod) -> list[Tensor]:
    """The matrices whose singular values determine a method's ranks, one for each."""
    whole = exact(kernel)
    if method == "svd_channel":
        return [whole.flatten(1)]
    if method == "svd_spatial":
        return [_spatial(whole)]
    if method == "tucker2":
        return [unfold(whole, 1), unfold(whole, 0)]
    if method == "tt":
        ordered = whole.permute(1, 2, 3, 0)
        return [ordered.flatten(0, at).flatten(1) for at in range(3)]
    raise InputError("method 'cp' has no singular values: give its rank as a number, a fraction or a budget")


def _stage(layer: nn.Conv2d, axes: Sequence[int]) -> dict[str, Any]:
    """The window of a layer along some axes (0: down, 1: across), and 1 along the others."""

    def along(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else other for axis, value in enumerate(values))

    padding = layer.padding
    return {
        "kernel_size": along(layer.kernel_size, 1),
        "stride": along(layer.stride, 1),
        "dilation": along(layer.dilation, 1),
        "padding": padding if isinstance(padding, str) else along(padding, 0),
    }


def _length(stage: dict[str, Any], length: int, axis: int) -> int:
    """The length of a stage's output along an axis."""
    padding, reach = stage["padding"], stage["dilation"][axis] * (stage["kernel_size"][axis] - 1)
    added = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding[axis]
    return int((length + added - reach - 1) // stage["stride"][axis] + 1)


def _spatial(kernel: Tensor) -> Tensor:
    """The kernel as ``(C H, O W)``; rows are the inputs of the first convolution of `svd_spatial`."""
    return kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _decompose(
    kernel: Tensor, method: ConvMethod, ranks: Sequence[int], *, moment: Tensor | None, damping: float
) -> list[Tensor]:
    """The weights of a chain's convolutions, and the kernel that they recompose."""
    out, into, high, wide = kernel.shape
    if method == "svd_channel":
        product = product_of(kernel.flatten(1), ranks[0], moment=moment, damping=damping)
        return [product.right, product.left, product.full().reshape(kernel.shape)]
    if method == "svd_spatial":
        product = product_of(_spatial(kernel), ranks[0], moment=None, damping=damping)
        whole = product.full().reshape(into, high, out, wide).permute(2, 0, 1, 3)
        return [product.left.T, product.right.reshape(-1, out, wide).movedim(1, 0), whole]
    if method == "tucker2":
        tucker = tucker2(kernel, (ranks[0], ranks[1]))
        return [tucker.inner.T, tucker.core, tucker.outer, tucker.full()]
    if method == "cp":
        parts = canonical(kernel, ranks[0])
        outer, inner, down, across = parts.factors
        return [inner.T, down.T, across.T, outer, parts.full()]
    train = tensor_train(kernel.permute(1, 2, 3, 0), ranks)
    cores = train.cores
    whole = train.full().permute(3, 0, 1, 2)
    # A core (before, n, after) is a convolution's weight (after, before, n).
    return [cores[0][0].T, cores[1].movedim(2, 0), cores[2].movedim(2, 0), cores[3][..., 0].T, whole]
