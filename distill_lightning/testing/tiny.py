"""Networks, data and a Trainer that are small enough for tests."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill_lightning.data.datamodules import Images, InMemoryImageDataModule
from distill_lightning.layers import GaussianHead


class TinyNet(nn.Module):
    """Two convolutions for 8x8 images; ``features`` is the feature map ``(N, 2 * width, 4, 4)`` after the last ReLU.

    Args:
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression; the output is then ``(N, 2 d)``.
        in_channels: channels of the images.
        width: channels of the first convolution, even.
        norm: ``"batch"``, or ``"group"``, which treats every sample alone.
    """

    def __init__(
        self,
        num_classes: int | None = 3,
        *,
        num_targets: int | None = None,
        in_channels: int = 1,
        width: int = 4,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width) if norm == "batch" else nn.GroupNorm(2, 2 * width),
            nn.ReLU(),
        )
        self.head = GaussianHead(2 * width, num_targets) if num_targets else nn.Linear(2 * width, num_classes or 3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


class TinyDataModule(InMemoryImageDataModule):
    """Seeded 8x8 images, one bright corner region per class in noise; learnable in a few steps.

    Args:
        num_classes: up to 4.
        num_targets: ``d`` of a regression, in place of classes; its targets ``(N, d)`` are noisy functions of a class.
        samples: number of training images; there are as many for validation and for test.
        val_size: number of validation images; ``None``: as many as training images.
        batch_size: samples per batch and process.
        views: number of different views of a training image; ``None``: a new one every epoch.
        partners: whether each training view comes with another image to be mixed with.
        seed: of everything.
    """

    mean = 0.4
    std = 0.25

    def __init__(
        self,
        *,
        num_classes: int = 3,
        num_targets: int | None = None,
        samples: int = 24,
        val_size: int | None = None,
        batch_size: int = 8,
        views: int | None = None,
        partners: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            subset=samples,
            val_size=val_size or samples,
            batch_size=batch_size,
            padding=1,
            views=views,
            partners=partners,
            seed=seed,
        )
        self.classes = num_classes
        self.num_classes = None if num_targets else num_classes
        self.num_targets = num_targets
        self.count = samples
        self.input_shape = (1, 8, 8)
        self.class_names = tuple(str(number) for number in range(num_classes))

    def read(self) -> tuple[Images, Images]:
        """The generated images."""
        generator = torch.Generator().manual_seed(self.seed)
        total = 3 * self.count
        targets = torch.arange(total) % self.classes
        pixels = torch.rand(total, 1, 8, 8, generator=generator) * 0.6
        for image, target in zip(pixels, targets.tolist(), strict=True):
            row, column = 4 * (target // 2), 4 * (target % 2)
            image[:, row : row + 4, column : column + 4] += 0.4
        if self.num_targets is not None:
            noise = torch.randn(total, self.num_targets, generator=generator)
            targets = targets[:, None] - 1 + 0.1 * noise
        every = Images((pixels * 255).to(torch.uint8), targets)
        rest, test = torch.arange(2 * self.count), torch.arange(2 * self.count, total)
        return every.take(rest), every.take(test)


# Of precisions, before Lightning 2.
_OLD_NAMES = {"64-true": 64, "32-true": 32, "16-mixed": 16, "bf16-mixed": "bf16"}


def tiny_trainer(**options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU.

    Args:
        options: the Trainer's; ``precision`` by the names of Lightning 2 under Lightning 1.9, too.
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if pl.__version__.startswith("1.") and "precision" in options:
        options["precision"] = _OLD_NAMES.get(options["precision"], options["precision"])
    return pl.Trainer(**(defaults | options))
