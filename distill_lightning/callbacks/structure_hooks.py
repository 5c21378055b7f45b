"""A module's checkpoints while its network is compressed: the network gets the structure that a checkpoint tells."""

from __future__ import annotations

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
