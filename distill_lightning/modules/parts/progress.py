"""How far a training is, whether it will come to its end, and which of its batches are mixed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import pytorch_lightning as pl

from distill_lightning.errors import InputError

AlphaSchedule = Literal["linear", "constant"] | Callable[[float], float]


def training_length(trainer: pl.Trainer, total_epochs: int | None) -> int:
    """``T``, the epochs of the whole training.

    Raises:
        InputError: neither ``total_epochs`` nor the trainer tells it.
    """
    length = total_epochs or trainer.max_epochs
    if length is None or length < 1:
        raise InputError(
            "alpha grows with the training, whose length is not known: give total_epochs or Trainer(max_epochs)"
        )
    return length


def steps_of_epoch(trainer: pl.Trainer) -> float:
    """Optimiser steps of an epoch; infinite where the training data have no length."""
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def training_progress(trainer: pl.Trainer, epochs: int, unit: Literal["epoch", "step"]) -> float:
    """How much of the training is done when the current epoch or optimiser step is, in ``(0, 1]``; then always 1.

    Raises:
        InputError: steps are counted, and the training data have no length.
    """
    if unit == "epoch":
        return min((trainer.current_epoch + 1) / epochs, 1.0)
    steps = steps_of_epoch(trainer)
    if math.isinf(steps):
        raise InputError("alpha_unit='step' needs training data with a length: use 'epoch', or set limit_train_batches")
    return min((trainer.global_step + 1) / (epochs * steps), 1.0)


def early_ends(trainer: pl.Trainer, epochs: int) -> list[str]:
    """What will or may end the training before so many epochs."""
    ends = []
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < epochs:
        ends.append(f"max_epochs={trainer.max_epochs}")
    if 0 <= trainer.max_steps < epochs * steps_of_epoch(trainer):
        ends.append(f"max_steps={trainer.max_steps}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # not declared by Lightning
        if isinstance(callback, pl.callbacks.EarlyStopping):
            ends.append("EarlyStopping")
        if isinstance(callback, pl.callbacks.Timer) and callback.time_remaining() is not None:
            ends.append("a time limit")
    return ends


def is_mixed(seed: int, epoch: int, number: int, *, probability: float) -> bool:
    """Whether a batch is mixed: decided on the host, and the same in every process.

    Args:
        seed: any integer.
        epoch: counted from 0.
        number: of the batch in its epoch.
        probability: share of the batches that are.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < probability
