"""The first batches of a training, read ahead of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.layers import by_position
from distill_lightning.lightning_internals import TrainersBatches, training_loaders, undrawn


def first_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, number: int
) -> Sequence[tuple[Any, Any]]:
    """The first batches of the training data as the next epoch gives them, the same in every process.

    Random states and the Trainer's data are left as they were.

    Args:
        trainer: the Trainer of the current training.
        pl_module: its module.
        network: the network that they are for.
        number: how many; fewer, if an epoch has no more.

    Returns:
        The network's arguments and the targets of each.

    Raises:
        InputError: the training reads from several loaders.
    """
    loader = training_loaders(trainer)
    loader = loader[0] if isinstance(loader, (list, tuple)) and len(loader) == 1 else loader
    if loader is None or isinstance(loader, (list, tuple, dict)):
        raise InputError("compression reads calibration data from one train_dataloader: give one, not several")
    # The epoch's own loader counts what it has given.
    loader = copy.copy(loader)
    own = TrainersBatches(trainer, pl_module, loader, number=0, training=True)
    with isolate_rng(), undrawn(loader):
        batches = [Batch.of(batch) for batch in islice(own, number)]
    pairs = [(by_position(network, batch.input), batch.target) for batch in batches]
    if trainer.world_size > 1:
        pairs = trainer.strategy.broadcast(pairs)
    return pairs
