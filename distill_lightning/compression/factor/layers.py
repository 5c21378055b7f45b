"""Factored layers: each has the shape of a dense layer, and is filled from its weight.

A factored layer is built from the dense one (whose weights are not read) and plain numbers, its ``description``; its
own weights are zero until it is filled or a state dict is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.factor.decompositions import (
    Product,
    fit_train_ranks,
    relative_error,
    tensor_train,
    truncated_svd,
    whitened_svd,
)
from distill_lightning.compression.factor.decompositions import exact as exactly
from distill_lightning.compression.factor.ranks import UnfactorableError


class LowRankLinear(nn.Sequential):
    """A linear layer as two of rank ``R``: ``(..., I) -> (..., R) -> (..., O)``; the second one has the bias.

    Args:
        layer: the dense layer.
        rank: ``R``.
    """

    def __init__(self, layer: nn.Linear, *, rank: int) -> None:
        options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
        super().__init__(
            nn.Linear(layer.in_features, rank, bias=False, **options),
            nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **options),
        )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.rank = rank
        self.description = {"kind": "low_rank_linear", "rank": rank}
        take_over(self, layer, layer.weight)

    def fill(self, layer: nn.Linear, *, moment: Tensor | None = None, damping: float = 0.01) -> float:
        """Copy the factors of a dense layer's weight, from `whitened_svd` with a moment, otherwise `truncated_svd`.

        Returns:
            The relative error of the weight.
        """
        factors = product_of(layer.weight, self.rank, moment=moment, damping=damping)
        copy_into({self[0].weight: factors.right, self[1].weight: factors.left, self[1].bias: layer.bias})
        return relative_error(factors.full(), exactly(layer.weight))


class LowRankEmbedding(nn.Sequential):
    """An embedding as an embedding of ``R`` numbers and a linear layer: rows are gathered, then projected.

    Args:
        layer: the dense layer, ``(V, D)``.
        rank: ``R``.

    Raises:
        UnfactorableError: the layer renormalises its rows (``max_norm``).
    """

    def __init__(self, layer: nn.Embedding, *, rank: int) -> None:
        options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
        refuse_max_norm(layer)
        super().__init__(
            nn.Embedding(
                layer.num_embeddings,
                rank,
                padding_idx=layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq,
                sparse=layer.sparse,
                **options,
            ),
            nn.Linear(rank, layer.embedding_dim, bias=False, **options),
        )
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.rank = rank
        self.description = {"kind": "low_rank_embedding", "rank": rank}
        take_over(self, layer, layer.weight)

    def fill(self, layer: nn.Embedding) -> float:
        """Copy the factors of a dense layer's table.

        Returns:
            The relative error of the table.
        """
        table = exactly(layer.weight)
        factors = truncated_svd(table, self.rank)
        # A row of zeros, such as a padding row, stays exactly zero.
        left = torch.where((table == 0).all(dim=1, keepdim=True), 0.0, factors.left)
        copy_into({self[0].weight: left, self[1].weight: factors.right.T})
        return relative_error(left @ factors.right, table)


class TrainLinear(nn.Module):
    r"""A linear layer whose weight is a tensor train over pairs of output and input digits.

    With :math:`O = \prod_k o_k` and :math:`I = \prod_k i_k` the weight is

    .. math:: W[(p_1 \ldots p_d), (q_1 \ldots q_d)] = G_1[p_1, q_1] \cdots G_d[p_d, q_d], \qquad
        G_k[p, q] \in R^{R_{k-1} \times R_k}

    and is applied one core at a time, without recomposing it.

    Args:
        layer: the dense layer.
        out_shape: ``(o_1, ..., o_d)``.
        in_shape: ``(i_1, ..., i_d)``.
        ranks: the ``d - 1`` inner ranks.
    """

    def __init__(
        self, layer: nn.Linear, *, out_shape: Sequence[int], in_shape: Sequence[int], ranks: Sequence[int]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.out_shape, self.in_shape = list(out_shape), list(in_shape)
        self.cores = empty_cores(self.out_shape, self.in_shape, ranks, layer.weight)
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias))
        self.description = {
            "kind": "tt_linear",
            "out_shape": self.out_shape,
            "in_shape": self.in_shape,
            "ranks": list(ranks),
        }
        take_over(self, layer, layer.weight)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"{self.in_shape} -> {self.out_shape}, ranks={self.description['ranks']}"

    def forward(self, feature: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        state = feature.reshape(-1, 1, self.in_features)
        for core in self.cores:
            left, _, digits, _ = core.shape
            # rows and output digits so far, left rank, this input digit, the input digits to come
            state = state.reshape(-1, left, digits, state.shape[-1] // digits)
            state = torch.einsum("nrix,rois->nosx", state, core).flatten(0, 1)
        output = state.reshape(*feature.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw cores and a bias such that the weight has the variance of a dense layer in PyTorch."""
        bound = 1 / math.sqrt(self.in_features)
        draw_cores(self.cores, bound**2 / 3)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def fill(self, layer: nn.Linear) -> float:
        """Copy the train of a dense layer's weight.

        Returns:
            The relative error of the weight.
        """
        error = fill_cores(self.cores, exactly(layer.weight), self.out_shape, self.in_shape)
        copy_into({self.bias: layer.bias})
        return error


