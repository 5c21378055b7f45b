"""Weights that share a few values: one-dimensional k-means, and the parametrization that trains the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.quantizers.weights import weight_names
from distill_lightning.errors import InputError

Init = Literal["linear", "density", "random"]


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

    A cluster that loses all its members is moved to the value that is farthest from its centroid, so there are ``k``
    centroids, or as many as there are different values if there are fewer.

    Args:
        values: numbers of any shape.
        k: number of clusters, including that of zero.
        init: the initial centroids: ``"linear"``: equally spaced from the smallest to the largest value;
            ``"density"``: with equally many values between them; ``"random"``: ``k`` random values.
        keep_zero: whether zero is a centroid for exactly the values that are zero, so that pruned weights stay pruned.
        iterations: the largest number of iterations; they end when no value changes its cluster.
        seed: seed of the random centroids.

    Raises:
        InputError: ``k`` is too small, the initialisation is unknown, or the values are empty or not finite.

    Han, Mao, Dally: *Deep Compression*, https://arxiv.org/abs/1510.00149
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
    distinct = distinct_values(ordered)[0]
    if len(distinct) <= k:
        return distinct, [0.0]
    centroids = _first(ordered, distinct, k, init, seed)
    # Clusters are ranges of the sorted values, so an iteration only needs cumulative sums.
    sums, squares = (torch.cat([ordered.new_zeros(1), part.cumsum(0)]) for part in (ordered, ordered.square()))
    objectives: list[float] = []
    for _ in range(iterations):
        ends = _ends(centroids, ordered)
        sizes = ends.diff()
        moved = torch.where(sizes > 0, sums[ends].diff() / sizes.clamp_min(1), centroids)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            # Different values, the farthest first.
            far = (distinct - moved[_nearest(centroids, distinct)]).abs().argsort(descending=True, stable=True)
            moved[empty] = distinct[far[: len(empty)]]
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
    raise InputError(f"init must be 'linear', 'density' or 'random', got {init!r}")


def _nearest(centroids: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest of ascending centroids; the lower one of two that are equally near."""
    return torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)


class Codebook(nn.Module):
    """Replaces a weight by a few shared values, for `torch.nn.utils.parametrize`.

    The parametrized layer has the values ``(k,)`` in place of its weight; the indices never change. The gradient of a
    value is the sum of the gradients of the weights that share it.

    Args:
        indices: the index of each weight's value, integers in the weight's shape.
        k: number of values, at most 256.
        pruned: index of the value that is zero and stays zero; ``None`` if there is none.

    Raises:
        InputError: ``k`` is not from 1 to 256.
    """

    indices: Tensor

    def __init__(self, indices: Tensor, *, k: int, pruned: int | None = None) -> None:
        super().__init__()
        if k not in range(1, 257):
            raise InputError(f"a codebook has 1 to 256 values, got k={k}")
        self.k, self.pruned, self.frozen = k, pruned, False
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self, centroids: Tensor) -> Tensor:
        """The weight, from its values ``(k,)``."""
        return self.values(centroids)[self.indices.long()]

    def values(self, centroids: Tensor) -> Tensor:
        """The values themselves; that of pruned weights is zero whatever the optimiser did to it."""
        if self.pruned is None:
            return centroids
        return centroids.masked_fill(torch.arange(self.k, device=centroids.device) == self.pruned, 0)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values of a weight: the means over the weights that share one, exact if these are equal."""
        members, flat = self.indices.long().flatten(), weight.flatten()
        empty = flat.new_zeros(self.k)
        lowest = empty.scatter_reduce(0, members, flat, "amin", include_self=False)
        return lowest + empty.scatter_reduce(0, members, flat - lowest[members], "mean", include_self=False)

    def describe(self) -> dict[str, Any]:
        """Plain values from which, with the weight's shape, the same structure can be made."""
        return {"k": self.k, "pruned": self.pruned, "frozen": self.frozen}

    def extra_repr(self) -> str:
        """The shape and number of values, shown when the module is printed."""
        return f"{tuple(self.indices.shape)}, k={self.k}" + ("" if self.pruned is None else ", pruned")


