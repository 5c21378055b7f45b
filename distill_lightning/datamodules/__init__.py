"""One file per kind of data; each yields `distill_lightning.Batch`."""

from distill_lightning.datamodules.digits import DigitsDataModule
from distill_lightning.datamodules.fashion_mnist import FashionMNISTDataModule
from distill_lightning.datamodules.in_memory import Images, ImageTensors, InMemoryImageDataModule, ViewSampler
from distill_lightning.datamodules.indexed import IndexedDataModule
from distill_lightning.datamodules.rotated import RotatedDigitsDataModule, RotatedFashionMNISTDataModule, rotate

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageTensors",
    "Images",
    "InMemoryImageDataModule",
    "IndexedDataModule",
    "RotatedDigitsDataModule",
    "RotatedFashionMNISTDataModule",
    "ViewSampler",
    "rotate",
]
