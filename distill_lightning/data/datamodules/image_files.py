"""Images in files, each decoded when it is asked for, and their views."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from distill_lightning.data.augmentation import ColorJitter, Lighting, RandAugment
from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.image_file import DamagedImageError, decode
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.views import CROP_DRAWS, random_box, uniform_draws

# Which of a view's random numbers are whose: those of the flip and the crop, and where the others' begin.
_CROP_AND_FLIP = 1 + CROP_DRAWS
_JITTER = _CROP_AND_FLIP
_LIGHTING = _JITTER + ColorJitter.draws
_RANDAUGMENT = _LIGHTING + Lighting.draws


class Files(NamedTuple):
    """Image files below a folder: their paths as bytes, in one array ``(N,)``, and their classes ``(N,)`` as int64.

    Not a list of strings, of which every worker process would in time make its own copy, by counting references.
    """

    paths: NDArray[np.bytes_]
    targets: Tensor

    def take(self, index: Tensor) -> Files:
        """The files at ``index``."""
        return Files(self.paths[index.numpy()], self.targets[index])


class ImageFiles(ViewDataset):
    """Images in files, each decoded when it is asked for; their views depend on nothing but their keys.

    Rows of a batch that follow one another and are views of one image share its decoding. With ``augment`` a view is a
    random part of the image (`distill_lightning.data.views.random_box`), resized to a square, mirrored or not, and
    changed by ``randaugment``, ``color_jitter`` and ``lighting``, in this order, where they are given. Without,
    every view is the plain image: its shorter side resized, and the centre of that.

    Args:
        folder: where the files' paths begin.
        files: the samples.
        image_size: rows and columns of a view.
        resize_size: length of the shorter side of a plain image, of which the centre is taken.
        mean: of each channel, in ``[0, 1]``; views are ``(pixel / 255 - mean) / std`` in float32.
        std: of each channel, in the same unit.
        augment: whether views are random.
        crop_scale: smallest and largest part of an image's area that a random view shows.
        crop_ratio: smallest and largest ratio of width to height of that part.
        flip: whether half of the random views are mirrored.
        color_jitter: how colours of random views are changed; ``None``: not at all.
        lighting: noise along the principal components of colours, of random views; ``None``: none.
        randaugment: operations that are drawn for every random view; ``None``: none.
        seed: of the views and the partners.
        partners: whether each view comes with another sample in the same view, drawn from the view's own key.
        damaged: where damaged files are noted, bool ``(N,)``, in memory that worker processes share; their views then
            are images of the mean colour that do not count. ``None``: a damaged file is an error.
    """

    depends_on: tuple[str, ...] = ("mean", "std", "seed", "image_size", "crop_scale", "crop_ratio", "flip", "partners")

    def __init__(
        self,
        folder: str | Path,
        files: Files,
        *,
        image_size: int,
        resize_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        augment: bool = False,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        color_jitter: ColorJitter | None = None,
        lighting: Lighting | None = None,
        randaugment: RandAugment | None = None,
        seed: int = 0,
        partners: bool = False,
        damaged: Tensor | None = None,
    ) -> None:
        super().__init__(seed=seed, partners=partners)
        self.folder, self.files, self.damaged = Path(folder), files, damaged
        self.image_size, self.resize_size = image_size, resize_size
        self.mean, self.std = mean, std
        self.augment, self.crop_scale, self.crop_ratio, self.flip = augment, crop_scale, crop_ratio, flip
        self.color_jitter, self.lighting, self.randaugment = color_jitter, lighting, randaugment
        # Only where they are used: what was kept of other views, before there were these options, is still theirs.
        given = (name for name in ("color_jitter", "lighting", "randaugment") if getattr(self, name))
        self.depends_on += tuple(given)

    def __len__(self) -> int:
        return len(self.files.targets)

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``.

        Raises:
            InputError: a file cannot be read or, unless damaged files are noted, decoded.
        """
        draws = uniform_draws(self.seed, index, view, _CROP_AND_FLIP).tolist() if self.augment else []
        pixels = torch.empty(len(index), 3, self.image_size, self.image_size, dtype=torch.uint8)
        counted = torch.ones(len(index), dtype=torch.bool)
        for sample, rows in itertools.groupby(range(len(index)), key=index.tolist().__getitem__):
            image = self._decoded(sample)
            for row in rows:
                if image is None:
                    counted[row] = False
                else:
                    pixels[row] = self._random(image, draws[row]) if self.augment else self._plain(image)
        inputs = self._recoloured(pixels, index, view) if self.augment else pixels.to(torch.float32).div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        inputs.sub_(mean).div_(std)
        if counted.all():
            return Batch(inputs, self.files.targets[index], index, view)
        inputs[~counted] = 0
        return Batch(inputs, self.files.targets[index], index, view, counted)

    def make_partner(self, index: Tensor, view: Tensor, others: Tensor) -> Batch:
        """As of every `ViewDataset`, but instead of a damaged image the sample is its own partner."""
        partner = self.make(others, view)
        return partner if partner.counted is None else self.make(torch.where(partner.counted, others, index), view)

    def _decoded(self, sample: int) -> Tensor | None:
        try:
            return decode(self.folder / os.fsdecode(self.files.paths[sample]))
        except DamagedImageError:
            if self.damaged is None:
                raise
            self.damaged[sample] = True
            return None

    def columns(self) -> Columns:
        """Paths, below the folder, and classes."""
        return Columns(names=self.files.paths.tolist(), labels=self.files.targets, folder=str(self.folder))

    def _random(self, image: Tensor, draws: list[float]) -> Tensor:
        height, width = image.shape[1:]
        box = random_box(height, width, draws[1:], scale=self.crop_scale, ratio=self.crop_ratio)
        part: Tensor = transforms.resized_crop(image, *box, [self.image_size, self.image_size], antialias=True)
        return part.flip(2) if self.flip and draws[0] < 0.5 else part

    def _recoloured(self, pixels: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """What else is done to random views, and their pixels as float32 in ``[0, 1]``."""
        if self.randaugment is not None:
            draws = uniform_draws(self.seed, index, view, self.randaugment.draws, first=_RANDAUGMENT)
            pixels = self.randaugment(pixels, draws)
        if self.color_jitter is not None:
            draws = uniform_draws(self.seed, index, view, ColorJitter.draws, first=_JITTER)
            pixels = self.color_jitter(pixels, draws)
        inputs = pixels.to(torch.float32).div_(255)
        if self.lighting is not None:
            draws = uniform_draws(self.seed, index, view, Lighting.draws, first=_LIGHTING)
            inputs = self.lighting(inputs, draws)
        return inputs

    def _plain(self, image: Tensor) -> Tensor:
        resized = transforms.resize(image, [self.resize_size], antialias=True)
        centre: Tensor = transforms.center_crop(resized, [self.image_size, self.image_size])
        return centre
