"""What the arguments of `ExtracurricularModule` may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.layers import freeze
from distill_lightning.modules.hparams import refuse_unused

_CHOICES = {
    "task": ("classification", "regression"),
    "match": ("distribution", "point"),
    "sample_selection": ("all", "certain", "uncertain"),
    "kl_direction": ("forward", "reverse"),
    "bn_mode": ("joint", "separate"),
}


def check_choices(given: Mapping[str, str]) -> None:
    """Refuse unknown names."""
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise InputError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")


def check_unused(kind: type, given: Mapping[str, Any]) -> None:
    """Refuse what has no meaning beside the choices that were made.

    Args:
        kind: the module, whose defaults are no request.
        given: its arguments.
    """
    regression, point = given["task"] == "regression", given["match"] == "point"
    unused = {
        "temperature": regression or point,
        "point_variance": not (regression and point),
        "kl_direction": point,
        "teacher_variance": not regression,
    }
    choices = f"task={given['task']!r} and match={given['match']!r}"
    refuse_unused(
        kind,
        f"with {choices}",
        **{name: given[name] for name, is_unused in unused.items() if is_unused},
    )


def frozen_samplers(samplers: Sequence[nn.Module], weights: Sequence[float] | None) -> nn.ModuleList:
    """The samplers as frozen modules."""
    kinds = [type(sampler).__name__ for sampler in samplers if not isinstance(sampler, nn.Module)]
    if kinds:
        raise InputError(f"samplers must be modules, got {', '.join(kinds)}: wrap a function in FunctionSampler")
    if weights is not None and (len(weights) != len(samplers) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        wanted = f"{len(samplers)} finite numbers, none negative and not all zero"
        raise InputError(f"sampler_weights must be {wanted}, got {weights}")
    return freeze(nn.ModuleList(samplers))


def per_target(variance: float | Sequence[float] | None, num_targets: int | None) -> list[float] | None:
    """One variance for each target."""
    if variance is None or num_targets is None:
        return None
    values = [float(variance)] * num_targets if isinstance(variance, (int, float)) else [float(v) for v in variance]
    if len(values) != num_targets or not all(value > 0 for value in values):
        raise InputError(f"teacher_variance must be positive, one number or one for each of {num_targets}: {variance}")
    return values
