"""Weights that share a few values: one-dimensional k-means, and the parametrization that trains the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.computed import ComputedWeight, Stored, compute, free_weights
from distill_lightning.errors import InputError

Init = Literal["linear", "density", "random", "kmeans++"]


class Clusters(NamedTuple):
    """The result of `kmeans`.

    Attributes:
        centroids: ascending, ``(k,)``, in the values' type.
        indices: the index of each value's centroid, int64, in the values' shape.
        objectives: the sum of squared distances after each iteration; it never rises.
    """

    centroids: Tensor
    indices: Tensor
    objectives: list[float]


@torch.no_grad()
def kmeans(
    values: Tensor, k: int, *, init: Init = "linear", keep_zero: bool = False, iterations: int = 100, seed: int = 0
) -> Clusters:
    """Cluster numbers by k-means.

    A cluster that loses all its members is moved to the value that is farthest from its centroid, which that one loses,
    so there are ``k`` centroids, or as many as there are different values if there are fewer.

    Args:
        values: numbers of any shape.
        k: number of clusters, including that of zero.
        init: the initial centroids: ``"linear"``: equally spaced from the smallest to the largest value;
            ``"density"``: with equally many values between them; ``"random"``: ``k`` random values; ``"kmeans++"``:
            values drawn one by one, each with a probability in proportion to its squared distance from the nearest one
            before. From about 32 clusters on, this leaves smaller distances than the others.
        keep_zero: whether zero is a centroid for exactly the values that are zero, so that pruned weights stay pruned.
        iterations: the largest number of iterations; they end when no value changes its cluster.
        seed: seed of the random centroids.

    Raises:
        InputError: ``k`` is too small, the initialisation is unknown, or the values are empty or not finite.

    Han, Mao, Dally: *Deep Compression*, https://arxiv.org/abs/1510.00149; Arthur, Vassilvitskii: *k-means++: The
    Advantages of Careful Seeding*, SODA 2007
    """
    flat = values.detach().flatten().double()
    if not len(flat) or not bool(flat.isfinite().all()):
        raise InputError(
            f"values of shape {tuple(values.shape)} cannot be clustered: they are empty, or hold NaN or infinity"
        )
    zero = (flat == 0) if keep_zero else torch.zeros_like(flat, dtype=torch.bool)
    has_zero = bool(zero.any())
    if k - has_zero < (not bool(zero.all())):
        raise InputError(f"k={k} is too small: give at least {1 + has_zero} clusters")
    rest = flat[~zero]
    centroids, objectives = _lloyd(rest, k - has_zero, init, iterations, seed) if len(rest) else (rest, [0.0])
    if has_zero:
        centroids = torch.cat([centroids, centroids.new_zeros(1)])
    # In the type of the weights, two centroids may be equal.
    centroids = distinct_values(centroids.to(values.dtype))[0]
    indices = _nearest(centroids.double(), flat)
    if has_zero:
        place = int((centroids == 0).nonzero()[0, 0])
        others = torch.cat([centroids[:place], centroids[place + 1 :]])
        if len(others):
            away = _nearest(others.double(), flat)
            indices = torch.where(zero, place, away + (away >= place))
    used, indices = distinct_values(indices)
    return Clusters(centroids[used], indices.reshape(values.shape), objectives)


def distinct_values(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The different entries in ascending order, and the index of each entry among them."""
    values, indices = torch.unique(tensor, return_inverse=True)
    return values, indices


def _lloyd(values: Tensor, k: int, init: Init, iterations: int, seed: int) -> tuple[Tensor, list[float]]:
    ordered = values.sort()[0]
    distinct, times = torch.unique_consecutive(ordered, return_counts=True)
    if len(distinct) <= k:
        return distinct, [0.0]
    centroids = _far_apart(distinct, times, k, seed) if init == "kmeans++" else _first(ordered, distinct, k, init, seed)
    # Clusters are ranges of the sorted values, so an iteration only needs cumulative sums.
    sums, squares = (torch.cat([ordered.new_zeros(1), part.cumsum(0)]) for part in (ordered, ordered.square()))
    objectives: list[float] = []
    for _ in range(iterations):
        ends = _ends(centroids, ordered)
        sizes, totals = ends.diff(), sums[ends].diff()
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            # Different values, the farthest first from where their centroids are so far; their clusters lose them.
            owners = _nearest(centroids, distinct)
            far = (distinct - centroids[owners]).abs().argsort(descending=True, stable=True)[: len(empty)]
            sizes = sizes.index_add(0, owners[far], -times[far])
            totals = totals.index_add(0, owners[far], -times[far] * distinct[far])
        moved = torch.where(sizes > 0, totals / sizes.clamp_min(1), centroids)
        if len(empty):
            moved[empty] = distinct[far]
        moved = moved.sort()[0]
        ends = _ends(moved, ordered)
        losses = squares[ends].diff() - 2 * moved * sums[ends].diff() + moved.square() * ends.diff()
        objectives.append(float(losses.sum()))
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, objectives


def _ends(centroids: Tensor, ordered: Tensor) -> Tensor:
    """Where the range of each centroid's members ends, after a 0, ``(k + 1,)``; as `_nearest` assigns them."""
    between = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
    return torch.cat([between.new_zeros(1), between, between.new_full((1,), len(ordered))])


