"""Checks of the sizes that networks are built with."""

from __future__ import annotations

from collections.abc import Mapping

from distill_lightning.errors import InputError


def check_sizes(who: str, sizes: Mapping[str, int | None]) -> None:
    """Refuse sizes below 1.

    Raises:
        InputError: a size is below 1 or missing; the message begins with ``who``.
    """
    for name, value in sizes.items():
        if value is None or value < 1:
            raise InputError(f"{who}: {name} must be at least 1, got {value}")
