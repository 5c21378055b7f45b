"""Images per second: our batches from memory, and torchvision's transforms image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.contestants import BATCH_SIZE, RandomImages
from benchmarks.timing import Figure, stopwatch, take_turns


class PerImage(Dataset[tuple[Tensor, int]]):
    """The usual way: bytes to a PIL image, a crop and a flip of it, and then a tensor.

    Args:
        data: whose training images these are.
    """

    def __init__(self, data: RandomImages) -> None:
        images = data.dataset("train")
        self.pixels: np.ndarray[Any, Any] = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = images.targets.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([data.mean] * 3, [data.std] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One augmented image."""
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def images_per_second(*, rounds: int, count: int = 8192) -> dict[str, Figure]:
    """Of our data module without workers, and of torchvision's transforms with 0 and 2 workers."""
    data, slow = RandomImages(count), RandomImages(count // 4)
    per_image = PerImage(slow)

    def read(loader: Iterable[Any], images: int) -> Callable[[], float]:
        def turn() -> float:
            with stopwatch() as seconds:
                for _ in loader:
                    pass
            return images / seconds()

        return turn

    def peer(workers: int) -> Callable[[], float]:
        # The workers stay, so that what is measured is their work and not their start.
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return read(DataLoader(per_image, BATCH_SIZE, shuffle=True, **options), len(per_image))

    measured = take_turns(
        {"ours, 0 workers": read(data.train_dataloader(), count)}
        | {f"torchvision image by image, {workers} workers": peer(workers) for workers in (0, 2)},
        rounds=rounds,
    )
    return {name: Figure.of(values) for name, values in measured.items()}
