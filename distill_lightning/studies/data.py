"""Which data the runs of a study were made with, so that a study that goes on does not mix them with others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl

from distill_lightning.data.fingerprint import Fingerprint, data_difference, loader_fingerprint
from distill_lightning.errors import InputError, refusing
from distill_lightning.lightning_internals import training_loaders, validation_loaders
from distill_lightning.storage import write_whole

_FILE = "data.json"
_RUNS = "runs"

Splits = dict[str, Fingerprint]
"""The fingerprints of training, validation and test data, by name."""


class OtherDataError(InputError):
    """The data have changed since the study began.

    Args:
        message: the line, which names the run, the splits and what differs in them.
    """


def splits_of(data: Any) -> Splits:
    """The fingerprints of what a data module has loaders of; it is set up."""
    found: Splits = {}
    for split in ("train", "val", "test"):
        if has_loader(data, split):
            found |= _named(split, getattr(data, f"{split}_dataloader")(), data)
    return found


def has_loader(data: Any, split: str) -> bool:
    """Whether a data module defines the loader of a split."""
    name = f"{split}_dataloader"
    own = getattr(data, name, None)
    return own is not None and getattr(own, "__func__", None) is not getattr(pl.LightningDataModule, name)


def differences_of(known: Mapping[str, Fingerprint], present: Mapping[str, Fingerprint]) -> list[str]:
    """In what splits differ, one phrase for each that does."""
    both = [(split, data_difference(known[split], present[split])) for split in known if split in present]
    gone = [f"{split}: none now" for split in known if split not in present]
    return [f"{split}: {difference}" for split, difference in both if difference] + gone


def refuse_other_data(folder: Path, present: Mapping[str, Splits]) -> None:
    """Refuse a study's folder with runs on other data.

    Args:
        folder: of the study, with runs in it.
        present: the splits that there are now, by the name under which `keep_data` has kept them.

    Raises:
        InputError: the runs are on other data, or nobody noted on which; the message names the splits, and what differs
            in them.
    """
    way_out = "give another folder with --output, or make the runs again with --anew"
    if not (folder / _FILE).exists():
        raise InputError(f"output folder {folder} does not tell on which data its runs were made: {way_out}")
    known = _read(folder)
    for name, splits in present.items():
        found = differences_of(known[name], splits) if name in known else []
        if found:
            raise InputError(f"output folder {folder} has runs on other data ({'; '.join(found)}): {way_out}")


def keep_data(folder: Path, present: Mapping[str, Splits]) -> None:
    """Note in a study's folder which data its runs are made with, beside those that are noted there."""
    known = _read(folder) if (folder / _FILE).exists() else {}
    write_whole(folder / _FILE, [json.dumps({**known, **present}, indent=1).encode()])


def remove_runs(folder: Path) -> None:
    """Remove a study's runs, and what was noted of their data."""
    shutil.rmtree(folder / _RUNS, ignore_errors=True)
    (folder / _FILE).unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Splits]:
    path = folder / _FILE
    with refusing(
        f"{path} is damaged, give another folder with --output, or --anew", ValueError, TypeError, AttributeError
    ):
        kept = json.loads(path.read_text())
        return {name: {split: dict(found) for split, found in kept[name].items()} for name in dict(kept)}


def _named(split: str, loaders: Any, data: Any) -> Splits:
    view = 0 if split == "train" and hasattr(data, "views") else None
    every = list(_each(loaders))
    names = [split] if len(every) == 1 else [f"{split} {number}" for number in range(len(every))]
    return {name: loader_fingerprint(loader, view=view) for name, loader in zip(names, every, strict=True)}


def _each(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, (list, tuple, Mapping)):
        for part in loaders.values() if isinstance(loaders, Mapping) else loaders:
            yield from _each(part)
    else:
        yield loaders


class DataWatch(pl.Callback):
    """Sees to it that a run is trained on the data that the study began with.

    Args:
        title: of the run.
        known: the study's data.
    """

    def __init__(self, title: str, known: Splits) -> None:
        self.title, self.known = title, known

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the data.

        Raises:
            OtherDataError: they are others.
        """
        # Lightning sets it where a data module was given.
        data = cast("Any", trainer).datamodule
        present = _named("train", training_loaders(trainer), data)
        if trainer.enable_validation:
            present |= _named("val", validation_loaders(trainer), data)
        found = differences_of({split: known for split, known in self.known.items() if split in present}, present)
        if found:
            raise OtherDataError(
                f"{self.title} would be trained on other data than the study began with ({'; '.join(found)}): leave "
                f"the files as they are, and let {type(data).__name__} draw its splits from a seed of its own"
            )
