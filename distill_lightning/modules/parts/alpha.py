"""Self-KD's share of the past, which grows with the training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl

from distill_lightning.errors import InputError, check_finite
from distill_lightning.lightning_internals import begins_anew, planned_epochs
from distill_lightning.part import Part

AlphaSchedule = Literal["linear", "constant"] | Callable[[float], float]


class Alpha(Part):
    r""":math:`\alpha_t`, the past's share in a target, as a function of the progress of a training.

    Args:
        final: :math:`\alpha_T` in ``[0, 1]``.
        schedule: ``"linear"``, ``"constant"``, or a function of the progress in ``(0, 1]`` that gives the factor of
            ``final``.
        unit: whether it changes with every ``"epoch"`` or every optimiser ``"step"``.
        total_epochs: ``T``; ``None``: the Trainer's ``max_epochs``.

    Raises:
        InputError: an option is out of range; in training: its length is not known.

    Example:
        >>> from types import SimpleNamespace
        >>> from distill_lightning.modules.parts.alpha import Alpha
        >>> alpha = Alpha(0.8, "linear", "epoch", total_epochs=4)
        >>> [alpha.at(SimpleNamespace(current_epoch=epoch)) for epoch in range(4)]
        [0.2, 0.4, 0.6000000000000001, 0.8]
    """

    def __init__(
        self, final: float, schedule: AlphaSchedule, unit: Literal["epoch", "step"], total_epochs: int | None
    ) -> None:
        if not 0 <= final <= 1:
            raise InputError(f"alpha_T must be in [0, 1], got {final}")
        if not callable(schedule) and schedule not in ("linear", "constant"):
            raise InputError(f"alpha_schedule must be linear, constant or a function of progress, got {schedule!r}")
        if unit not in ("epoch", "step"):
            raise InputError(f"alpha_unit must be one of epoch, step, got {unit!r}")
        if total_epochs is not None:
            check_finite("total_epochs", total_epochs)
        if total_epochs is not None and total_epochs < 1:
            raise InputError(f"total_epochs must be at least 1, got {total_epochs}")
        self.final, self.schedule, self.unit, self.total_epochs = final, schedule, unit, total_epochs
        self._loaded = self._length = 0

    def at(self, trainer: pl.Trainer) -> float:
        r""":math:`\alpha_t` in the current epoch or step of a training.

        Raises:
            InputError: the length of the training is not known, or the schedule leads out of ``[0, 1]``.
        """
        if self.schedule == "constant":
            return self.final
        progress = self._progress(trainer, training_length(trainer, self.total_epochs))
        if not callable(self.schedule):
            return self.final * progress
        alpha = self.final * self.schedule(progress)
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha_schedule({progress}) times alpha_T is {alpha}: let it stay in [0, 1]")
        return alpha

    def _progress(self, trainer: pl.Trainer, epochs: int) -> float:
        """How much of the training is done when the current epoch or optimiser step is, in ``(0, 1]``; then always 1.

        Raises:
            InputError: steps are counted, and the training data have no length.
        """
        if self.unit == "epoch":
            return min((trainer.current_epoch + 1) / epochs, 1.0)
        steps = steps_of_epoch(trainer)
        if math.isinf(steps):
            raise InputError(
                "alpha_unit='step' needs training data with a length: use 'epoch', or set limit_train_batches"
            )
        return min((trainer.global_step + 1) / (epochs * steps), 1.0)

    def fit_starts(self, module: Any) -> None:
        """Refuse a training of unknown length before anything is done."""
        if self.schedule != "constant":
            training_length(module.trainer, self.total_epochs)

    def training_starts(self, module: Any) -> None:
        """Warn of what will keep alpha from its end, and of a resumed training that has another one."""
        loaded, self._loaded = self._loaded, 0
        if self.schedule == "constant":
            return
        length = self._length = training_length(module.trainer, self.total_epochs)
        if loaded and loaded != length and not begins_anew(module.trainer):
            warnings.warn(
                f"the checkpoint was trained towards {loaded} epochs, now they are {length}: alpha does not go on "
                "where it was; set total_epochs to keep it",
                stacklevel=2,
            )
        ends = early_ends(module.trainer, length)
        if ends:
            warnings.warn(
                f"alpha reaches alpha_T={self.final} in epoch {length}, but training may end earlier because of "
                f"{' and '.join(ends)}: set total_epochs to the epochs that will be trained",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The epochs of the whole training."""
        return {"length": self._loaded or self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._loaded = state["length"]


def alpha_of(
    module: Any, final: float, schedule: AlphaSchedule, unit: Literal["epoch", "step"], total_epochs: int | None
) -> Alpha:
    """The `Alpha` of a module's arguments ``alpha_T``, ``alpha_schedule``, ``alpha_unit`` and ``total_epochs``.

    Raises:
        InputError: one is out of range, or would do nothing.
    """
    if schedule == "constant":
        module.refuse_unused("alpha_unit", unit, "with alpha_schedule='constant'")
        module.refuse_unused("total_epochs", total_epochs, "with alpha_schedule='constant'")
    return Alpha(final, schedule, unit, total_epochs)


def training_length(trainer: pl.Trainer, total_epochs: int | None) -> int:
    """``T``, the epochs of the whole training; that in which stochastic averaging measures statistics is none of them.

    Raises:
        InputError: neither ``total_epochs`` nor the trainer tells it.

    Example:
        >>> from types import SimpleNamespace
        >>> from distill_lightning.modules.parts.alpha import training_length
        >>> training_length(SimpleNamespace(max_epochs=30), total_epochs=None)
        30
        >>> training_length(SimpleNamespace(max_epochs=30), total_epochs=100)
        100
    """
    length = total_epochs or planned_epochs(trainer)
    if length is None or length < 1:
        raise InputError(
            "alpha grows with the training, whose length is not known: give total_epochs or Trainer(max_epochs)"
        )
    return length


def steps_of_epoch(trainer: pl.Trainer) -> float:
    """Optimiser steps of an epoch; infinite where the training data have no length.

    Example:
        >>> from types import SimpleNamespace
        >>> from distill_lightning.modules.parts.alpha import steps_of_epoch
        >>> steps_of_epoch(SimpleNamespace(num_training_batches=10, accumulate_grad_batches=4))
        3
    """
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def early_ends(trainer: pl.Trainer, epochs: int) -> list[str]:
    """What will or may end the training before so many epochs."""
    ends = []
    planned = planned_epochs(trainer)
    if planned is not None and 0 <= planned < epochs:
        ends.append(f"max_epochs={planned}")
    if 0 <= trainer.max_steps < epochs * steps_of_epoch(trainer):
        ends.append(f"max_steps={trainer.max_steps}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # not declared by Lightning
        if isinstance(callback, pl.callbacks.EarlyStopping):
            ends.append("EarlyStopping")
        if isinstance(callback, pl.callbacks.Timer) and callback.time_remaining() is not None:
            ends.append("a time limit")
    return ends
