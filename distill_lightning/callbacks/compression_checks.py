"""Trainings in which a network cannot be compressed, refused before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl

from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import refuse_reshaping, spawns


def check_trainer(trainer: Any, pl_module: pl.LightningModule, attribute: str, others: Sequence[str]) -> None:
    """Refuse a training that is not as many epochs as were asked for, or that two compressions share.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        attribute: the module's network that is compressed.
        others: the networks that other callbacks of this Trainer compress.

    Raises:
        InputError: it is one.
    """
    if trainer.fast_dev_run:
        raise InputError(
            "fast_dev_run ends before the steps of a compression: leave it out, and give the Trainer a small "
            "limit_train_batches instead"
        )
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise InputError("compression needs the number of epochs: give the Trainer max_epochs")
    if trainer.max_steps != -1:
        raise InputError(
            f"the phases of a compression are counted in epochs, and max_steps={trainer.max_steps} may end the "
            "training before the steps: leave max_steps out"
        )
    if others:
        raise InputError(
            f"two CompressionCallbacks at once, of {attribute!r} and {others[0]!r}: compress one network of "
            f"{type(pl_module).__name__} after the other"
        )


def check_steps(trainer: pl.Trainer, pl_module: Any, compressor: Compressor) -> None:
    """Refuse now what could only be refused in the middle of the training otherwise.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        compressor: the compressor, with its plan.

    Raises:
        InputError: the module is compiled, or a step gives the network parameters that this training cannot take over.
    """
    if getattr(pl_module, "compiles", False):
        raise InputError("compile: a network cannot be compressed while it is compiled: leave compile out")
    epochs = cast("int", trainer.max_epochs)
    at_end = [phase for phase in compressor.phases if phase.step.gives_other_parameters]
    reshaping = [phase for phase in at_end if phase.begin < epochs]
    if reshaping:
        refuse_reshaping(trainer, reshaping[0].name)
    if at_end and trainer.world_size > 1 and spawns(trainer):
        raise InputError(
            f"step {at_end[0].name} gives the network other parameters, which do not come back from spawned "
            "processes: give the Trainer strategy='ddp', or devices=1"
        )