class TrainEmbedding(nn.Module):
    """An embedding whose table is a tensor train over pairs of row and column digits.

    A lookup gathers one slice of every core for each index and multiplies them, without recomposing the table. Rows
    beyond those of the dense table, which ``row_shape`` may include, are never looked up.

    Args:
        layer: the dense layer, ``(V, D)``.
        row_shape: ``(v_1, ..., v_d)``, with a product of at least ``V``.
        column_shape: ``(d_1, ..., d_d)``, with the product ``D``.
        ranks: the ``d - 1`` inner ranks.

    Raises:
        UnfactorableError: the layer renormalises its rows, or its padding row is not zero.
    """

    def __init__(
        self, layer: nn.Embedding, *, row_shape: Sequence[int], column_shape: Sequence[int], ranks: Sequence[int]
    ) -> None:
        super().__init__()
        refuse_max_norm(layer)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.row_shape, self.column_shape = list(row_shape), list(column_shape)
        self.cores = empty_cores(self.row_shape, self.column_shape, ranks, layer.weight)
        self.description = {
            "kind": "tt_embedding",
            "row_shape": self.row_shape,
            "column_shape": self.column_shape,
            "ranks": list(ranks),
        }
        take_over(self, layer, layer.weight)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"{self.row_shape} x {self.column_shape}, ranks={self.description['ranks']}"

    def forward(self, index: Tensor) -> Tensor:
        """Rows ``(..., D)`` of indices ``(...)``; zeros for the padding."""
        flat = index.reshape(-1)
        below = math.prod(self.row_shape)
        state = self.cores[0].new_ones(len(flat), 1, 1)
        for core, digits in zip(self.cores, self.row_shape, strict=True):
            below //= digits
            slices = core.index_select(1, flat // below % digits)  # left rank, looked-up rows, column digit, right rank
            state = torch.einsum("nxr,rnds->nxds", state, slices).flatten(1, 2)
        found: Tensor = state.reshape(*index.shape, self.embedding_dim)
        if self.padding_idx is None:
            return found
        return found.masked_fill((index == self.padding_idx)[..., None], 0)

    def reset_parameters(self) -> None:
        """Draw cores whose table has variance 1, as in a dense layer."""
        draw_cores(self.cores, 1.0)

    def fill(self, layer: nn.Embedding) -> float:
        """Copy the train of a dense layer's table.

        Returns:
            The relative error of the table.

        Raises:
            UnfactorableError: its padding row is not zero.
        """
        table = exactly(layer.weight)
        if self.padding_idx is not None and table[self.padding_idx].any():
            raise UnfactorableError(
                f"the padding row {self.padding_idx} of an embedding to factor as a tensor train is not zero: "
                "set it to zero, or use method='svd'"
            )
        return fill_cores(self.cores, table, self.row_shape, self.column_shape)


def balanced_factors(number: int, parts: int) -> list[int]:
    """Find ``parts`` integers with the product ``number``, as equal as possible, from small to large.

    A prime number becomes itself and ones.
    """
    primes, rest, divisor = [], number, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    if rest > 1:
        primes.append(rest)
    factors = [1] * parts
    for prime in sorted(primes, reverse=True):
        factors[factors.index(min(factors))] *= prime
    return sorted(factors)


def covering_factors(number: int, parts: int) -> list[int]:
    """The ``parts`` integers, from small to large and as equal as possible, with a product of ``number`` or more."""
    root = next(side for side in range(1, number + 1) if side**parts >= number)
    factors = [root] * parts
    for at in range(parts):
        while factors[at] > 1 and math.prod(factors) // factors[at] * (factors[at] - 1) >= number:
            factors[at] -= 1
    return sorted(factors)


def train_matrix(matrix: Tensor, row_shape: Sequence[int], column_shape: Sequence[int]) -> Tensor:
    """Reshape a matrix to the tensor ``(v_1 d_1, ..., v_n d_n)`` that a train of pairs decomposes.

    Args:
        matrix: ``(v_1 ... v_n, d_1 ... d_n)``; missing rows are zeros.
        row_shape: ``(v_1, ..., v_n)``.
        column_shape: ``(d_1, ..., d_n)``.
    """
    parts = len(row_shape)
    order = [at for pair in zip(range(parts), range(parts, 2 * parts), strict=True) for at in pair]
    pairs = [row * column for row, column in zip(row_shape, column_shape, strict=True)]
    padded = matrix.new_zeros(math.prod(row_shape), matrix.shape[1])
    padded[: len(matrix)] = matrix
    return padded.reshape(*row_shape, *column_shape).permute(order).reshape(pairs)


def empty_cores(
    row_shape: Sequence[int], column_shape: Sequence[int], ranks: Sequence[int], like: Tensor
) -> nn.ParameterList:
    """Uninitialised cores ``(R_{k-1}, v_k, d_k, R_k)`` of a train of pairs."""
    edges = [1, *ranks, 1]
    sizes = zip(edges, row_shape, column_shape, edges[1:], strict=False)
    return nn.ParameterList([nn.Parameter(torch.empty(size, dtype=like.dtype, device="meta")) for size in sizes])


@torch.no_grad()
def draw_cores(cores: nn.ParameterList, variance: float) -> None:
    """Draw normal cores of equal spread, such that the train's entries have this variance."""
    # An entry is a sum over all inner ranks of products with one factor of each core.
    terms = math.prod(core.shape[3] for core in list(cores)[:-1])
    for core in cores:
        core.normal_(std=(variance / terms) ** (0.5 / len(cores)))


def fill_cores(cores: nn.ParameterList, matrix: Tensor, row_shape: Sequence[int], column_shape: Sequence[int]) -> float:
    """Copy a matrix's train into cores, and return its relative error."""
    paired = train_matrix(matrix, row_shape, column_shape)
    train = tensor_train(paired, fit_train_ranks(paired.shape, [core.shape[3] for core in list(cores)[:-1]]))
    copy_into({core: found.reshape(core.shape) for core, found in zip(cores, train.cores, strict=True)})
    parts = len(row_shape)
    digits = [size for pair in zip(row_shape, column_shape, strict=True) for size in pair]
    rows_first = [*range(0, 2 * parts, 2), *range(1, 2 * parts, 2)]
    whole = train.full().reshape(digits).permute(rows_first).reshape(-1, matrix.shape[1])
    return relative_error(whole[: len(matrix)], matrix)


def product_of(weight: Tensor, rank: int, *, moment: Tensor | None, damping: float) -> Product:
    """The result of `whitened_svd` with a moment, and otherwise of `truncated_svd`."""
    if moment is None:
        return truncated_svd(weight, rank)
    return whitened_svd(weight, rank, moment=moment, damping=damping)


@torch.no_grad()
def copy_into(values: Mapping[Any, Tensor | None]) -> None:
    """Copy values into parameters of the same shape; a value may be ``None`` if there is no parameter."""
    for parameter, value in values.items():
        if value is not None:
            parameter.copy_(value)


@torch.no_grad()
def take_over(module: nn.Module, layer: nn.Module, weight: Tensor) -> None:
    """Give a module on the meta device zeros on the weight's device, and the layer's mode and ``requires_grad``."""
    module.to_empty(device=weight.device)
    for parameter in module.parameters():
        parameter.zero_()
        parameter.requires_grad_(weight.requires_grad)
    module.train(layer.training)


def refuse_max_norm(layer: nn.Embedding) -> None:
    """Refuse an embedding that renormalises its rows, which factors cannot do."""
    if layer.max_norm is not None:
        raise UnfactorableError(
            "an embedding with max_norm cannot be factored: leave it out, or build it without max_norm"
        )
