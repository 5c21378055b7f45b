"""Formulas of object detection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.functional.common import wide


def intersection_over_union(first: Tensor, second: Tensor) -> Tensor:
    """How far boxes agree, each of the first with each of the second.

    Args:
        first: boxes as left, top, right and bottom, ``(M, 4)``.
        second: others, ``(G, 4)``.

    Returns:
        ``(M, G)`` in ``[0, 1]``, in float32 or wider; 0 for two boxes without an area.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import intersection_over_union
        >>> intersection_over_union(tensor([[0, 0, 4, 4]]), tensor([[0, 0, 4, 3], [2, 2, 4, 8]]))
        tensor([[0.7500, 0.1667]])
    """
    first, second = wide(first)[:, None], wide(second)
    sides = torch.minimum(first[..., 2:], second[:, 2:]) - torch.maximum(first[..., :2], second[:, :2])
    shared = sides.clamp_min(0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - shared
    return torch.where(union > 0, shared / union, 0)


def match_detections(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    target_labels: Tensor,
    *,
    difficult: Tensor,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Which detections of an image are hits, and which count at all, by the rules of PASCAL VOC.

    A detection belongs to the object of its class that it overlaps most. It is a hit if their intersection over union
    is at least the threshold and no more confident detection is a hit on the same object; else it is a miss. One that
    belongs to a difficult object in that way is neither.

    Boxes end where their last pixel does: a box around the left upper pixel alone is ``(0, 0, 1, 1)``. VOC's own code,
    whose boxes name their first and last pixels, adds the 1 itself.

    Args:
        boxes: detected, as left, top, right and bottom ``(M, 4)``.
        scores: of them, ``(M,)``.
        labels: their classes, ``(M,)``.
        target_boxes: of the objects, ``(G, 4)``.
        target_labels: their classes, ``(G,)``.
        difficult: which objects are, bool ``(G,)``.
        threshold: smallest intersection over union of a hit.

    Returns:
        Which detections are hits, and which count as a hit or a miss, both bool ``(M,)``.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import match_detections
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [6, 6, 8, 8]])
        >>> scores, labels = torch.tensor([0.6, 0.9, 0.5]), torch.tensor([1, 1, 1])
        >>> none = torch.tensor([False, False])
        >>> match_detections(boxes, scores, labels, boxes[[0, 2]], labels[[0, 2]], difficult=none)
        (tensor([False,  True,  True]), tensor([True, True, True]))
        >>> match_detections(boxes, scores, labels, boxes[[0, 2]], labels[[0, 2]], difficult=~none)
        (tensor([False, False, False]), tensor([False, False, False]))

    Everingham, Van Gool, Williams, Winn, Zisserman: *The PASCAL Visual Object Classes (VOC) Challenge*, IJCV 88 (2010).
    """
    hit = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if not len(target_boxes) or not len(boxes):
        return hit, ~hit
    overlaps = intersection_over_union(boxes, target_boxes)
    overlap, which = overlaps.masked_fill(labels[:, None] != target_labels, -1).max(dim=1)
    near = overlap >= threshold
    counted = ~(near & difficult[which])
    order = scores.argsort(descending=True, stable=True)
    order = order[(near & counted)[order]]
    # The place, in order of confidence, of the first detection that belongs to each object.
    place = torch.arange(len(order), device=order.device)
    first = torch.full_like(target_labels, len(order), dtype=torch.int64)
    first = first.scatter_reduce(0, which[order], place, "amin")
    hit[order[first[first < len(order)]]] = True
    return hit, counted


def eleven_point_precision(scores: Tensor, hit: Tensor, objects: int) -> Tensor:
    r"""Average precision of one class as PASCAL VOC computed it until 2009.

    .. math:: \frac{1}{11} \sum_{r \in \{0, 0.1, \dots, 1\}} \max_{k: \; \mathrm{recall}_k \ge r} \mathrm{precision}_k

    over the ``k`` most confident detections. Equal scores keep the order in which they come. A recall is compared
    exactly: 3 objects of 10 are found at a recall of 0.3, whatever the two numbers are rounded to.

    Args:
        scores: of all detections that count, of all images, ``(M,)``.
        hit: which of them are hits, bool ``(M,)``, see `match_detections`.
        objects: how many there are that are not difficult.

    Returns:
        A scalar in ``[0, 1]``; NaN without objects.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import eleven_point_precision
        >>> eleven_point_precision(tensor([0.9, 0.8, 0.7]), tensor([True, False, True]), objects=2)
        tensor(0.8485, dtype=torch.float64)

    Everingham, Van Gool, Williams, Winn, Zisserman: *The PASCAL Visual Object Classes (VOC) Challenge*, IJCV 88 (2010).
    """
    if objects == 0:
        return torch.full((), torch.nan, dtype=torch.float64, device=scores.device)
    found = hit[scores.argsort(descending=True, stable=True)].long().cumsum(dim=0)
    precision = found.double() / torch.arange(1, len(found) + 1, device=found.device)
    points = torch.arange(11, device=found.device)[:, None]
    reached = torch.where(10 * found >= points * objects, precision, 0)
    # Without a detection nothing is reached.
    return torch.cat([reached, torch.zeros_like(points, dtype=reached.dtype)], dim=1).amax(dim=1).mean()


def soft_binary_cross_entropy_rows(logits: Tensor, probs: Tensor) -> Tensor:
    r"""Cross entropy of two classes whose target is a probability, of each entry.

    .. math:: -q \log \sigma(z) - (1 - q) \log (1 - \sigma(z))

    Args:
        logits: :math:`z`, of any shape.
        probs: :math:`q` in ``[0, 1]``, of the same shape.

    Returns:
        The same shape, in nats, in float32 or wider.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import soft_binary_cross_entropy_rows
        >>> soft_binary_cross_entropy_rows(tensor([0.0, 2.0]), tensor([1.0, 0.5]))
        tensor([0.6931, 1.1269])
    """
    return F.binary_cross_entropy_with_logits(wide(logits), wide(probs), reduction="none")
