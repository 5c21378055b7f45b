"""Weights that share a few values by a hash of their places: only the values are trained and stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_lightning.compression.access.computed import ComputedWeight, Stored, compute, free_weights
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide

_CHUNK = 2**20
_STEP = 0x9E3779B97F4A7C15


def hash_places(count: int, buckets: int, seed: int) -> Tensor:
    """For each of ``count`` weights, its index in ``cat([values, -values])``: its value and its sign.

    A pure function of its arguments on every machine. Files of hashed weights depend on it, so it must never change.

    Args:
        count: number of weights.
        buckets: number of values.
        seed: 0 to ``2**63 - 1``.

    Returns:
        int32 ``(count,)``, below ``2 * buckets``.

    Raises:
        InputError: the seed or the number of values is out of range.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed of hashed weights must be 0 to 2**63 - 1, got {seed}")
    if not 0 < buckets < 2**30:
        raise InputError(f"hashed weights have 1 to 2**30 - 1 values, got {buckets}")
    places = np.empty(count, np.int32)
    # Python's integers are unbounded, numpy's are modulo 2 ** 64.
    key = _scramble(np.array([(seed + 1) * _STEP % 2**64], np.uint64))
    for start in range(0, count, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, count), dtype=np.uint64)
        hashed = _scramble(_scramble(index * np.uint64(_STEP)) ^ key)
        bucket = (hashed >> np.uint64(1)) % np.uint64(buckets)
        negative = hashed & np.uint64(1)
        places[start : start + len(index)] = bucket + negative * np.uint64(buckets)
    return torch.from_numpy(places)


def _scramble(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix bits so that each input bit reaches all output bits: products carry it up, shifts carry it down."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(33))


def hashed_weight(values: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight that some values make."""
    return torch.cat([values, -values]).index_select(0, places).view(tuple(shape))


class Hashed(ComputedWeight):
    """Replaces a weight by ``w[i] = sign(i) * values[bucket(i)]``, for `torch.nn.utils.parametrize`.

    Bucket and sign are a hash of the seed and of ``i``, the weight's place in row-major order. The parametrized layer
    has the values ``(k,)`` in place of its weight, and its state dict has nothing else. In memory the places take 4
    bytes per weight, so only the file becomes small. The gradient of a value is the sum of the gradients of its
    members, each times its sign.

    The number of members of a bucket is random: of ``k`` values for ``n`` weights the share ``exp(-n / k)`` has none,
    which is 0.03 % for 8 weights per value and 14 % for 2.

    Args:
        shape: shape of the weight.
        values: the number ``k`` of values.
        seed: seed of the hash, 0 to ``2**63 - 1``.

    Raises:
        InputError: the seed or the number of values is out of range.

    Chen, Wilson, Tyree, Weinberger, Chen: *Compressing Neural Networks with the Hashing Trick*,
    https://arxiv.org/abs/1504.04788
    """

    family = "hashed"
    keeps_parameter = False
    places: Tensor

    def __init__(self, shape: Sequence[int], *, values: int, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.values, self.seed = tuple(shape), values, seed
        # It follows from the arguments.
        self.register_buffer("places", hash_places(math.prod(self.shape), values, seed), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """The weight, from its values ``(k,)``."""
        return hashed_weight(values, self.places, self.shape)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The least-squares values ``(k,)`` of a weight: the mean of each bucket's members times their signs.

        A bucket without members has the value zero; the values are exact if all members agree.
        """
        members = self.places.long() % self.values
        flat = wide(weight).flatten()
        signed = torch.where(self.places < self.values, flat, -flat)
        empty = signed.new_zeros(self.values)
        lowest = empty.scatter_reduce(0, members, signed, "amin", include_self=False)
        means = empty.scatter_reduce(0, members, signed - lowest[members], "mean", include_self=False)
        return (lowest + means).to(weight.dtype)

    def describe(self) -> dict[str, Any]:
        """Plain values from which, with the weight's shape, the same structure can be made."""
        return {"values": self.values, "seed": self.seed}

    @classmethod
    def from_description(cls, weight: Tensor, told: Mapping[str, Any]) -> Self:
        """The same places for the same shape, number of values and seed."""
        return cls(weight.shape, **told)

    def size_of(self, original: Tensor) -> int:
        """The number of weights."""
        return self.places.numel()

    def stored(self, original: Tensor) -> Stored:
        """The values and the seed, from which the places follow."""
        return Stored("hashed", {"values": original.detach(), "shape": self.shape, "seed": self.seed})

    def extra_repr(self) -> str:
        """The arguments, shown when the module is printed."""
        return f"{self.shape}, values={self.values}, seed={self.seed}"


def hash_weights(layer: nn.Module, *, ratio: float, seed: int = 0, names: Sequence[str] | None = None) -> list[str]:
    """Make the weights of a layer share values by a hash of their places, in place; see `Hashed`.

    The values start as close to the weights as possible. This shrinks a random, untrained weight by a factor of about
    ``sqrt(ratio)``, because means of independent numbers are small.

    The values are trained as ``parametrizations.<name>.original``, with another shape than the weight: build the
    optimiser afterwards. This unties a weight that another layer also has: that layer keeps it. A weight of ``n``
    entries has ``round(ratio * n)`` values, at least one. Give each layer a seed of its own. Returns the names of the
    weights, by default all.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"ratio must be above 0 and at most 1 value per weight, got {ratio}")
    chosen = free_weights(layer, names, act="hash")
    made = {}
    for name in chosen:
        weight = getattr(layer, name)
        made[name] = Hashed(weight.shape, values=max(1, round(ratio * weight.numel())), seed=seed)
    for name, entry in made.items():
        compute(layer, name, entry)
    return chosen
