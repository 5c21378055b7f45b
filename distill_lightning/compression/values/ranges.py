"""The range of values that a grid spans: everything, or less if clipping costs less than a coarser step."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill_lightning.compression.values.scheme import Scheme, cut_groups, dequantize, grid, quantize, to_rows
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide

RangeRule = Literal["minmax", "percentile", "mse", "kl"]
ObserverRule = Literal["minmax", "ema", "percentile", "mse", "kl"]

_KL_BINS = 2048
_KL_CANDIDATES = 128
_KL_FEWEST = 2 * _KL_BINS


def weight_grid(
    weight: Tensor,
    scheme: Scheme,
    *,
    rule: RangeRule = "minmax",
    percentile: float = 99.9,
    candidates: int = 100,
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a weight, ``(R, G)`` each, in its type (at least float32).

    Args:
        weight: any shape.
        scheme: ``"symmetric"``, ``"affine"`` or ``"pow2"``.
        rule: see `find_range`.
        percentile: see `find_range`.
        candidates: see `find_range`.
        check: whether to check for values that are not finite, which waits for the device.

    Raises:
        InputError: the weight is empty or has a value that is not finite, or the rule is unknown.
    """
    rows = to_rows(wide(weight.detach()), scheme)
    if not rows.numel() or (check and not bool(rows.isfinite().all())):
        raise InputError(f"a weight of shape {tuple(weight.shape)} has no range: it is empty, or holds NaN or infinity")
    parts = [
        torch.stack(find_range(part, scheme, rule=rule, percentile=percentile, candidates=candidates))
        for part in cut_groups(rows, scheme)
    ]
    low, high = torch.cat([part.reshape(2, len(rows), -1) for part in parts], dim=2)
    return grid(low, high, scheme)


def find_range(
    values: Tensor,
    scheme: Scheme,
    *,
    rule: RangeRule = "minmax",
    counts: Tensor | None = None,
    percentile: float = 99.9,
    candidates: int = 100,
) -> tuple[Tensor, Tensor]:
    """The range that each row's grid should span.

    Args:
        values: ``(R, L)``.
        scheme: the scheme by which they will be quantized.
        rule: ``"minmax"``: all of them. ``"percentile"``: without the largest absolute values; of an affine scheme,
            without half as many at either end. ``"mse"``: all of them times the one of ``candidates`` equally spaced
            factors up to 1 with the smallest squared error. ``"kl"``: up to the threshold whose histogram loses least
            information by quantization (Migacz, *8-bit Inference with TensorRT*, GTC 2017); zeros, which every grid
            holds exactly, do not count, and of fewer than 4096 other values, whose histogram would show chance, all are
            in the range.
        counts: how often each value occurs, ``(R, L)``; ``None`` for once.
        percentile: percentage of the values that remain.
        candidates: number of factors to try.

    Returns:
        The smallest and the largest value, ``(R,)`` each.

    Raises:
        InputError: the rule is unknown, or an option is out of range.
    """
    if rule == "minmax" and counts is None:
        return torch.aminmax(values, dim=1)
    counts = torch.ones_like(values) if counts is None else counts.to(values.dtype)
    present = values.masked_fill(counts == 0, 0)
    low, high = present.amin(dim=1).clamp_max(0), present.amax(dim=1).clamp_min(0)
    if rule == "minmax":
        return low, high
    if rule == "percentile":
        return _percentile(values, counts, scheme, percentile)
    if rule == "mse":
        return _smallest_error(values, counts, (low, high), scheme, candidates)
    if rule == "kl":
        threshold = _kl_threshold(values.abs(), counts.masked_fill(values == 0, 0), low, scheme)
        return torch.maximum(low, -threshold), torch.minimum(high, threshold)
    raise InputError(f"rule must be one of {', '.join(get_args(RangeRule))}, got {rule!r}")


def _percentile(values: Tensor, counts: Tensor, scheme: Scheme, percentile: float) -> tuple[Tensor, Tensor]:
    if not 50 < percentile <= 100:
        raise InputError(f"percentile must be above 50 and at most 100, got {percentile}")
    if scheme.kind != "affine":
        high = _quantile(values.abs(), counts, percentile / 100)
        return -high, high
    tail = (1 - percentile / 100) / 2
    return -_quantile(-values, counts, 1 - tail), _quantile(values, counts, 1 - tail)


