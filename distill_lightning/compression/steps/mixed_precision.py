"""Bits for each weight under a common budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distill_lightning.choices import Choice
from distill_lightning.compression.access.weights import channel_axis, channel_groups
from distill_lightning.compression.values.allocation import allocate_bits, weight_errors
from distill_lightning.compression.values.ranges import RangeRule, weight_grid
from distill_lightning.compression.values.scheme import Kind, Scheme
from distill_lightning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Choice):
    """Distributes bits over the weights within a budget, more where they reduce the squared error more.

    Args:
        budget_bytes: bytes of the codes, scales and zero points of all quantized weights together.
        ratio: the budget as a share of these weights' bytes in float, instead of ``budget_bytes``.
        choices: the numbers of bits that a weight may have, from 2 to 8.

    Raises:
        InputError: not exactly one budget is given, the budget is not positive, or ``choices`` are invalid.
    """

    budget_bytes: int | None = None
    ratio: float | None = None
    choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        self.check_numbers()
        if (self.budget_bytes is None) == (self.ratio is None):
            raise InputError("MixedPrecision: give either budget_bytes or ratio")
        budget = self.budget_bytes if self.ratio is None else self.ratio
        if budget is None or budget <= 0:
            raise InputError(f"MixedPrecision: the budget must be positive, got {budget}")
        if not self.choices or any(bits not in range(2, 9) for bits in self.choices):
            raise InputError(f"MixedPrecision: choices are numbers of bits from 2 to 8, got {list(self.choices)}")

    def allocate(
        self,
        weights: Mapping[str, Tensor],
        fixed: Mapping[str, int],
        *,
        kind: Kind,
        per: str,
        layers: Mapping[str, nn.Module],
        rule: RangeRule,
    ) -> dict[str, int]:
        """Choose the number of bits of every weight.

        Numbers of bits that are given, ``fixed``, count towards the budget; ``layers`` have the weights.
        """
        errors = {
            name: weight_errors(
                weight,
                bits=[fixed[name]] if name in fixed else sorted(set(self.choices)),
                kind=kind,
                per=per,
                axis=channel_axis(layers[name]),
                groups=channel_groups(layers[name]),
                rule=rule,
            )
            for name, weight in weights.items()
        }
        budget = self.budget_bytes
        if budget is None:
            whole = sum(weight.numel() * weight.element_size() for weight in weights.values())
            budget = int(whole * (self.ratio or 0))
        return allocate_bits(
            errors,
            {name: weight.numel() for name, weight in weights.items()},
            budget=budget,
            overhead={
                name: scale_bytes(
                    weight, Scheme(8, kind, per, channel_axis(layers[name]), channel_groups(layers[name]))
                )
                for name, weight in weights.items()
            },
        )


def scale_bytes(weight: Tensor, scheme: Scheme) -> int:
    """Bytes of a quantized weight besides its codes: scales in float32, and zero points of up to one byte each."""
    scale, _ = weight_grid(weight, scheme)
    return scale.numel() * (scale.element_size() + (scheme.kind == "affine"))
