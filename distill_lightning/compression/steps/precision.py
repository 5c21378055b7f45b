"""How many bits every weight gets: one number for all, by patterns, or what a budget of bytes allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from distill_lightning.compression import quantizers
from distill_lightning.compression.quantizers.ranges import RangeRule
from distill_lightning.compression.quantizers.scheme import Kind, Scheme
from distill_lightning.errors import InputError


class MixedPrecision:
    """As many bits for each weight as a budget allows, more where they take away more squared error.

    Args:
        budget_bytes: of the codes, scales and zero points of all quantized weights together.
        ratio: the same as a share of these weights' bytes in float, instead of ``budget_bytes``.
        choices: the numbers of bits that a weight may get, 2 to 8.

    Raises:
        InputError: neither or both of the budgets, one that is not positive, or choices that are none.
    """

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        ratio: float | None = None,
        choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    ) -> None:
        if (budget_bytes is None) == (ratio is None):
            raise InputError("MixedPrecision: give budget_bytes or ratio, and not both")
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
        """The number of bits of every weight.

        Args:
            weights: by name.
            fixed: of those whose bits are given; they count in the budget.
            kind: of the grid.
            per: see `Scheme`.
            axes: of the weights' channels, likewise, by name.
            rule: of the ranges, see `find_range`.

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
    """Bytes that a quantized weight has beside its codes: scales in float32, zero points of up to one byte each."""
    scale, _ = quantizers.weight_grid(weight, scheme)
    return scale.numel() * (scale.element_size() + (scheme.kind == "affine"))
