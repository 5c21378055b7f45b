"""The options of pairs of sentences that a corpus has nothing to do with."""

from __future__ import annotations

from typing import TypedDict


class PairOptions(TypedDict, total=False):
    """How pairs of sentences are chosen, ordered and loaded; every key is optional.

    Args:
        subset: number of training pairs, drawn by ``seed``; smaller subsets are part of larger ones; ``None``, the
            default: all that the other splits leave.
        seed: of the split and the subset, 0 by default.
        order_seed: of the order of the training pairs; ``None``, the default: ``seed``.
        num_workers: worker processes of a loader; ``None``, the default: none, for a batch is cheap to make.
    """

    subset: int | None
    seed: int
    order_seed: int | None
    num_workers: int | None
