"""Which task a comparison's data are for."""

from __future__ import annotations

from typing import Any

from distill_lightning.errors import InputError
from distill_lightning.studies.compare.outputs_task import Classification, Regression
from distill_lightning.studies.compare.scored_task import Detection, Translation
from distill_lightning.studies.compare.task import Task

_NAMED = {"translation": Translation, "detection": Detection}


def task_of(data: Any) -> Task:
    """The task of a data module.

    Args:
        data: with a ``task`` that names it; without, it is classification, or where ``num_classes`` is ``None`` and
            there is a ``num_targets``, regression.

    Raises:
        InputError: there is no such task.
    """
    name = getattr(data, "task", None)
    if name is None:
        is_regression = getattr(data, "num_classes", None) is None and getattr(data, "num_targets", None) is not None
        return Regression() if is_regression else Classification()
    if name not in _NAMED:
        raise InputError(
            f"data: {type(data).__name__} is for the task {name!r}, which compare does not know: one of "
            f"{', '.join(_NAMED)}, or no attribute task"
        )
    return _NAMED[name]()
