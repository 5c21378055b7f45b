"""What a detector of torchvision's R-CNN family samples in a step of its training, and what another one says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers.wrappers import is_compiled

_PARTS = ("transform", "backbone", "rpn", "roi_heads")
_OF_HEADS = ("box_roi_pool", "box_head", "box_predictor", "select_training_samples")


@dataclass
class Regions:
    """What a detector's forward in train mode has seen; filled while it runs, see `recorded`.

    Attributes:
        images: as its backbone sees them, normalised, resized and padded, ``(N, C, H, W)``.
        proposals: the boxes that were sampled on each, in pixels of ``images``.
        sizes: rows and columns of each image without its padding.
        labels: the class of each sampled box, ``(R,)``; 0 is the background.
        logits: of the classes, ``(R, C + 1)``.
        objectness: logits of all anchors, ``(A,)``.
        is_object: 1 for anchors of an object, 0 of the background, ``(A,)``; what lies between is not sampled.
        sampled: which anchors were, bool ``(A,)``.
    """

    images: Tensor = field(init=False)
    proposals: list[Tensor] = field(init=False)
    sizes: list[tuple[int, int]] = field(init=False)
    labels: Tensor = field(init=False)
    logits: Tensor = field(init=False)
    objectness: Tensor = field(init=False)
    is_object: Tensor = field(init=False)
    sampled: Tensor = field(init=False)

    @torch.no_grad()
    def asked(self, detector: nn.Module, *, objectness: bool = False) -> tuple[Tensor, Tensor | None]:
        """What another detector of the same kind says of the same boxes on the same images.

        Args:
            detector: in eval mode.
            objectness: whether it is asked about the anchors, too.

        Returns:
            Class logits ``(R, C + 1)``, and objectness logits ``(A,)`` or ``None``.
        """
        parts: Any = detector
        features = parts.backbone(self.images)
        # As torchvision's detectors name the only one.
        features = {"0": features} if isinstance(features, Tensor) else features
        heads = parts.roi_heads
        pooled = heads.box_roi_pool(features, self.proposals, self.sizes)
        logits = heads.box_predictor(heads.box_head(pooled))[0]
        return logits, _by_image(parts.rpn.head(list(features.values()))[0]) if objectness else None


def check_regions(who: str, detector: nn.Module) -> None:
    """Look whether a detector has the parts that are recorded.

    Raises:
        InputError: it is not of the R-CNN family, or compiled, which hides what it samples.
    """
    heads = getattr(detector, "roi_heads", None)
    missing = [part for part in _PARTS if not hasattr(detector, part)]
    missing += [f"roi_heads.{part}" for part in _OF_HEADS if heads is not None and not hasattr(heads, part)]
    if missing:
        raise InputError(
            f"{who} ({type(detector).__name__}) has no {missing[0]}, and only torchvision's R-CNN family samples "
            "boxes: give a FasterRCNN, MaskRCNN or KeypointRCNN, or use DetectionModule"
        )
    for name, part in detector.named_modules():
        # What samples no boxes may be.
        if is_compiled(part) and not name.startswith("backbone"):
            raise InputError(
                f"{who} is compiled ({name or 'the whole detector'}), and compiled code does not show which boxes it "
                "samples: give it as it is, or compile its backbone alone"
            )


@contextmanager
def recorded(detector: nn.Module) -> Iterator[Regions]:
    """Record what a detector samples in the one forward that it makes inside this context.

    It computes what it would compute alone, from the same random numbers: hooks listen to its layers, and two of its
    own methods, replaced on this object alone and put back afterwards, pass on what they return.

    Raises:
        InputError: at the end, if something of it was not seen.
    """
    seen, parts = Regions(), cast("Any", detector)
    heads, rpn = parts.roi_heads, parts.rpn
    select, compute, sample = heads.select_training_samples, rpn.compute_loss, rpn.fg_bg_sampler

    def selected(*args: Any, **kwargs: Any) -> Any:
        result = select(*args, **kwargs)
        seen.labels = torch.cat(result[2])
        return result

    def computed(objectness: Tensor, deltas: Tensor, labels: Sequence[Tensor], targets: Sequence[Tensor]) -> Any:
        seen.objectness, seen.is_object = objectness.flatten(), torch.cat(list(labels))
        return compute(objectness, deltas, labels, targets)

    def sampled(labels: Any) -> Any:
        result = sample(labels)
        seen.sampled = torch.stack([torch.cat(images) for images in result]).bool().any(dim=0)
        return result

    def transformed(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.images, seen.sizes = output[0].tensors, output[0].image_sizes

    def pooled(_module: nn.Module, inputs: Any) -> None:
        seen.proposals = inputs[1]

    def predicted(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.logits = output[0]

    with ExitStack() as stack:
        for handle in (
            parts.transform.register_forward_hook(transformed),
            heads.box_roi_pool.register_forward_pre_hook(pooled),
            heads.box_predictor.register_forward_hook(predicted),
        ):
            stack.callback(handle.remove)
        stack.enter_context(_replaced(heads, select_training_samples=selected))
        stack.enter_context(_replaced(rpn, compute_loss=computed, fg_bg_sampler=sampled))
        yield seen
    unseen = [part.name for part in fields(seen) if not hasattr(seen, part.name)]
    if unseen:
        raise InputError(
            f"{type(detector).__name__} has not shown its {', '.join(unseen)} in a training step: give it neither "
            "compiled nor with a forward of its own, or use DetectionModule"
        )


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes of one object for a while, in front of its class's and of its submodules."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


def _by_image(levels: Sequence[Tensor]) -> Tensor:
    """Objectness of each level, ``(N, A, H, W)``, as ``(A,)`` in the order of torchvision's anchors."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], dim=1).flatten()
