"""What the arguments may be."""

from __future__ import annotations

import torch

from distill_lightning.errors import InputError, refusing
from distill_lightning.modules.parts.progress import AlphaSchedule

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_choices(past: str, alpha_schedule: AlphaSchedule, alpha_unit: str, store_dtype: str) -> None:
    """Refuse unknown names."""
    for name, value, known in (
        ("past", past, ("stored", "past_model", "ema")),
        ("alpha_unit", alpha_unit, ("epoch", "step")),
        ("store_dtype", store_dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not callable(alpha_schedule) and alpha_schedule not in ("linear", "constant"):
        raise InputError(f"alpha_schedule must be linear, constant or a function of progress, got {alpha_schedule!r}")


def check_device(store_device: str | None) -> None:
    """Refuse what is no device."""
    with refusing(f"store_device={store_device!r}", RuntimeError):
        torch.device(store_device or "cpu")


def check_shares(*, below_one: bool = False, **shares: float) -> None:
    """Refuse what is outside of ``[0, 1]``, or ``[0, 1)``."""
    for name, share in shares.items():
        if not 0 <= share <= 1 or (below_one and share == 1):
            raise InputError(f"{name} must be in [0, 1{')' if below_one else ']'}, got {share}")


def check_counts(**counts: int | None) -> None:
    """Refuse zero and less."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")


def check_files(store_in_checkpoint: int, store_keep: int) -> None:
    """Refuse a negative size, and to keep less than a training can be resumed from."""
    if store_in_checkpoint < 0:
        raise InputError(
            f"store_in_checkpoint cannot be negative, got {store_in_checkpoint}: 0 keeps every store in files"
        )
    if store_keep < 2:
        raise InputError(
            f"store_keep must be at least 2, the new rows and those of the last checkpoint, got {store_keep}"
        )
