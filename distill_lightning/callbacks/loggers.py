"""What is handed to the loggers of a Trainer, each in its own way, and kept in files where one has none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

Take = Callable[[Any, str, Any, int], object]
"""How a logger takes something: the logger, a name, what it is, and the training step."""


def hand_over(trainer: pl.Trainer, takes: Mapping[str, Take], name: str, thing: Any, step: int) -> None:
    """Give something to every logger; only the first process does anything, and only if there are loggers.

    Args:
        trainer: with the loggers.
        takes: by the name of a logger's class, or of one of its base classes, because no logger's package is required;
            that of ``"Logger"`` is for all others.
        name: of the thing in the logger.
        thing: what they get.
        step: the training step it belongs to.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        kinds = [kind.__name__ for kind in type(logger).__mro__]
        # With fast_dev_run, it replaces every logger.
        if "DummyLogger" not in kinds:
            take = takes[next((kind for kind in kinds if kind in takes), "Logger")]
            take(logger, name, thing, step)


def folder_of(logger: Any, what: str, name: str) -> Path | None:
    """Where files of a logger are kept that takes no such things itself; ``None``, with a warning: it has no folder.

    Args:
        logger: any.
        what: the things are, ``"figures"`` say, and what their folder is called.
        name: of the thing, for the warning.
    """
    # A logger that makes its folder later would warn that it is not empty.
    _ = logger.experiment
    folder = getattr(logger, "log_dir", None) or logger.save_dir
    if not isinstance(folder, (str, os.PathLike)):
        warnings.warn(f"{type(logger).__name__} takes no {what} and has no folder: {name} is not kept", stacklevel=2)
        return None
    return Path(folder) / what