def share_weights(
    layer: nn.Module,
    *,
    k: int = 16,
    init: Init = "linear",
    keep_zero: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Make each weight of a layer share ``k`` values, in place.

    The values are trained as ``parametrizations.<name>.original``, with another shape than the weight: build the
    optimiser afterwards.

    Args:
        layer: a layer that `weight_names` knows.
        k: see `kmeans`; at most 256.
        init: see `kmeans`.
        keep_zero: see `kmeans`.
        names: names of the weights; ``None`` for all.
        seed: see `kmeans`.

    Returns:
        The names of the weights.

    Raises:
        InputError: the layer has no such weight, the weight is parametrized already, or ``k`` does not fit.
    """
    known = weight_names(layer)
    chosen = known if names is None else list(names)
    if not chosen or set(chosen) - set(known):
        raise InputError(f"{type(layer).__name__} has the weights {known}, cannot share values in {chosen}")
    for name in chosen:
        if parametrize.is_parametrized(layer, name):
            raise InputError(
                f"{name!r} of {type(layer).__name__} is quantized or shared already: bake or bake_shared it first"
            )
        weight = getattr(layer, name)
        found = kmeans(weight, k, init=init, keep_zero=keep_zero, seed=seed)
        pruned = int((found.centroids == 0).nonzero()[0, 0]) if keep_zero and bool((weight == 0).any()) else None
        codebook = Codebook(found.indices, k=len(found.centroids), pruned=pruned)
        with torch.no_grad():
            weight.copy_(found.centroids[found.indices])
        _register(layer, name, codebook)
    return chosen


def describe_shared(layer: nn.Module) -> dict[str, Any]:
    """The shared weights of a layer by name, in plain values; empty if there are none."""
    return {name: codebook.describe() for name, (codebook, _) in codebooks(layer).items()}


def rebuild_shared(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a float layer the described structure, in place; the described layer's state dict then loads strictly.

    Raises:
        InputError: the layer has no weight of that name.
    """
    for name, told in description.items():
        if name not in weight_names(layer):
            raise InputError(f"{type(layer).__name__} has no weight {name!r} to share: is it the right layer?")
        indices = torch.zeros_like(getattr(layer, name), dtype=torch.uint8)
        codebook = Codebook(indices, k=told["k"], pruned=told["pruned"])
        _register(layer, name, codebook)
        if told["frozen"]:
            freeze_shared(layer, name)
    return layer


def codebooks(layer: nn.Module) -> dict[str, tuple[Codebook, Tensor]]:
    """The codebooks of a layer's weights by name, each with its values ``(k,)``."""
    if not parametrize.is_parametrized(layer):
        return {}
    parametrizations: Any = layer.parametrizations
    return {
        name: (entry, entry.values(entries.original.detach()))
        for name, entries in parametrizations.items()
        for entry in entries
        if isinstance(entry, Codebook)
    }


def freeze_shared(layer: nn.Module, name: str) -> None:
    """Stop training the shared values of a weight; once they are baked, the weight trains again."""
    original = _original(layer, name)
    codebooks(layer)[name][0].frozen = original.requires_grad
    original.requires_grad = False


@torch.no_grad()
def bake_shared(layer: nn.Module) -> list[str]:
    """Replace the weights by the shared values for good, and remove the codebooks.

    Returns:
        The names of the weights, which are parameters of the same shapes as before.
    """
    shared = codebooks(layer)
    for name, (codebook, _) in shared.items():
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        if codebook.frozen:
            getattr(layer, name).requires_grad = True
    return list(shared)


def _register(layer: nn.Module, name: str, codebook: Codebook) -> None:
    weight = getattr(layer, name)
    # The registered parameter has the values' shape: no previous optimiser or gradient may still refer to it.
    setattr(layer, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    parametrize.register_parametrization(layer, name, codebook)


def _original(layer: nn.Module, name: str) -> nn.Parameter:
    parametrizations: Any = layer.parametrizations
    original: nn.Parameter = parametrizations[name].original
    return original
