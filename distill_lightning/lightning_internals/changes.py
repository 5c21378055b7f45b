"""How a Trainer is told that the network it trains has changed."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from distill_lightning.errors import InputError
from distill_lightning.lightning_internals.batches import watch_first_loader

AVERAGING: tuple[Any, ...] = (
    pl.callbacks.StochasticWeightAveraging,
    # Since Lightning 2.6.
    *([pl.callbacks.WeightAveraging] if hasattr(pl.callbacks, "WeightAveraging") else []),
)
"""Callbacks that keep an average of the parameters that there were at first."""


_NEVER_REACHED = 10**9


def refuse_reshaping(trainer: Any, name: str) -> None:
    """Refuse a training in which something holds on to the parameters that there were.

    Raises:
        InputError: several processes, a strategy for several, or a callback that averages.
    """
    if trainer.world_size > 1:
        raise InputError(
            f"step {name} gives the network other parameters, which several processes cannot agree on: train it in "
            "one (devices=1), or give it at='end'"
        )
    if isinstance(trainer.strategy, pl.strategies.ParallelStrategy):
        raise InputError(
            f"step {name} gives the network other parameters, and {type(trainer.strategy).__name__} holds on to those "
            "of before, also on one device: leave strategy out, or give the step at='end'"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            raise InputError(
                f"step {name} gives the network other parameters, of which {type(callback).__name__} keeps no "
                "average: leave one of them out, or give the step at='end'"
            )


def keep_patience(trainer: Any) -> None:
    """Have no `EarlyStopping` lose its patience as long as there are phases to come; each of them begins at zero."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.EarlyStopping):
            # Lightning asks it after all other callbacks: what it counts then must be too little.
            callback.wait_count = -_NEVER_REACHED


def stand_last(trainer: Any, callback: pl.Callback) -> None:
    """Come after the callbacks that write weights, and before those that save them."""
    others = [other for other in trainer.callbacks if other is not callback]
    place = next((n for n, other in enumerate(others) if isinstance(other, pl.callbacks.Checkpoint)), len(others))
    # A new list, because Lightning is walking through the old one.
    trainer.callbacks = [*others[:place], callback, *others[place:]]


def new_optimizer(trainer: pl.Trainer, old: Optimizer, *, restart: bool) -> None:
    """Have the module make its optimiser and schedule for the parameters that there are now."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    trainer.strategy.setup_optimizers(trainer)
    watch_first_loader(trainer)
    if restart:
        return
    for group, before in zip(trainer.optimizers[0].param_groups, old.param_groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})
    for config, schedule in zip(trainer.lr_scheduler_configs, schedules, strict=True):
        config.scheduler.load_state_dict(schedule.state_dict())


def forget_best(trainer: Any) -> None:
    """What was the best so far was another network: whatever comes now is better."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.best_k_models = {path: worst.to(score.device) for path, score in callback.best_k_models.items()}
            callback.kth_value = worst
            callback.best_model_score = worst if callback.best_k_models else None
        elif isinstance(callback, pl.callbacks.EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
