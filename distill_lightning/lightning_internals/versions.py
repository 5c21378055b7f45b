"""Which Lightning there is, and what it cannot do."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl

from distill_lightning.errors import InputError

VERSION = tuple(map(int, pl.__version__.split(".")[:2]))

# Lightning 2.6 uses a class that torch 2.14 renames: nobody who trains a module can do anything about it.
warnings.filterwarnings(
    "ignore",
    message=".isinstance.treespec, LeafSpec.. is deprecated",
    category=FutureWarning,
    module=r"pytorch_lightning\.utilities\._pytree",
)


def refuse_mid_epoch(trainer: Any) -> None:
    """Refuse to go on with a training from inside an epoch where Lightning would read batches twice or never.

    Raises:
        InputError: Lightning is older than 2.5.
    """
    loops = trainer._checkpoint_connector._loaded_checkpoint.get("loops")
    if VERSION >= (2, 5) or not loops:
        return
    epoch, batch = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    if epoch["current"]["processed"] < epoch["current"]["ready"]:
        raise InputError(
            f"pytorch-lightning {pl.__version__} cannot go on from inside an epoch, and the checkpoint was made after "
            f"{batch['current']['ready']} of its batches: install pytorch-lightning>=2.5, or take the checkpoint of an "
            "epoch's end"
        )
