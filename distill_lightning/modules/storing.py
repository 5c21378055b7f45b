"""What a training tells a `TeacherStore` of itself, and when; ``module`` is always a `DistillationModule`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.layers import TeacherEnsemble, fingerprint
from distill_lightning.modules.hparams import plain
from distill_lightning.stores import TeacherStore


def ensemble_if_any(teachers: nn.Module | Sequence[nn.Module] | None) -> TeacherEnsemble | None:
    """The teachers of a method, which may be absent where a store speaks for them, or nothing is trained."""
    return None if teachers is None else TeacherEnsemble.of(teachers)


def begin_store(module: Any, store: TeacherStore) -> None:
    """Tell a store what its answers are about.

    Raises:
        InputError: the data tell neither their number of views nor what they are, or the store is of something else.
    """
    trainer = module.trainer
    # Lightning sets it where a data module was given.
    data: Any = trainer.datamodule
    about = describe(module, store, data, trainer.train_dataloader)
    store.begin(**about, rank=trainer.global_rank)
    if trainer.is_global_zero:
        store.resume()
    trainer.strategy.barrier("store")
    store.refresh()


def describe(module: Any, store: TeacherStore, data: Any, loader: Any) -> dict[str, Any]:
    """What a store's answers are about, and made by.

    Raises:
        InputError: as `begin_store`.
    """
    try:
        samples = len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        raise InputError("a TeacherStore needs a training set with a length, and this one has none") from None
    views = getattr(data, "views", 1)
    if views is None:
        raise InputError("a TeacherStore keeps a number of views of each sample: give the data module views, 8 say")
    return {"samples": samples, "views": views, "made_by": _made_by(module, store, data)}


def finish_epoch(module: Any, store: TeacherStore) -> None:
    """Make readable what all processes have kept in an epoch."""
    module.trainer.strategy.barrier("store")
    if module.trainer.is_global_zero:
        store.finish()
    module.trainer.strategy.barrier("store")
    store.refresh()


def _made_by(module: Any, store: TeacherStore, data: Any) -> dict[str, Any]:
    """Everything that the answers depend on."""
    if hasattr(data, "fingerprint"):
        known = dict(data.fingerprint())
    elif store.data is not None:
        known = {"data": store.data}
    else:
        raise InputError(
            f"a TeacherStore must know the data again, and {type(data).__name__} has no fingerprint(): name the data "
            "with the store's data"
        )
    teachers = getattr(module, "teachers", None)
    if teachers is not None:
        known["teachers"] = [fingerprint(network) for network in teachers]
        known["ensemble"] = {"weights": teachers.weights, "combine": teachers.combine}
    return dict(plain({**known, "num_classes": module.num_classes, **module.question()}))
