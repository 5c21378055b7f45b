"""A module's checkpoints while its network is compressed: the network gets the structure that a checkpoint tells."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from distill_lightning.compression.structure.checkpoints import note_structure, restore_structure


class LoadHook:
    """The ``on_load_checkpoint`` of a module of any class.

    It first gives the module's network the structure that it had in the checkpoint.

    Args:
        module: that is loaded.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Restore, then what the module's class does."""
        restore_structure(self.module, checkpoint)
        type(self.module).on_load_checkpoint(self.module, checkpoint)


class SaveHook(LoadHook):
    """The ``on_save_checkpoint`` of a module of any class: adds the network's structure.

    Lightning does not call callbacks' hooks for checkpoints of weights alone.
    """

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """What the module's class does, then the note."""
        type(self.module).on_save_checkpoint(self.module, checkpoint)
        note_structure(self.module, checkpoint)


def write_compressed(trainer: pl.Trainer) -> None:
    """Write the module as it is now beside the checkpoints of every `ModelCheckpoint`, see `CompressionCallback`.

    Where a `ModelCheckpoint` has seen no validation since the last phase began, this is its best network.

    Args:
        trainer: the Trainer of the training that ends.
    """
    written: dict[Path, Path] = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.dirpath is not None:
            folder = Path(callback.dirpath)
            if folder not in written:
                written[folder] = trainer.strategy.broadcast(_free_path(folder))
                trainer.save_checkpoint(written[folder], weights_only=True)
            if callback.best_model_score is None or math.isinf(float(callback.best_model_score)):
                callback.best_model_path = str(written[folder])


def _free_path(folder: Path) -> Path:
    """Where the compressed network is written: what another run has left there stays, as with `ModelCheckpoint`."""
    names = (f"compressed{f'-v{version}' if version else ''}.ckpt" for version in count())
    return next(folder / name for name in names if not (folder / name).exists())
