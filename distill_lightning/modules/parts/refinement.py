"""What is told of Self-KD's refined targets, whatever they are targets of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill_lightning import functional
from distill_lightning.functional.common import wide_default


def observe_refinement(
    module: Any,
    alpha: float,
    labels: Tensor,
    target: Tensor,
    *,
    agree: Tensor,
    known: Tensor,
    counted: Tensor | None = None,
) -> None:
    """Have a batch's refined targets logged as ``train/alpha``, ``train/target_gt_prob`` and so on.

    Args:
        module: that is trained.
        alpha: the past's share.
        labels: classes of the samples, positions or boxes, ``(...)``.
        target: their refined targets, ``(..., K)``.
        agree: where the most probable class is the past one, bool ``(...)``.
        known: where there is a past, bool ``(...)``.
        counted: what counts, bool ``(...)``; ``None``: everything.
    """
    mean = partial(functional.counted_mean, counted=counted)
    with_past = known if counted is None else known & counted
    module.observe("alpha", torch.full((), alpha, dtype=wide_default(), device=target.device))
    module.observe("target_gt_prob", mean(target.gather(-1, labels[..., None])[..., 0]))
    module.observe("target_entropy", mean(torch.special.entr(target).sum(dim=-1)))
    module.observe("agree_past", functional.counted_mean(agree.float(), with_past))
    module.observe("known_fraction", mean(known.float()))
