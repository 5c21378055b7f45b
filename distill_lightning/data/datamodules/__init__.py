"""One file per kind of data; each yields `distill_lightning.Batch`."""

from distill_lightning.data.datamodules.cifar import CIFARDataModule
from distill_lightning.data.datamodules.detection import (
    AnnotatedFile,
    AnnotatedFiles,
    Annotation,
    DetectionAugmentation,
    DetectionFiles,
    FashionVOC,
    FashionVOCDataModule,
    Scene,
    VOCDetectionDataModule,
    read_annotation,
    write_fashion_voc,
)
from distill_lightning.data.datamodules.digits import DigitsDataModule
from distill_lightning.data.datamodules.docstrings import ByteWindows, DocstringsDataModule
from distill_lightning.data.datamodules.fashion_mnist import FashionMNISTDataModule
from distill_lightning.data.datamodules.gaze import EyeTensors, GazeDataModule
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.image_files import Files, ImageFiles
from distill_lightning.data.datamodules.image_folder import ImageFolderDataModule
from distill_lightning.data.datamodules.in_memory import Images, ImageTensors, InMemoryImageDataModule
from distill_lightning.data.datamodules.indexed import IndexedDataModule
from distill_lightning.data.datamodules.options import LoadingOptions, ViewOptions
from distill_lightning.data.datamodules.resumable_loader import ResumableLoader
from distill_lightning.data.datamodules.rotated import RotatedDigitsDataModule, RotatedFashionMNISTDataModule, rotate
from distill_lightning.data.datamodules.translation import (
    BytePairTokenizer,
    GettextCatalogues,
    LengthSampler,
    LibreOfficeHelp,
    PairOptions,
    ParallelText,
    TranslationDataModule,
    TranslationDataset,
)
from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.datamodules.view_sampler import ViewSampler

__all__ = [
    "AnnotatedFile",
    "AnnotatedFiles",
    "Annotation",
    "BytePairTokenizer",
    "ByteWindows",
    "CIFARDataModule",
    "DetectionAugmentation",
    "DetectionFiles",
    "DigitsDataModule",
    "DocstringsDataModule",
    "EyeTensors",
    "FashionMNISTDataModule",
    "FashionVOC",
    "FashionVOCDataModule",
    "Files",
    "GazeDataModule",
    "GettextCatalogues",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageTensors",
    "Images",
    "InMemoryImageDataModule",
    "IndexedDataModule",
    "LengthSampler",
    "LibreOfficeHelp",
    "LoadingOptions",
    "PairOptions",
    "ParallelText",
    "ResumableLoader",
    "RotatedDigitsDataModule",
    "RotatedFashionMNISTDataModule",
    "Scene",
    "TranslationDataModule",
    "TranslationDataset",
    "VOCDetectionDataModule",
    "ViewDataModule",
    "ViewDataset",
    "ViewOptions",
    "ViewSampler",
    "read_annotation",
    "rotate",
    "write_fashion_voc",
]
