"""Checks of which options of `Prune` can be combined."""

from __future__ import annotations

from typing import Literal, get_args

from distill_lightning.compression.schedules import Cubic, Iterative, OneShot, Schedule, Threshold
from distill_lightning.compression.selection import Granularity
from distill_lightning.compression.steps.sensitivity_scope import Sensitivity
from distill_lightning.compression.steps.units import UNITS, Backend
from distill_lightning.compression.steps.weights import SCORERS, SWEPT
from distill_lightning.errors import InputError

Criterion = Literal[
    "magnitude", "random", "gradient", "taylor", "obd", "obs", "obs_update", "snip", "bn_scale", "movement",
    "soft_movement",
]  # fmt: skip
LEARNED = ("movement", "soft_movement")


def check_options(
    *,
    amount: float | dict[str, float] | None,
    criterion: str,
    granularity: str,
    scope: str | Sensitivity,
    schedule: Schedule | Threshold,
    budget: str | None,
    round_to: int,
    rewind: int | str | None,
    regrow: float,
    penalty_weight: float | None,
    backend: str,
) -> None:
    """Refuse options of `Prune` that cannot be combined.

    Raises:
        InputError: the options cannot be combined, for a reason that the message gives.
    """
    known = [*SCORERS, "bn_scale", *LEARNED]
    if criterion not in known:
        raise InputError(f"Prune: criterion must be one of {', '.join(known)}, got {criterion!r}")
    units = granularity in UNITS
    if not units and granularity.isalpha() and granularity not in ("weight", "row"):
        raise InputError(
            f"Prune: granularity must be 'weight', 'row', 'block:4x8', '2:4' or one of {', '.join(UNITS)}, "
            f"got {granularity!r}"
        )
    fixed = not units and Granularity.parse(granularity).kind == "n:m"
    threshold, at_once = isinstance(schedule, Threshold), isinstance(schedule, OneShot)
    learned = criterion in LEARNED
    amounts = list(amount.values()) if isinstance(amount, dict) else [amount or 0.0]
    by_scan = isinstance(scope, Sensitivity)
    sources = [amount is not None, budget is not None, threshold, fixed, by_scan]
    for wrong, reason in (
        (
            sum(sources) != 1,
            "give exactly one of an amount, a budget, a Threshold, a Sensitivity and a granularity such as '2:4'",
        ),
        (min(amounts, default=-1) < 0 or max(amounts, default=1) > 1, f"amount must be between 0 and 1, got {amount}"),
        (not units and budget is not None, "budget is for channels and similar units: give an amount"),
        (not units and criterion == "bn_scale", "criterion 'bn_scale' needs granularity 'channel'"),
        (
            units and (learned or criterion in SWEPT),
            f"criterion {criterion!r} is for weights, not for granularity {granularity!r}: use 'taylor'",
        ),
        (learned and granularity != "weight", f"criterion {criterion!r} needs granularity 'weight'"),
        (criterion == "soft_movement" and not threshold, "criterion 'soft_movement' needs a Threshold"),
        (criterion == "movement" and threshold, "criterion 'movement' needs an amount, not a Threshold"),
        (
            criterion == "movement" and (isinstance(schedule, OneShot | Iterative) or _initial(schedule) > 0),
            "criterion 'movement' needs a schedule that begins at 0, Cubic(initial=0): before training all scores are "
            "equal",
        ),
        (criterion == "obs_update" and threshold, "criterion 'obs_update' needs an amount, not a Threshold"),
        (fixed and not at_once, f"granularity {granularity!r} needs OneShot"),
        (granularity == "layer" and not at_once, "granularity 'layer' needs OneShot: no mask skips a layer"),
        (not by_scan and scope not in ("global", "layer"), f"scope must be 'global' or 'layer', got {scope!r}"),
        (
            threshold and scope == "layer",
            "scope='layer' has no effect with a Threshold, under which units do not compete: leave it out",
        ),
        (
            penalty_weight is not None and criterion != "soft_movement",
            "penalty_weight is for criterion 'soft_movement': leave it out",
        ),
        (
            penalty_weight is not None and penalty_weight < 0,
            f"penalty_weight must not be negative, got {penalty_weight}",
        ),
        (backend not in get_args(Backend), f"backend must be {' or '.join(get_args(Backend))}, got {backend!r}"),
        (backend != "own" and granularity != "channel", f"backend {backend!r} needs granularity 'channel'"),
        (by_scan and learned, f"criterion {criterion!r} is learned, but a Sensitivity scans before training"),
        (round_to < 1, f"round_to must be at least 1, got {round_to}"),
        (round_to > 1 and granularity != "channel", "round_to needs granularity 'channel'"),
        (not 0 <= regrow < 1, f"regrow must be a share of the pruned weights, below 1, got {regrow}"),
        (
            regrow > 0 and (granularity != "weight" or learned or threshold or at_once),
            "regrow needs granularity 'weight' and a schedule of several updates: Iterative or Cubic",
        ),
        (
            rewind is not None and budget is not None and not at_once,
            "rewind with a budget needs OneShot",
        ),
        (
            rewind is not None and (learned or isinstance(schedule, Cubic | Threshold)),
            "rewind needs OneShot or Iterative, and a criterion that is not learned",
        ),
        (
            isinstance(rewind, bool) or (isinstance(rewind, str) and rewind not in ("start", "random")),
            f"rewind must be an epoch, 'start' or 'random', got {rewind!r}",
        ),
        (isinstance(rewind, int) and rewind < 0, f"rewind must be an epoch of at least 0, got {rewind!r}"),
    ):
        if wrong:
            raise InputError(f"Prune: {reason}")


def _initial(schedule: Schedule | Threshold) -> float:
    return schedule.initial if isinstance(schedule, Cubic) else 0.0
