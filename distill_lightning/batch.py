"""The batch that every data module yields and every method reads.

Shape legend, used in every docstring of the package:

===  ==========================================================
``N``  samples in the batch
``K``  classes
``M``  teachers
``C``  channels, ``H`` rows, ``W`` columns of an image or feature map
``D``  entries of one sample's feature map, ``C * H * W``
===  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from distill_lightning.errors import InputError


class Batch(NamedTuple):
    """One batch; a tuple with names, so ``x, y, *_ = batch`` works too.

    Attributes:
        input: what the networks read, ``(N, C, H, W)`` for images.
        target: class indices ``(N,)``.
        index: which sample of the training set each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
        view: which augmented view of that sample each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
    """

    input: Tensor
    target: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.index, which no one asks a batch for
    view: Tensor | None = None

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read the batch of any data module: a `Batch`, or a sequence that begins with input and target.

        Raises:
            InputError: the batch is neither.
        """
        if isinstance(batch, cls):
            return batch
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
            return cls(batch[0], batch[1])
        raise InputError(
            f"a batch must be a Batch or an (input, target) pair, got {type(batch).__name__}: "
            "let the data module yield distill_lightning.Batch(input=..., target=...)"
        )
