"""The options that data modules share; `ViewDataModule` has them as keywords, its subclasses pass them on."""

from __future__ import annotations

from typing import TypedDict


class LoadingOptions(TypedDict, total=False):
    """How samples are chosen, ordered and loaded; every key is optional.

    Args:
        subset: number of training samples, drawn by ``seed``; smaller subsets are part of larger ones; ``None``, the
            default: all that the other splits leave.
        batch_size: samples per batch and process, 64 by default.
        seed: of the split and of everything else that is drawn, 0 by default.
        order_seed: of the order of the training samples; ``None``, the default: ``seed``.
        drop_last: whether an epoch of the training leaves out its last batch where that is smaller than the others,
            ``False`` by default. A BatchNorm cannot be trained on a batch of one sample.
        num_workers: worker processes of a loader; ``None``, the default: where images are decoded, one for each CPU
            that the process may use, 16 at most, shared by the processes of a training; none where a batch is cheap to
            make.
    """

    subset: int | None
    batch_size: int
    seed: int
    order_seed: int | None
    drop_last: bool
    num_workers: int | None


class ViewOptions(LoadingOptions, total=False):
    """How samples are chosen, ordered and loaded, and which views of them; every key is optional.

    Args:
        subset: number of training samples, drawn by ``seed``; smaller subsets are part of larger ones; ``None``, the
            default: all that the other splits leave.
        batch_size: samples per batch and process, 64 by default; each view of a sample counts.
        views: number of different views of a training sample; ``None``, the default: a new one every epoch.
        views_per_load: how many views of a training sample an epoch reads, one after another, 1 by default;
            ``batch_size`` and ``views`` must be multiples of it.
        partners: whether each training view comes with another sample to be mixed with, a function of its own index and
            view alone (``Batch.partner``); ``False`` by default.
        seed: of the split, the views, the partners and everything else that is drawn, 0 by default.
        order_seed: of the order of the training samples; ``None``, the default: ``seed``.
        drop_last: whether an epoch of the training leaves out its last batch where that is smaller than the others,
            ``False`` by default. A BatchNorm cannot be trained on a batch of one sample.
        num_workers: worker processes of a loader; ``None``, the default: where images are decoded, one for each CPU
            that the process may use, 16 at most, shared by the processes of a training; none where a batch is cheap to
            make.
    """

    views: int | None
    views_per_load: int
    partners: bool