def _quantile(values: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """The smallest value of each row that at least this fraction does not exceed, ``(R,)``."""
    ordered, order = values.sort(dim=1)
    # Float64, because float32 no longer counts beyond 2 ** 24; the tolerance is for the product's own rounding.
    reached = counts.double().gather(1, order).cumsum(dim=1)
    total = reached[:, -1:]
    place = (reached < total * (fraction - 1e-12)).sum(dim=1, keepdim=True)
    return ordered.gather(1, place.clamp_max(values.shape[1] - 1))[:, 0]


def _smallest_error(
    values: Tensor, counts: Tensor, full: tuple[Tensor, Tensor], scheme: Scheme, candidates: int
) -> tuple[Tensor, Tensor]:
    if candidates < 1:
        raise InputError(f"candidates must be positive, got {candidates}")
    low, high = full
    rows = Scheme(scheme.bits, scheme.kind, per="channel")
    best = torch.full_like(low, math.inf)
    factor = torch.ones_like(low)
    for step in range(candidates, 0, -1):
        part = step / candidates
        scale, zero_point = grid(part * low, part * high, scheme)
        rounded = dequantize(quantize(values, scale[:, None], zero_point[:, None], rows), rows)
        error = ((rounded - values).square() * counts).sum(dim=1)
        factor = torch.where(error < best, part, factor)
        best = torch.minimum(error, best)
    return factor * low, factor * high


def _kl_threshold(magnitudes: Tensor, counts: Tensor, low: Tensor, scheme: Scheme) -> Tensor:
    """The threshold of absolute values for each row, ``(R,)``."""
    # In float64, where the smallest magnitude still has bins.
    largest = magnitudes.masked_fill(counts == 0, 0).amax(dim=1).double()
    width = torch.where(largest > 0, largest, 1) / _KL_BINS
    places = (magnitudes.double() / width[:, None]).long().clamp_max(_KL_BINS - 1)
    histogram = counts.new_zeros(len(counts), _KL_BINS, dtype=torch.float64).scatter_add_(1, places, counts.double())
    # An affine grid spends its codes on both signs unless only one occurs.
    levels = scheme.highest + 1
    halved = (levels + 1) // 2 if scheme.kind == "affine" else levels
    best = torch.full_like(largest, math.inf)
    threshold = largest.clone()
    for kept in range(_KL_BINS // _KL_CANDIDATES, _KL_BINS + 1, _KL_BINS // _KL_CANDIDATES):
        one_sign = kl_divergence_of_clipping(histogram, kept, levels)
        loss = torch.where(low < 0, kl_divergence_of_clipping(histogram, kept, halved), one_sign)
        threshold = torch.where(loss < best, kept * width, threshold)
        best = torch.minimum(loss, best)
    # A histogram of fewer values shows chance: per channel, it would cut off what layers need.
    threshold = torch.where(counts.sum(dim=1) < _KL_FEWEST, largest, threshold)
    return threshold.to(magnitudes.dtype)


def kl_divergence_of_clipping(histogram: Tensor, kept: int, levels: int) -> Tensor:
    """The information that a histogram of absolute values loses when it is clipped and quantized, in nats.

    Args:
        histogram: counts ``(R, B)``.
        kept: number of bins that remain; values beyond them count in the last one.
        levels: number of equally wide levels into which they are merged. A level's count is spread evenly over its
            non-empty bins.

    Returns:
        The divergence ``(R,)``; infinite if there are fewer bins than levels, which would merge nothing.
    """
    if kept < levels:
        return histogram.new_full((len(histogram),), math.inf)
    clipped = histogram[:, :kept].clone()
    clipped[:, -1] += histogram[:, kept:].sum(dim=1)
    level = (torch.arange(kept, device=histogram.device) * levels // kept).expand(len(histogram), -1)
    occupied = (clipped > 0).to(histogram.dtype)
    zeros = histogram.new_zeros(len(histogram), levels)
    mass = zeros.scatter_add(1, level, histogram[:, :kept])
    bins = zeros.scatter_add(1, level, occupied)
    merged = occupied * (mass / bins.clamp_min(1)).gather(1, level)
    reference = clipped / clipped.sum(dim=1, keepdim=True)
    # A last bin with clipped values only has no counterpart; it costs a lot, but not infinitely much.
    merged = (merged / merged.sum(dim=1, keepdim=True).clamp_min(1e-12)).clamp_min(1e-12)
    return torch.where(reference > 0, reference * (reference.clamp_min(1e-300) / merged).log(), 0).sum(dim=1)


class Observer(nn.Module):
    """Observes activations and finds the range that their grid should span, one for the whole tensor.

    The histogram's bins are powers of two wide and begin at zero, so they can be merged without loss when larger values
    occur: the range depends neither on the order of the batches nor on how samples are divided into them (except for
    ``"ema"``).

    Args:
        rule: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"kl"`` as in `find_range`, over everything seen; or
            ``"ema"``, a moving average of every batch's smallest and largest value.
        momentum: the newest batch's weight in that average.
        percentile: percentage of the values that remain.

    Raises:
        InputError: the rule is unknown, or the momentum is not in (0, 1].
    """

    SIDE = 2**13
    """Bins on either side of zero."""

    low: Tensor
    high: Tensor
    batches: Tensor
    counts: Tensor
    zeros: Tensor
    exponent: Tensor

    def __init__(self, rule: ObserverRule = "minmax", *, momentum: float = 0.1, percentile: float = 99.99) -> None:
        super().__init__()
        check_one_of("observer", rule, get_args(ObserverRule))
        if not 0 < momentum <= 1:
            raise InputError(f"momentum must be above 0 and at most 1, got {momentum}")
        self.rule, self.momentum, self.percentile = rule, momentum, percentile
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        if rule in ("percentile", "mse", "kl"):
            # Not in checkpoints: they are large, and only the range is needed.
            self.register_buffer("counts", torch.zeros(2 * self.SIDE, dtype=torch.long), persistent=False)
            self.register_buffer("zeros", torch.zeros((), dtype=torch.long), persistent=False)
            # Below every normal float32.
            self.register_buffer("exponent", torch.tensor(-140), persistent=False)

    @torch.no_grad()
    def forward(self, values: Tensor) -> Tensor:
        """Observe a batch of any shape, and return it unchanged.

        Raises:
            InputError: it holds NaN or infinity.
        """
        if not values.numel():
            return values
        smallest, largest = torch.aminmax(values.detach())
        if not bool(smallest.isfinite() & largest.isfinite()):
            raise InputError(
                f"observer {self.rule!r} saw NaN or infinity, which have no range: check the network and its inputs"
            )
        self._widen(smallest, largest)
        if self.rule in ("percentile", "mse", "kl"):
            self._count(wide(values.detach()).flatten())
        return values

    @torch.no_grad()
    def follow(self, values: Tensor) -> None:
        """Observe a batch of a training, which does not wait for the device: one with NaN or infinity is left out."""
        if values.numel():
            self._widen(*torch.aminmax(values.detach()))

    def _widen(self, smallest: Tensor, largest: Tensor) -> None:
        """Take the edges of a batch into account, if they are finite."""
        known = smallest.isfinite() & largest.isfinite()
        for edge, new, outer in ((self.low, smallest, torch.minimum), (self.high, largest, torch.maximum)):
            seen = new.to(edge.dtype)
            moved = edge + self.momentum * (seen - edge) if self.rule == "ema" else outer(edge, seen)
            edge.copy_(torch.where(known, torch.where(self.batches == 0, seen, moved), edge))
        self.batches += known

    def _count(self, values: Tensor) -> None:
        present = values[values != 0].double()
        self.zeros += len(values) - len(present)
        exponent = int(self.exponent)
        needed = int(torch.frexp(present.abs().max() / self.SIDE)[1]) if len(present) else exponent
        # After this many mergers, all bins of one sign are one.
        for _ in range(min(max(needed - exponent, 0), 2 + self.SIDE.bit_length())):
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts.zero_()[self.SIDE // 2 : 3 * self.SIDE // 2] = merged
        self.exponent.fill_(max(needed, exponent))
        places = (present / 2.0 ** int(self.exponent)).floor().long() + self.SIDE
        self.counts += torch.bincount(places, minlength=2 * self.SIDE)

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the grid should span, scalars.

        Raises:
            InputError: nothing was observed.
        """
        rule = self.rule
        counted = self.counts.any() | self.zeros.any() if rule in ("percentile", "mse", "kl") else self.batches
        if not bool(counted):
            raise InputError("an observer has seen nothing: run some training batches through the network first")
        if rule not in ("percentile", "mse", "kl"):
            return self.low, self.high
        used = self.counts.nonzero()[:, 0]
        middles = (used - self.SIDE + 0.5) * 2.0 ** int(self.exponent)
        values = torch.cat([middles.new_zeros(1), middles]).to(self.low.dtype)
        counts = torch.cat([self.zeros[None], self.counts[used]])
        low, high = find_range(values[None], scheme, rule=rule, counts=counts[None], percentile=self.percentile)
        # The middle of a bin may lie beyond its values.
        return torch.maximum(low[0], self.low.clamp_max(0)), torch.minimum(high[0], self.high.clamp_min(0))
