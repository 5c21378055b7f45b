"""Detectors on the features of classifiers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from distill_lightning.errors import InputError
from distill_lightning.layers import freeze
from distill_lightning.networks.backbones import Features, load_backbone
from distill_lightning.networks.provenance import factory_with_recipe
from distill_lightning.networks.sizes import check_sizes

_RATIOS = (0.5, 1.0, 2.0)
_POOLED = 7


@factory_with_recipe
def faster_rcnn(
    backbone: nn.Module,
    *,
    num_classes: int,
    layers: str | Sequence[str],
    backbone_weights: str | Path | None = None,
    frozen_norms: bool = False,
    image_mean: Sequence[float] = (0.485, 0.456, 0.406),
    image_std: Sequence[float] = (0.229, 0.224, 0.225),
    min_size: int = 800,
    max_size: int = 1333,
    anchor_sizes: Sequence[Sequence[int]] | None = None,
    fpn_channels: int = 256,
    head_features: int = 1024,
    proposals: int = 2000,
    samples: int = 512,
) -> nn.Module:
    """Torchvision's Faster R-CNN on the features of any classifier whose layers run one after the other.

    Of one layer the features are read as they are; of several by a feature pyramid, with a further level of half the
    size for the region proposals, as in torchvision. What the classifier has behind the last of them is dropped.
    Anchors have the aspect ratios 1:2, 1:1 and 2:1. What has no argument here is as in torchvision.

    ::

        student:
          class_path: faster_rcnn
          init_args:
            backbone: {class_path: SmallResNet, init_args: {num_classes: 10, in_channels: 3, width: 16}}
            backbone_weights: classifier.safetensors   # SelfKDModule's, by export_backbone
            num_classes: 3
            layers: [stage2, stage3]
            anchor_sizes: [[16], [32], [64]]
            min_size: 240
            max_size: 320

    Args:
        backbone: a classifier, which is copied; its number of classes does not matter.
        num_classes: ``C``, without the background; the detector has one class more.
        layers: dotted paths of the classifier's layers, from the largest feature map to the smallest.
        backbone_weights: a file of `DistillationModule.export_backbone`; ``None``: the classifier's own weights.
        frozen_norms: whether the classifier's normalisations are not trained and keep their statistics, for batches of
            few images.
        image_mean: of each channel of images in ``[0, 1]``, as in the classifier's own training.
        image_std: of each channel.
        min_size: pixels that the shorter side of an image is resized to.
        max_size: pixels that the longer side may have.
        anchor_sizes: sides of the square anchors in pixels of the resized image, for each feature map, with the further
            level of a pyramid; ``None``: 32 to 512 on one feature map; 32, 64 and so on for the levels of a pyramid.
        fpn_channels: of a pyramid.
        head_features: of both hidden layers of the box head.
        proposals: largest number of regions that are proposed on a training image, and at most 1000 on others.
        samples: of them, with which the box head is trained on each image.

    Raises:
        InputError: a size that is not positive, or a shorter side that is longer than the longer one; not a mean and a
            deviation for each channel that the classifier reads, or not as many anchor sizes as there are levels; no
            such layer, layers twice or not in the order in which they run, or one that returns no feature map; or a
            file of another network.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallCNN, faster_rcnn
        >>> detector = faster_rcnn(
        ...     SmallCNN(num_classes=10), num_classes=3, layers="features.6", image_mean=[0.5], image_std=[0.25],
        ...     min_size=32, max_size=64, head_features=16,
        ... ).eval()
        >>> [sorted(found) for found in detector([torch.zeros(1, 32, 48)])]
        [['boxes', 'labels', 'scores']]
    """
    sizes = {"num_classes": num_classes, "min_size": min_size, "max_size": max_size, "fpn_channels": fpn_channels}
    check_sizes("faster_rcnn", {**sizes, "head_features": head_features, "proposals": proposals, "samples": samples})
    if min_size > max_size:
        raise InputError(
            f"faster_rcnn: min_size={min_size} is the shorter side of an image, and max_size={max_size} bounds the "
            "longer one: raise max_size"
        )
    # The caller's own may be frozen, trained and loaded as something else.
    backbone = copy.deepcopy(backbone)
    if backbone_weights is not None:
        load_backbone(backbone, Path(backbone_weights))
    features = Features(backbone, [layers] if isinstance(layers, str) else list(layers))
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != features.in_channels:
            raise InputError(
                f"faster_rcnn: {name} has {len(values)} numbers, and {type(backbone).__name__} reads images of "
                f"{features.in_channels} channels: give one for each"
            )
    if frozen_norms:
        for layer in features.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # the base of all of them
                freeze(layer)
    pyramid = Pyramid(features, fpn_channels)
    anchors = _anchors(anchor_sizes, levels=pyramid.levels)
    detector: nn.Module = FasterRCNN(
        pyramid,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        rpn_anchor_generator=AnchorGenerator(anchors, (_RATIOS,) * len(anchors)),
        rpn_pre_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=min(proposals, 1000),
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=min(proposals, 1000),
        box_roi_pool=MultiScaleRoIAlign([str(number) for number in range(len(features.layers))], _POOLED, 2),
        box_head=TwoMLPHead(pyramid.out_channels * _POOLED**2, head_features),
        box_predictor=FastRCNNPredictor(head_features, num_classes + 1),
        box_batch_size_per_image=samples,
    )
    return detector


class Pyramid(nn.Module):
    """Features as torchvision's detectors read them: of one layer as they are, of several through a feature pyramid.

    Args:
        features: what finds them.
        channels: of a pyramid.

    Attributes:
        out_channels: of each level.
        levels: how many feature maps there are.
    """

    def __init__(self, features: Features, channels: int) -> None:
        super().__init__()
        self.features = features
        has_pyramid = len(features.channels) > 1
        self.fpn = (
            FeaturePyramidNetwork(features.channels, channels, extra_blocks=LastLevelMaxPool()) if has_pyramid else None
        )
        self.out_channels = channels if has_pyramid else features.channels[0]
        self.levels = len(features.channels) + has_pyramid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The feature maps by name, from the largest to the smallest."""
        found: dict[str, Tensor] = self.features(images)
        return found if self.fpn is None else self.fpn(found)


def _anchors(sizes: Sequence[Sequence[int]] | None, *, levels: int) -> tuple[tuple[int, ...], ...]:
    if sizes is None:
        doubled = [32 * 2**number for number in range(max(levels, 5))]
        return (tuple(doubled),) if levels == 1 else tuple((size,) for size in doubled[:levels])
    if len(sizes) != levels:
        extra = " (one for each layer, and one for the further level of the pyramid)" if levels > 1 else ""
        raise InputError(
            f"faster_rcnn: anchor_sizes are of {len(sizes)} levels, and there are {levels}{extra}: give sizes for each"
        )
    return tuple(tuple(level) for level in sizes)
