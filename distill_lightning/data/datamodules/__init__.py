"""One file per kind of data; each yields `distill_lightning.Batch`."""

from distill_lightning.data.datamodules.base import ImageDataModule, ViewDataModule, ViewDataset, ViewSampler
from distill_lightning.data.datamodules.digits import DigitsDataModule
from distill_lightning.data.datamodules.docstrings import ByteWindows, DocstringsDataModule
from distill_lightning.data.datamodules.fashion_mnist import FashionMNISTDataModule
from distill_lightning.data.datamodules.image_folder import Files, ImageFiles, ImageFolderDataModule
from distill_lightning.data.datamodules.in_memory import Images, ImageTensors, InMemoryImageDataModule
from distill_lightning.data.datamodules.indexed import IndexedDataModule
from distill_lightning.data.datamodules.rotated import RotatedDigitsDataModule, RotatedFashionMNISTDataModule, rotate

__all__ = [
    "ByteWindows",
    "DigitsDataModule",
    "DocstringsDataModule",
    "FashionMNISTDataModule",
    "Files",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageTensors",
    "Images",
    "InMemoryImageDataModule",
    "IndexedDataModule",
    "RotatedDigitsDataModule",
    "RotatedFashionMNISTDataModule",
    "ViewDataModule",
    "ViewDataset",
    "ViewSampler",
    "rotate",
]
