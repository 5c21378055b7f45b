"""Allocation of bits to weights within a common budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from distill_lightning.compression.values.ranges import RangeRule, weight_grid
from distill_lightning.compression.values.scheme import Kind, Scheme, dequantize, quantize
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


class _Raise(NamedTuple):
    """A step to more bits: the error that it removes per byte, and its cost."""

    gain: float
    name: str
    bits: int
    cost: int


def weight_errors(
    weight: Tensor,
    *,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    kind: Kind = "symmetric",
    per: str = "channel",
    axis: int = 0,
    groups: int = 1,
    rule: RangeRule = "mse",
) -> dict[int, float]:
    """The squared error of a weight at each of some numbers of bits; the options are those of `Scheme` and a rule."""
    errors = {}
    for width in bits:
        scheme = Scheme(width, kind, per if weight.ndim > 1 else "tensor", axis, groups)
        rounded = dequantize(quantize(weight, *weight_grid(weight, scheme, rule=rule), scheme), scheme)
        errors[width] = float((rounded - wide(weight.detach())).double().square().sum())
    return errors


def code_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes."""
    return -(-count * bits // 8)


def allocate_bits(
    errors: Mapping[str, Mapping[int, float]],
    counts: Mapping[str, int],
    *,
    budget: int,
    overhead: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Spend a budget of bytes where a byte removes most error.

    All weights begin with the fewest bits. As long as there is room, the weight and number of bits with the largest
    fall of error per byte are chosen; weights that would not improve stay as they are. The first step that does not fit
    ends the search, although a cheaper one might still fit: a larger budget then goes further along the same path and
    never gives a weight fewer bits.

    Args:
        errors: errors by name and number of bits, of any kind that may be summed over the weights (`weight_errors`, or
            the rise of a loss).
        counts: number of codes of each weight.
        budget: bytes of all codes and overheads together.
        overhead: bytes that each weight needs besides its codes; ``None`` for none.

    Returns:
        The number of bits of each weight, by name.

    Raises:
        InputError: the names differ, a weight has no number of bits, or the fewest bits do not fit.
    """
    overhead = overhead or {}
    if errors.keys() != counts.keys() or overhead.keys() - counts.keys():
        raise InputError("errors, counts and overhead must have the same weights")
    empty = [name for name, widths in errors.items() if not widths]
    if empty:
        raise InputError(f"no number of bits was tried for {empty[0]!r}")
    chosen = {name: min(widths) for name, widths in errors.items()}
    spent = sum(code_bytes(counts[name], chosen[name]) + overhead.get(name, 0) for name in chosen)
    if spent > budget:
        raise InputError(f"budget={budget} bytes is too small: the fewest bits everywhere need {spent}")
    while True:
        steps = [
            _Raise((widths[chosen[name]] - error) / max(cost, 1), name, bits, cost)
            for name, widths in errors.items()
            for bits, error in widths.items()
            if bits > chosen[name] and error < widths[chosen[name]]
            for cost in [code_bytes(counts[name], bits) - code_bytes(counts[name], chosen[name])]
        ]
        if not steps:
            return chosen
        best = max(steps)
        if spent + best.cost > budget:
            return chosen
        spent += best.cost
        chosen[best.name] = best.bits
