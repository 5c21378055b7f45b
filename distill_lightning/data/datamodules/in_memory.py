"""Small image sets: held in memory as bytes, indexed and augmented a whole batch at a time."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from distill_lightning.data.augmentation import RandAugment
from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.mixing import cutout
from distill_lightning.data.views import crop_and_flip, uniform_draws
from distill_lightning.errors import InputError

# Which of a view's random numbers are whose: those of the crop and the flip, and where the others' begin.
_CROP_DRAWS, _CUTOUT, _RANDAUGMENT = 3, 3, 5


class Images(NamedTuple):
    """Images ``(N, C, H, W)`` as uint8, and their classes ``(N,)`` as int64 or a regression's targets ``(N, d)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.datamodules import Images
        >>> images = Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2]))
        >>> images.take(torch.tensor([2, 0])).targets
        tensor([2, 0])
    """

    images: Tensor
    targets: Tensor

    def take(self, index: Tensor) -> Images:
        """The samples at ``index``."""
        return Images(self.images[index], self.targets[index])


class ImageTensors(ViewDataset):
    """Images in memory; a batch is one indexing operation, and its views depend on nothing but their keys.

    Args:
        images: the samples.
        mean: of the pixels, or of each channel, in ``[0, 1]``; views are ``(pixel / 255 - mean) / std`` in float32.
        std: of the pixels, or of each channel, in the same unit.
        seed: of the views.
        padding: pixels of zeros around the image that a random crop may take in; 0 crops nothing.
        flip: whether half of the views are mirrored.
        cutout: side in pixels of a square that every view loses, see `distill_lightning.data.mixing.cutout`; 0: none.
        randaugment: operations that are drawn for every view after cropping and mirroring; ``None``: none.
        partners: whether each view comes with another sample in the same view, drawn from the view's own key.

    Example:
        >>> import torch
        >>> from distill_lightning.data.datamodules import Images, ImageTensors
        >>> images = Images(torch.full((3, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([0, 1, 2]))
        >>> batch = ImageTensors(images, mean=0.5, std=0.25).__getitems__([(2, 0), (0, 1)])
        >>> batch.target, batch.input.unique()
        (tensor([2, 0]), tensor([2.]))
    """

    depends_on: tuple[str, ...] = ("mean", "std", "seed", "padding", "flip", "partners")

    def __init__(
        self,
        images: Images,
        *,
        mean: float | tuple[float, ...],
        std: float | tuple[float, ...],
        seed: int = 0,
        padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        randaugment: RandAugment | None = None,
        partners: bool = False,
    ) -> None:
        super().__init__(seed=seed, partners=partners)
        self.images, self.targets = images
        self.mean, self.std = mean, std
        self.padding, self.flip = padding, flip
        self.cutout, self.randaugment = cutout, randaugment
        # Only where they are used: what was kept of other views, before there were these options, is still theirs.
        self.depends_on += tuple(name for name in ("cutout", "randaugment") if getattr(self, name))

    def __len__(self) -> int:
        return len(self.targets)

    def columns(self) -> Columns:
        """The plain images, and their targets."""
        return Columns(labels=self.targets, contents=(self.images,))

    @property
    def views_are_alike(self) -> bool:
        """Whether nothing is cropped, mirrored or else changed, nor done by a `make` of a subclass's own."""
        changes = (self.padding, self.flip, self.cutout, self.randaugment)
        return type(self).make is ImageTensors.make and not any(changes)

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``."""
        images = self.images[index]
        if self.padding or self.flip:
            draws = uniform_draws(self.seed, index, view, _CROP_DRAWS)
            images = crop_and_flip(images, draws, padding=self.padding, flip=self.flip)
        if self.randaugment is not None:
            draws = uniform_draws(self.seed, index, view, self.randaugment.draws, first=_RANDAUGMENT)
            images = self.randaugment(images, draws)
        inputs = images.to(torch.float32).div_(255).sub_(_by_channel(self.mean)).div_(_by_channel(self.std))
        if self.cutout:
            inputs = cutout(inputs, self.cutout, uniform_draws(self.seed, index, view, 2, first=_CUTOUT))
        return Batch(inputs, self.targets[index], index, view)


def _by_channel(values: float | tuple[float, ...]) -> Any:
    """One number as it is, several as ``(C, 1, 1)``."""
    return torch.tensor(values).view(-1, 1, 1) if isinstance(values, tuple) else values


class InMemoryImageDataModule(ImageDataModule):
    """Base of the small image sets: reads once, splits by seed, yields `Batch`.

    A subclass sets ``num_classes`` (or, for a regression, ``num_targets``), ``input_shape``, ``class_names``, ``mean``
    and ``std``, each of these one number or a tuple with one for each channel, and defines `read`. The test images are
    never part of training or validation.

    The options change training views alone, in the order crop, flip, RandAugment, Cutout. Unlike the transform
    `distill_lightning.Cutout` of a module, these are part of the view: a teacher's answer about it can be stored.

    Args:
        val_size: number of validation images, drawn by ``seed`` from the training files; 0: none, and nothing is
            validated.
        test_size: number of test images, the first ones; ``None``: all.
        padding: pixels of zeros around a training image that its random crop may take in; 0 crops nothing.
        flip: whether half of the training views are mirrored.
        cutout: side in pixels of a square of the mean colour in every training view; 0: none.
        randaugment: operations that are drawn for every training view; ``None``: none.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: a size that is not positive, or, from `setup`, one that is larger than the data.

    Example:
        >>> import torch
        >>> from distill_lightning import InMemoryImageDataModule
        >>> from distill_lightning.data.datamodules import Images
        >>> class Noise(InMemoryImageDataModule):
        ...     num_classes, input_shape, class_names, mean, std = 2, (1, 8, 8), ("a", "b"), 0.5, 0.3
        ...
        ...     def read(self):
        ...         pixels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
        ...         every = Images(pixels, torch.arange(40) % 2)
        ...         return every.take(torch.arange(30)), every.take(torch.arange(30, 40))
        >>> data = Noise(val_size=10)
        >>> {split: len(data.dataset(split)) for split in ("train", "val", "test")}
        {'train': 20, 'val': 10, 'test': 10}
    """

    val_size: int  # required: there are no files for validation alone
    least_val_size = 0
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __init__(
        self,
        *,
        val_size: int,
        test_size: int | None = None,
        padding: int = 2,
        flip: bool = False,
        cutout: int = 0,
        randaugment: RandAugment | None = None,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(val_size=val_size, test_size=test_size, **options)
        if padding < 0:
            raise InputError(f"padding cannot be negative, got {padding}")
        if cutout < 0:
            raise InputError(f"cutout is a square's side in pixels, 0 for none, got {cutout}")
        self.padding, self.flip = padding, flip
        self.cutout, self.randaugment = cutout, randaugment
        self._splits: dict[str, Images] = {}
        self._left_out = torch.empty(0, dtype=torch.long)

    def read(self) -> tuple[Images, Images]:
        """The images for training and validation, and those for test."""
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split them; a second call does nothing."""
        if self._splits:
            return
        rest, test = self.read()
        chosen = self.split(len(rest.targets), len(test.targets))
        self._splits = {
            "train": self.samples(rest, chosen["train"], part=0),
            "val": self.samples(rest, chosen["val"], part=0),
            "test": self.samples(test, chosen["test"], part=1),
        }
        self._left_out = chosen["rest"]

    def samples(self, images: Images, index: Tensor, *, part: int) -> Images:
        """The samples of a split; a data module that makes another task of them does so here.

        Args:
            images: what was read.
            index: which of them, their places in what was read.
            part: 0 for training and validation, 1 for test.
        """
        return images.take(index)

    def dataset(self, split: str, *, augment: bool = False) -> ImageTensors:
        """One split, ``"train"``, ``"val"``, ``"test"``, or ``"rest"``: the training images that ``subset`` leaves out.

        Without ``augment`` every view is the plain image.
        """
        self.setup()
        if split == "rest" and split not in self._splits:
            # Few ask for them, so that they are not kept until someone does.
            self._splits[split] = self.samples(self.read()[0], self._left_out, part=0)
        return ImageTensors(
            self._splits[split],
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            padding=self.padding if augment else 0,
            flip=self.flip and augment,
            cutout=self.cutout if augment else 0,
            randaugment=self.randaugment if augment else None,
            partners=self.partners and augment,
        )
