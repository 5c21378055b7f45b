"""What the answers in a `TeacherStore` are about, and everything that they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import IterableDataset

from distill_lightning.choices import plain
from distill_lightning.data.batch import Batch, tensors_of
from distill_lightning.data.fingerprint import loader_fingerprint
from distill_lightning.errors import InputError
from distill_lightning.layers import fingerprint, structure
from distill_lightning.lightning_internals import training_loaders

if TYPE_CHECKING:
    from distill_lightning.teachers.store import TeacherStore
    from distill_lightning.teachers.teachers import Teachers

# Samples of which is looked at what the loader makes of them.
_LOOKED_AT = 16

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


def begin_store(module: Any, teachers: Teachers, store: TeacherStore) -> None:
    """Tell a store what its answers are about, when a training starts.

    Args:
        module: the `DistillationModule` that asks.
        teachers: the module's.
        store: keeps the answers.

    Raises:
        InputError: the data tell neither their number of views nor what they are, or the store is of something else
            or is filled by another training.
    """
    trainer = module.trainer
    # Lightning sets it where a data module was given.
    data: Any = trainer.datamodule
    origin = describe(module, teachers, data, training_loaders(trainer), str(trainer.precision))
    store.begin(**origin, rank=trainer.global_rank)
    # Who only reads must not disturb another training that is filling the store.
    if store.fills:
        claim(trainer, store)
    trainer.strategy.barrier("store")
    store.refresh()


def claim(trainer: Any, store: TeacherStore) -> None:
    """Claim the right to fill a store for all processes of a training; where there is nothing to fill, it is read.

    Raises:
        InputError: another process fills it.
    """
    holder = trainer.strategy.broadcast(store.claim() if trainer.is_global_zero else None)
    if holder:
        raise InputError(
            f"the store {store.path} is being filled by {holder}, and two trainings would lose each other's answers: "
            "wait until that one has ended, or give another folder"
        )
    if holder is not None:
        store.only_read()


def describe(module: Any, teachers: Teachers, data: Any, loader: Any, precision: str) -> dict[str, Any]:
    """What a store's answers are about, and what they were made by.

    Args:
        module: the `DistillationModule` that asks.
        teachers: the module's, with a store.
        data: the data module; ``None``: there is none.
        loader: of the training batches.
        precision: that the teachers run in, the Trainer's.

    Raises:
        InputError: as `begin_store`.
    """
    try:
        samples = len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        raise InputError("a TeacherStore needs a training set with a length, and this one has none") from None
    if isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"a TeacherStore needs to know which sample is which, and {type(loader.dataset).__name__} is an "
            "IterableDataset: use a data set with __getitem__"
        )
    views = getattr(data, "views", 1)
    if views is None:
        raise InputError("a TeacherStore keeps a number of views of each sample: give the data module views, 8 say")
    _refuse_hooks(module, data)
    return {"samples": samples, "views": views, "made_by": _made_by(module, teachers, data, loader, precision)}


def fetched(loader: Any, samples: Sequence[int], *, view: int | None) -> Any:
    """A batch of some training samples, made as the loader makes its own.

    Args:
        loader: a map-style `torch.utils.data.DataLoader`.
        samples: their indices.
        view: of all of them; ``None``: the data know of no views, and are asked for their samples by the index alone.
    """
    keys: list[Any] = list(samples) if view is None else [(sample, view) for sample in samples]
    dataset = loader.dataset
    if loader.batch_sampler is None:
        # With batch_size=None the data set itself makes batches.
        return loader.collate_fn(dataset[keys])
    many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn([dataset[key] for key in keys] if many is None else many(keys))


def finish_epoch(trainer: Any, store: TeacherStore) -> None:
    """Make readable what all processes have kept in an epoch."""
    trainer.strategy.barrier("store")
    if trainer.is_global_zero and store.fills:
        store.finish()
    trainer.strategy.barrier("store")
    store.refresh()


def _refuse_hooks(module: Any, data: Any) -> None:
    """Hooks between the loader and the step are not part of the data: nobody can know what they do to a view."""
    for who in (module, data):
        for hook in own_hooks(who):
            raise InputError(
                f"a TeacherStore must see the inputs as the loader makes them, and {type(who).__name__} has a hook "
                f"{hook}: do in the data set what it does"
            )


def own_hooks(who: Any) -> list[str]:
    """Those between the loader and the step that a module, or data, define themselves."""
    base = pl.LightningModule if isinstance(who, pl.LightningModule) else pl.LightningDataModule
    found = {hook: getattr(getattr(who, hook, None), "__func__", None) for hook in _HOOKS}
    return [hook for hook, own in found.items() if own is not None and own is not getattr(base, hook)]


def _made_by(module: Any, teachers: Teachers, data: Any, loader: Any, precision: str) -> dict[str, Any]:
    """Everything that the answers depend on."""
    if hasattr(data, "fingerprint"):
        known = dict(data.fingerprint())
    elif teachers.store is not None and teachers.store.data is not None:
        view = 0 if hasattr(data, "views") else None
        known = {
            "name": teachers.store.data,
            "data": loader_fingerprint(loader, view=view),
            "some_samples": _digest_of_some(data, loader, view),
        }
    else:
        raise InputError(
            f"a TeacherStore must be able to identify the data, and {type(data).__name__} has no fingerprint(): name "
            "the data with the store's data"
        )
    if teachers.ensemble is not None:
        # The weights do not tell a stride, or the size that an AdaptedInput brings its input to.
        known["teachers"] = [_digest_of(fingerprint(network), structure(network)) for network in teachers]
        known["precision"] = precision
        known["ensemble"] = teachers.rule._asdict()
    known["transforms"] = [_options_of(transform) for transform in module.transforms if transform.changes_inputs]
    known |= {"num_classes": module.num_classes, "num_targets": module.num_targets}
    return dict(plain({**known, **teachers.describe()}))


def _options_of(transform: Any) -> str:
    if not dataclasses.is_dataclass(transform):
        raise InputError(
            f"a TeacherStore cannot tell whether {type(transform).__name__} is unchanged: make it a frozen dataclass "
            "of its options"
        )
    return repr(transform)


def _digest_of_some(data: Any, loader: Any, view: int | None) -> str:
    """SHA-256 of the inputs that a loader makes of a few training samples.

    Raises:
        InputError: asked twice, they are not the same.
    """
    count = len(loader.dataset)
    chosen = np.unique(np.linspace(0, count - 1, num=min(count, _LOOKED_AT)).round().astype(int)).tolist()
    # Whatever they draw, the training's own draws stay what they are without a store.
    with torch.random.fork_rng(devices=[]):
        first, second = (_digest(Batch.of(fetched(loader, chosen, view=view)).input) for _ in range(2))
    if first != second:
        raise InputError(
            f"a TeacherStore needs samples that stay the same, and those of {type(data).__name__} are augmented at "
            "random: let its views be functions of index and view, as those of InMemoryImageDataModule"
        )
    return first


def _digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for part in tensors_of(value):
        digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
