"""How checkpoints reach the disk: whole or not at all, with one line for a disk that is full or refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from distill_lightning.storage import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own way to write checkpoints, for which a full disk or a refused folder is an `InputError`.

    The command line and the studies use it; elsewhere it is an argument of the Trainer,
    ``Trainer(plugins=[WholeCheckpointIO()])``. Paths that are not local (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint under a temporary name, and rename it once it is complete.

        Raises:
            InputError: the disk is full or refuses; what was there before is kept.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # As Lightning does: a full disk then stops a write, and not torch.save in the middle.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), [content.getbuffer()])


def write_checkpoints_whole(trainer: pl.Trainer) -> None:
    """Have a Trainer write its checkpoints by `WholeCheckpointIO`, unless it has a way of its own to write them."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
