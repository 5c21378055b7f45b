"""How large the store of a training is, and where its rows are kept."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from distill_lightning.errors import InputError
from distill_lightning.storage import PredictionStore, Sidecar

FOLDER = "self_kd_store"


def new_store(
    trainer: pl.Trainer,
    *,
    num_samples: int | None,
    num_classes: int,
    dtype: torch.dtype,
    top_k: int | None,
    in_checkpoint: int,
    folder: str | None,
    keep: int,
) -> PredictionStore:
    """An empty store for a training.

    Args:
        trainer: of the training.
        num_samples: ``N``; ``None``: the length of the training loader's data set.
        num_classes: ``K``.
        dtype: see `PredictionStore`.
        top_k: see `PredictionStore`.
        in_checkpoint: bytes of readable rows up to which they stand in the checkpoint; more are kept in files.
        folder: of the files; ``None``: one in the trainer's ``default_root_dir``.
        keep: how many generations of files are kept.

    Raises:
        InputError: the data do not tell their length, or files are needed and no local folder is known.
    """
    if num_samples is None:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        try:
            num_samples = len(dataset)  # type: ignore[arg-type]  # what has no length raises
        except (TypeError, NotImplementedError):
            raise InputError(
                "past='stored' needs the size of the training set, which the training loader does not tell: give "
                "num_samples"
            ) from None
    sidecar = None
    if num_samples * PredictionStore.row_bytes(num_classes, dtype=dtype, top_k=top_k) > in_checkpoint:
        sidecar = Sidecar(_folder(trainer, folder), keep=keep, writes=trainer.local_rank == 0)
    return PredictionStore(num_samples, num_classes, dtype=dtype, top_k=top_k, sidecar=sidecar)


def _folder(trainer: pl.Trainer, folder: str | None) -> Path:
    root = str(trainer.default_root_dir)
    if folder is None and "://" in root:
        raise InputError(
            f"the stored predictions cannot be mapped in default_root_dir={root}: name a local folder as store_dir, or "
            "raise store_in_checkpoint"
        )
    return Path(root, FOLDER) if folder is None else Path(folder)
