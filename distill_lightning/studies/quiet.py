"""What Lightning says about things that are meant to be so, and need not be heard."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distill_lightning

_PACKAGE = Path(distill_lightning.__file__).parent
_LOGGERS = ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero")


@contextmanager
def quietly() -> Iterator[None]:
    """`quiet_down` for the block alone: what a notebook does beside it is heard as ever."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, filters = [logger.level for logger in loggers], [list(logger.filters) for logger in loggers]
    try:
        with warnings.catch_warnings():
            quiet_down()
            yield
    finally:
        for logger, level, own in zip(loggers, levels, filters, strict=True):
            logger.setLevel(level)
            logger.filters[:] = own


def quiet_down() -> None:
    """Leave out what Lightning says about things that are meant to be so, after its import has set its own level."""
    for message in (
        ".*does not have many workers.*",
        "Found .* module.* in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*instantiate_classes. was deprecated.*",
        # main(args) passes its arguments on.
        "LightningCLI's args parameter is intended.*",
        ".*`tensorboardX` has been removed.*",
        "The dirpath has changed from .*",
        # The training's own configuration is in it; after_fit tells of another training's checkpoints.
        "Checkpoint directory .* exists and is not empty.*",
        "The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS[:2]:
        logging.getLogger(name).setLevel(logging.WARNING)
    # What this package has to say goes the same way, and is to be heard.
    told = logging.getLogger(_LOGGERS[2])
    told.setLevel(logging.INFO)
    told.addFilter(_is_to_be_heard)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def _is_to_be_heard(record: logging.LogRecord) -> bool:
    """Whether a message is a warning, or a line of this package."""
    return record.levelno >= logging.WARNING or Path(record.pathname).is_relative_to(_PACKAGE)
