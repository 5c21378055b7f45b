"""A detector and images with boxes that are small enough for tests."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.detection_batch import DetectionBatch

_SIDE = 32


class TinyFasterRCNN(FasterRCNN):
    """torchvision's Faster R-CNN for 32x32 images, on two convolutions, which draws no random numbers.

    Every anchor and every proposal is either an object or background, and all of them enter the losses. So each image
    has the same weight in them, too, and nothing depends on how a batch is divided, if images have equally many boxes.

    Args:
        num_classes: ``C``, without the background.
        in_channels: channels of the images.
        norm: ``"batch"``, or ``"group"``, which treats every image alone.
    """

    def __init__(
        self, num_classes: int = 2, *, in_channels: int = 1, norm: Literal["batch", "group"] = "batch"
    ) -> None:
        backbone = nn.Sequential(
            nn.Conv2d(in_channels, 4, 4, stride=4, bias=False),
            nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        backbone.out_channels = 8  # type: ignore[assignment]  # a plain number, which torchvision asks for
        everything: dict[str, Any] = {
            "rpn_pre_nms_top_n_train": 32,
            "rpn_post_nms_top_n_train": 32,
            "rpn_pre_nms_top_n_test": 32,
            "rpn_post_nms_top_n_test": 16,
            "rpn_nms_thresh": 1.0,
            "rpn_fg_iou_thresh": 0.5,
            "rpn_bg_iou_thresh": 0.5,
            "rpn_batch_size_per_image": 1000,
            "box_batch_size_per_image": 1000,
            "box_positive_fraction": 0.5,
            "box_detections_per_img": 4,
        }
        super().__init__(
            backbone,
            min_size=_SIDE,
            max_size=_SIDE,
            image_mean=[0.5] * in_channels,
            image_std=[0.25] * in_channels,
            rpn_anchor_generator=AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=2),
            box_head=TwoMLPHead(8 * 2 * 2, 16),
            box_predictor=FastRCNNPredictor(16, num_classes + 1),
            **everything,
        )


class TinyBoxes(ViewDataset):
    """Noise with one bright square each; every view is the plain image.

    Args:
        count: number of images.
        num_classes: ``C``; a square of class ``k`` has so many dark lines.
        first: number of the first image, which its ``image_id`` counts from.
        seed: of everything.
    """

    depends_on = ("count", "num_classes", "first", "seed")

    def __init__(self, count: int, *, num_classes: int, first: int = 0, seed: int = 0) -> None:
        super().__init__(seed=seed, partners=False)
        self.count, self.num_classes, self.first = count, num_classes, first
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 1, _SIDE, _SIDE, generator=generator) * 0.4
        self.labels = torch.arange(count) % num_classes + 1
        sides = torch.randint(8, 17, (count,), generator=generator)
        corners = (torch.rand(count, 2, generator=generator) * (_SIDE - sides[:, None])).long()
        self.boxes = torch.cat([corners, corners + sides[:, None]], dim=1).float()
        for image, (left, top, right, bottom), label in zip(
            self.images, self.boxes.int().tolist(), self.labels.tolist(), strict=True
        ):
            image[:, top:bottom, left:right] = 1.0
            image[:, top + 2 : top + 2 * label : 2, left:right] = 0.0

    def __len__(self) -> int:
        return self.count

    def make(self, index: Tensor, view: Tensor) -> DetectionBatch:
        """The batch of these images."""
        targets = [
            {
                "boxes": self.boxes[place][None],
                "labels": self.labels[place][None],
                "difficult": torch.zeros(1, dtype=torch.bool),
                "image_id": torch.tensor(self.first + place),
            }
            for place in index.tolist()
        ]
        return DetectionBatch(list(self.images[index]), targets, index, view)


class TinyDetectionDataModule(ViewDataModule):
    """Seeded 32x32 images in grey, with one bright square each.

    Args:
        num_classes: ``C``, without the background; at most 4.
        samples: number of training images; there are as many for validation and for test.
        val_size: number of validation images; ``None``: as many as training images.
        batch_size: images per batch and process.
        seed: of everything.
    """

    task = "detection"
    num_classes: int
    in_channels = 1
    input_shape = None  # type: ignore[assignment]  # images may be of any size

    def __init__(
        self,
        *,
        num_classes: int = 2,
        samples: int = 24,
        val_size: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(val_size=val_size or samples, subset=samples, batch_size=batch_size, seed=seed)
        self.num_classes = num_classes
        self.class_names = tuple(f"square{number}" for number in range(1, num_classes + 1))
        self.count = samples

    def setup(self, stage: str | None = None) -> None:
        """There is nothing to read."""

    def dataset(self, split: str, *, augment: bool = False) -> TinyBoxes:
        """The generated images of one split."""
        place = ("train", "val", "test").index(split)
        count = (self.val_size or self.count) if split == "val" else self.count
        return TinyBoxes(count, num_classes=self.num_classes, first=1000 * place, seed=3 * self.seed + place)
