"""The number of bits of every weight: one for all, by patterns, or as a budget of bytes allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from distill_lightning.compression import quantizers
from distill_lightning.compression.quantizers.ranges import RangeRule
from distill_lightning.compression.quantizers.scheme import Kind, Scheme
from distill_lightning.errors import InputError


class MixedPrecision:
    """Distributes bits over the weights within a budget, more where they reduce the squared error more.

    Args:
        budget_bytes: bytes of the codes, scales and zero points of all quantized weights together.
        ratio: the budget as a share of these weights' bytes in float, instead of ``budget_bytes``.
        choices: the numbers of bits that a weight may have, from 2 to 8.

    Raises:
        InputError: not exactly one budget is given, the budget is not positive, or ``choices`` are invalid.
    """

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        ratio: float | None = None,
        choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    ) -> None:
        if (budget_bytes is None) == (ratio is None):
            raise InputError("MixedPrecision: give either budget_bytes or ratio")
        if (budget_bytes if ratio is None else ratio or 0) <= 0:  # type: ignore[operator]  # one of them is a number
            raise InputError(f"MixedPrecision: the budget must be positive, got {budget_bytes or ratio}")
        if not choices or any(bits not in range(2, 9) for bits in choices):
            raise InputError(f"MixedPrecision: choices are numbers of bits from 2 to 8, got {list(choices)}")
        self.budget_bytes, self.ratio, self.choices = budget_bytes, ratio, tuple(sorted(set(choices)))

    def __repr__(self) -> str:
        budget = f"budget_bytes={self.budget_bytes}" if self.ratio is None else f"ratio={self.ratio}"
        return f"MixedPrecision({budget}, choices={list(self.choices)})"

    def allocate(
        self,
        weights: Mapping[str, Tensor],
        fixed: Mapping[str, int],
        *,
        kind: Kind,
        per: str,
        axes: Mapping[str, int],
        rule: RangeRule,
    ) -> dict[str, int]:
        """Choose the number of bits of every weight.

        Args:
            weights: the weights by name.
            fixed: numbers of bits that are given, by name; they count towards the budget.
            kind: kind of the grid.
            per: see `Scheme`.
            axes: axes of the weights' channels by name, see `Scheme`.
            rule: rule of the ranges, see `find_range`.

        Raises:
            InputError: the fewest bits do not fit into the budget.
        """
        errors = {
            name: quantizers.weight_errors(
                {name: weight},
                bits=[fixed[name]] if name in fixed else self.choices,
                kind=kind,
                per=per,
                axes=axes,
                rule=rule,
            )[name]
            for name, weight in weights.items()
        }
        budget = self.budget_bytes
        if budget is None:
            whole = sum(weight.numel() * weight.element_size() for weight in weights.values())
            budget = int(whole * (self.ratio or 0))
        return quantizers.allocate_bits(
            errors,
            {name: weight.numel() for name, weight in weights.items()},
            budget=budget,
            overhead={name: scale_bytes(weight, Scheme(8, kind, per, axes[name])) for name, weight in weights.items()},
        )


def scale_bytes(weight: Tensor, scheme: Scheme) -> int:
    """Bytes of a quantized weight besides its codes: scales in float32, and zero points of up to one byte each."""
    scale, _ = quantizers.weight_grid(weight, scheme)
    return scale.numel() * (scale.element_size() + (scheme.kind == "affine"))
