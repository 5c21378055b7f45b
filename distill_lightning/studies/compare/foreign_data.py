"""Data modules of somebody else: what they do not tell, and an order of their own for each seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules import IndexedDataModule, ViewDataModule
from distill_lightning.data.datamodules.indexed import HOOKS
from distill_lightning.errors import InputError
from distill_lightning.studies.data import has_loader

TOLD = ("task", "num_classes", "num_targets", "input_shape", "class_names")
"""What may stand beside a data module's ``class_path``, where it does not tell it itself."""

_SPLITS = ("train", "val", "test")
_EPOCH_STRIDE = 1_000_003


def tell(data: Any, told: Mapping[str, Any]) -> None:
    """Give a data module the attributes that stand beside its ``class_path``.

    Raises:
        InputError: it has another value of its own.
    """
    for name, value in told.items():
        known = getattr(data, name, None)
        if known is None:
            setattr(data, name, tuple(value) if isinstance(value, list) else value)
        elif (list(known) if isinstance(known, tuple) else known) != value:
            raise InputError(f"data.{name} is {value}, and {type(data).__name__} tells {known}: leave it out")


def check_told(data: Any) -> None:
    """Refuse data that do not tell how many classes, or numbers, there are to predict.

    Raises:
        InputError: they do not; a regression has no classes, and says so.
    """
    is_regression = hasattr(data, "num_classes") and getattr(data, "num_targets", None) is not None
    if getattr(data, "num_classes", None) is None and not is_regression:
        raise InputError(
            f"data: {type(data).__name__} does not tell its num_classes: give it that attribute, or write "
            "num_classes beside data.class_path"
        )


def check_loaders(data: Any) -> None:
    """Look at the loaders of a data module that is set up.

    Raises:
        InputError: one is missing, there are no validation samples, or the test samples come in another order every
            time.
    """
    missing = [f"{split}_dataloader" for split in _SPLITS if not has_loader(data, split)]
    if missing:
        raise InputError(f"data: {type(data).__name__} has no {' and no '.join(missing)}: give it one")
    if data.val_dataloader() == []:
        raise InputError(
            f"data: {type(data).__name__} has no validation samples, by which an epoch is chosen: give it some "
            "(val_size)"
        )
    if isinstance(getattr(data.test_dataloader(), "sampler", None), RandomSampler):
        raise InputError(
            f"data: {type(data).__name__} shuffles the test samples, and outputs are compared sample by sample: let "
            "its test_dataloader keep their order"
        )


def first_batch(data: Any) -> Batch:
    """The first batch of the test samples; no random number is drawn for it."""
    with torch.random.fork_rng(devices=[]):
        return Batch.of(next(iter(data.test_dataloader())))


def find_shape(data: Any) -> None:
    """Read the shape of a data module's inputs off its first batch, where it does not tell it and there is one."""
    if getattr(data, "input_shape", None) is None:
        inputs = first_batch(data).input
        if isinstance(inputs, Tensor):
            data.input_shape = tuple(inputs.shape[1:])


def ordered(data: pl.LightningDataModule, order_seed: int, first_epoch: int) -> pl.LightningDataModule:
    """A data module whose training order depends on a seed and the epoch alone.

    Those of this package have an ``order_seed``. Where any other shuffles by a plain ``shuffle=True``, which draws from
    the random state that the run has reached, the order becomes a function of seed and epoch: all rows of a seed see
    the same one, and a resumed run that of an undisturbed one.

    Args:
        data: the data module.
        order_seed: the seed.
        first_epoch: in which the run begins, or goes on.
    """
    data.order_seed = order_seed  # type: ignore[attr-defined]  # those of this package read it
    own = vars(data)["datamodule"] if isinstance(data, IndexedDataModule) else data
    if not isinstance(own, ViewDataModule):
        plain = own.train_dataloader
        # In the instance: Lightning, too, looks for it there.
        own.train_dataloader = lambda: _ordered(plain(), order_seed, first_epoch)  # type: ignore[method-assign]
    return data


class Prepared(pl.LightningDataModule):
    """A data module that is set up, once more for a Trainer: with its hooks, but without setting it up again.

    Args:
        datamodule: that is set up.
        predicts: the split whose samples are predicted: ``"test"``, or none.
    """

    def __init__(self, datamodule: Any, *, predicts: str = "") -> None:
        # In the instance, because Lightning compares them with its own to see which the data module overrides.
        own = {name: getattr(datamodule, name) for name in HOOKS if hasattr(datamodule, name)}
        loaders = {f"{split}_dataloader": getattr(datamodule, f"{split}_dataloader") for split in _SPLITS}
        self.__dict__.update({**own, **loaders, "datamodule": datamodule})
        for name in ("prepare_data", "setup", "teardown"):
            self.__dict__.pop(name, None)
        if predicts:
            self.__dict__["predict_dataloader"] = loaders[f"{predicts}_dataloader"]

    def __getattr__(self, name: str) -> Any:
        # While being unpickled or copied there is nothing to ask yet.
        if name == "datamodule" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.datamodule, name)


def _ordered(loaders: Any, seed: int, first_epoch: int) -> Any:
    parts = loaders.values() if isinstance(loaders, Mapping) else loaders
    for number, part in enumerate(parts if isinstance(loaders, (Mapping, list, tuple)) else [loaders]):
        is_plain = isinstance(part, DataLoader) and type(part.batch_sampler) is BatchSampler
        if is_plain and type(part.sampler) is RandomSampler and part.sampler.generator is None:
            part.batch_sampler.sampler = _Order(part, seed + number, first_epoch)
    return loaders


class _Order(Sampler[int]):
    """The order of a loader's own sampler, drawn by seed and epoch."""

    def __init__(self, loader: DataLoader[Any], seed: int, first_epoch: int) -> None:
        self.drawn, self.seed, self.epoch = loader.sampler, seed, first_epoch
        if loader.generator is None:
            # From which the workers' seeds are drawn.
            loader.generator = torch.Generator()
        self.of_workers = loader.generator
        self.set_epoch(first_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch
        self.of_workers.manual_seed(self._mixed())

    def _mixed(self) -> int:
        return (self.seed * _EPOCH_STRIDE + self.epoch) % 2**63

    def __len__(self) -> int:
        return len(self.drawn)  # type: ignore[arg-type]  # a RandomSampler has one

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._mixed())
            indices = list(self.drawn)
        return iter(indices)
