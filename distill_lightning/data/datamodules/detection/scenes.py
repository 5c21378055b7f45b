"""Pictures composed of small images, and where these are on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_lightning.choices import Choice
from distill_lightning.data.datamodules.digits import DigitsDataModule
from distill_lightning.data.datamodules.fashion_mnist import FashionMNISTDataModule
from distill_lightning.errors import InputError

SPLITS = ("train", "val", "test")
"""The splits, in the order of their numbers of pictures."""

SCENES_VERSION = 1
"""Raised whenever the same options would give other pictures than before."""

_TRIALS = 20
# Pixels that must be seen of an item in height and width.
_SEEN_AT_LEAST = 3
# Cells of the background's coarse grid, and its brightest level.
_CELLS, _BRIGHTEST = 5, 160

Pixels = NDArray[np.uint8]


class Scene(NamedTuple):
    """A composed picture.

    Attributes:
        pixels: grey, uint8 ``(H, W)``.
        owners: which object each pixel shows, -1 the background, int64 ``(H, W)``.
        classes: of each object.
        hidden: which part of each object's pixels others cover.
    """

    pixels: Pixels
    owners: NDArray[np.int64]
    classes: list[int]
    hidden: list[float]

    def box(self, item: int) -> tuple[int, int, int, int]:
        """The tight box around an object's pixels that are seen: left, top, right, bottom; the last two exclusive."""
        seen = self.owners == item
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class FashionVOC(Choice):
    """Pictures of several items of clothing, or digits, on a cloudy background, and where they are.

    Each picture is a function of ``seed``, its split and its number alone, so that a smaller set is the beginning of a
    larger one. Items are drawn uniformly, those for training, validation and test from images of Fashion-MNIST (or the
    digits) that no other split has; test items are from its test files. Each is enlarged bilinearly to a side drawn
    from ``item_size`` and put at a place drawn uniformly. It covers what was there before with its pixels that are not
    zero. A place is drawn again, 20 times at most, if more than ``max_hidden`` of an item would not be seen, and the
    item is then left out.

    Args:
        items: what is on the pictures: ``"fashion_mnist"``, from Debian's package or ``items_dir``, or ``"digits"``,
            which scikit-learn has with it.
        images: number of pictures for training, validation and test.
        size: rows and columns of a picture, in pixels.
        per_image: least and largest number of items on a picture.
        item_size: least and largest side, in pixels, to which an item's square image is enlarged.
        max_hidden: which part of an item may be covered by others.
        difficult: an item of which more than this part is covered is marked as difficult.
        seed: of all that is drawn.
        items_dir: folder of Fashion-MNIST's files; ``None``: where Debian's package puts them.

    Raises:
        InputError: an option is out of range.

    Example:
        >>> from distill_lightning import FashionVOC
        >>> scene = FashionVOC(items="digits", size=64, item_size=(16, 24)).scenes("train", range(1))[0]
        >>> scene.pixels.shape
        (64, 64)
    """

    items: Literal["fashion_mnist", "digits"] = "fashion_mnist"
    images: tuple[int, int, int] = (600, 150, 300)
    size: int = 128
    per_image: tuple[int, int] = (1, 5)
    item_size: tuple[int, int] = (28, 56)
    max_hidden: float = 0.7
    difficult: float = 0.5
    seed: int = 0
    items_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_known(items=("fashion_mnist", "digits"))
        self.check_numbers()
        if len(self.images) != len(SPLITS) or min(self.images) < 1:
            raise InputError(f"FashionVOC: images must be three numbers of at least 1, got {self.images}")
        for name, least in (("per_image", 1), ("item_size", 8)):
            pair = getattr(self, name)
            if len(pair) != 2 or not least <= pair[0] <= pair[1]:
                raise InputError(f"FashionVOC: {name} must be two ascending numbers from {least} on, got {pair}")
        if self.item_size[1] > self.size:
            raise InputError(f"FashionVOC: item_size={self.item_size} does not fit into size={self.size}: lower it")
        for name in ("max_hidden", "difficult"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"FashionVOC: {name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the ten classes."""
        return (FashionMNISTDataModule if self.items == "fashion_mnist" else DigitsDataModule).class_names

    def scenes(self, split: str, numbers: range) -> list[Scene]:
        """Some pictures of a split.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            numbers: which.

        Raises:
            InputError: Fashion-MNIST is missing or damaged.
        """
        items, classes = self._items(split)
        return [self._scene(items, classes, [self.seed, SPLITS.index(split), number]) for number in numbers]

    def _items(self, split: str) -> tuple[Pixels, list[int]]:
        if self.items == "digits":
            found = DigitsDataModule(image_size=8, padding=0).dataset(split)
        else:
            found = FashionMNISTDataModule(data_dir=self.items_dir, padding=0, flip=False).dataset(split)
        return found.images[:, 0].numpy(), found.targets.tolist()

    def _scene(self, items: Pixels, classes: list[int], seed: list[int]) -> Scene:
        generator = np.random.default_rng(seed)
        pixels = _background(generator, self.size)
        owners = np.full(pixels.shape, -1)
        sizes: list[int] = []
        shown: list[int] = []
        for _ in range(int(generator.integers(self.per_image[0], self.per_image[1] + 1))):
            chosen, side = int(generator.integers(len(items))), int(generator.integers(*self.item_size, endpoint=True))
            item = np.asarray(Image.fromarray(items[chosen]).resize((side, side), Image.Resampling.BILINEAR))
            count = int(np.count_nonzero(item))
            places = generator.integers(self.size - side + 1, size=(_TRIALS, 2)).tolist()
            for top, left in places:
                part = (slice(top, top + side), slice(left, left + side))
                covered = owners.copy()
                covered[part][item > 0] = len(shown)
                if not self._are_seen(covered, [*sizes, count]):
                    continue
                owners = covered
                pixels[part] = np.where(item > 0, item, pixels[part])
                sizes.append(count)
                shown.append(classes[chosen])
                break
        hidden = [1 - float(np.count_nonzero(owners == number)) / size for number, size in enumerate(sizes)]
        return Scene(pixels, owners, shown, hidden)

    def _are_seen(self, owners: NDArray[np.int64], sizes: list[int]) -> bool:
        """Whether enough of each item is seen."""
        for number, size in enumerate(sizes):
            seen = owners == number
            extent = min(seen.any(axis=0).sum(), seen.any(axis=1).sum())
            if extent < _SEEN_AT_LEAST or seen.sum() < (1 - self.max_hidden) * size:
                return False
        return True


def _background(generator: np.random.Generator, size: int) -> Pixels:
    """Clouds, from dark to medium grey, with a little noise."""
    coarse = generator.integers(_BRIGHTEST, size=(_CELLS, _CELLS), dtype=np.uint8)
    clouds = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)).astype(np.int64)
    noise = generator.integers(-8, 9, size=(size, size))
    levels: Pixels = np.clip(clouds + noise, 0, 255).astype(np.uint8)
    return levels
