"""A module's checkpoints while its network is compressed: the network gets the structure that a checkpoint tells."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from distill_lightning.compression.structure import note_structure, restore_structure


class Restoring:
    """A module's ``on_load_checkpoint`` that first gives its network the structure it had: of any module.

    Args:
        module: that is loaded.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Restore, then what the module's class does."""
        restore_structure(self.module, checkpoint)
        type(self.module).on_load_checkpoint(self.module, checkpoint)


class Noting(Restoring):
    """Its ``on_save_checkpoint``: Lightning does not ask callbacks about checkpoints of weights alone."""

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """What the module's class does, then the note."""
        type(self.module).on_save_checkpoint(self.module, checkpoint)
        note_structure(self.module, checkpoint)


def free_path(folder: Path) -> Path:
    """Where the compressed network is written: what another run has left there stays, as with `ModelCheckpoint`."""
    names = (f"compressed{f'-v{version}' if version else ''}.ckpt" for version in count())
    return next(folder / name for name in names if not (folder / name).exists())