def _first(ordered: Tensor, distinct: Tensor, k: int, init: Init, seed: int) -> Tensor:
    if init == "linear":
        steps = torch.linspace(0, 1, k, dtype=ordered.dtype, device=ordered.device)
        return ordered[0] + steps * (ordered[-1] - ordered[0])
    if init == "density":
        places = (torch.arange(k, device=ordered.device) + 0.5) * len(ordered) / k
        return ordered[places.long()]
    if init == "random":
        drawn = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:k]
        return distinct[drawn.to(distinct.device)].sort()[0]
    raise InputError(f"init must be 'linear', 'density', 'random' or 'kmeans++', got {init!r}")


def _far_apart(distinct: Tensor, times: Tensor, k: int, seed: int) -> Tensor:
    """The start of k-means++: values drawn by their squared distance from the nearest one before."""
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=distinct.dtype)
    chosen = torch.zeros(k, dtype=torch.long, device=distinct.device)
    distances = torch.ones_like(distinct)
    for number, draw in enumerate(draws.to(distinct.device)):
        reached = (times * distances).cumsum(0)
        chosen[number] = torch.searchsorted(reached, draw * reached[-1], right=True).clamp_max(len(distinct) - 1)
        squares = (distinct - distinct[chosen[number]]).square()
        distances = torch.minimum(distances, squares) if number else squares
    return distinct[chosen].sort()[0]


def _nearest(centroids: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest of ascending centroids; the lower one of two that are equally near."""
    return torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)


class Codebook(ComputedWeight):
    """Replaces a weight by a few shared values, for `torch.nn.utils.parametrize`.

    The parametrized layer has the values ``(k,)`` in place of its weight; the indices never change. The gradient of a
    value is the sum of the gradients of the weights that share it.

    Args:
        indices: the index of each weight's value, integers in the weight's shape.
        k: number of values, at most 256.
        zero: index of the value that is zero and stays zero; ``None`` if there is none.
        frozen: whether the values do not train; once they are baked, the weight trains again.

    Raises:
        InputError: ``k`` is not from 1 to 256.
    """

    family = "shared"
    keeps_parameter = False
    indices: Tensor

    def __init__(self, indices: Tensor, *, k: int, zero: int | None = None, frozen: bool = False) -> None:
        super().__init__()
        if k not in range(1, 257):
            raise InputError(f"a codebook has 1 to 256 values, got k={k}")
        self.k, self.zero, self.frozen = k, zero, frozen
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self, centroids: Tensor) -> Tensor:
        """The weight, from its values ``(k,)``."""
        return self.values(centroids)[self.indices.long()]

    def values(self, centroids: Tensor) -> Tensor:
        """The values themselves; that of pruned weights is zero whatever the optimiser did to it."""
        if self.zero is None:
            return centroids
        return centroids.masked_fill(torch.arange(self.k, device=centroids.device) == self.zero, 0)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values of a weight: the means over the weights that share one, exact if these are equal."""
        members, flat = self.indices.long().flatten(), weight.flatten()
        empty = flat.new_zeros(self.k)
        lowest = empty.scatter_reduce(0, members, flat, "amin", include_self=False)
        return lowest + empty.scatter_reduce(0, members, flat - lowest[members], "mean", include_self=False)

    def describe(self) -> dict[str, Any]:
        """Plain values from which, with the weight's shape, the same structure can be made."""
        return {"k": self.k, "zero": self.zero, "frozen": self.frozen}

    @classmethod
    def from_description(cls, weight: Tensor, told: Mapping[str, Any]) -> Self:
        """A codebook whose indices are still to be loaded."""
        return cls(torch.zeros_like(weight, dtype=torch.uint8), **told)

    def stored(self, original: Tensor) -> Stored:
        """The indices and the values."""
        return Stored("codebook", {"indices": self.indices, "centroids": self.values(original.detach())})

    def pruned(self) -> int:
        """The number of weights whose value is held at zero."""
        return 0 if self.zero is None else int((self.indices == self.zero).sum())

    def size_of(self, original: Tensor) -> int:
        """The number of weights."""
        return self.indices.numel()

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return max(self.k - 1, 1).bit_length()

    def extra_repr(self) -> str:
        """The shape and number of values, shown when the module is printed."""
        return f"{tuple(self.indices.shape)}, k={self.k}" + ("" if self.zero is None else ", with a fixed zero")


def share_weights(
    layer: nn.Module,
    *,
    k: int = 16,
    init: Init = "linear",
    keep_zero: bool = False,
    frozen: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Make each weight of a layer share ``k`` values, in place.

    The values are trained as ``parametrizations.<name>.original``, with another shape than the weight: build the
    optimiser afterwards. The options are those of `kmeans` (``k`` at most 256) and of `Codebook`. Returns the names of
    the weights, by default all.
    """
    chosen = free_weights(layer, names, act="share values in")
    for name in chosen:
        weight = getattr(layer, name)
        found = kmeans(weight, k, init=init, keep_zero=keep_zero, seed=seed)
        zero = int((found.centroids == 0).nonzero()[0, 0]) if keep_zero and bool((weight == 0).any()) else None
        codebook = Codebook(found.indices, k=len(found.centroids), zero=zero, frozen=frozen)
        with torch.no_grad():
            weight.copy_(found.centroids[found.indices])
        compute(layer, name, codebook)
    return chosen
