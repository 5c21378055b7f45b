"""Images with boxes: folders in Pascal VOC's layout, and one that is composed and written here."""

from distill_lightning.data.datamodules.detection.annotation import Annotation, read_annotation
from distill_lightning.data.datamodules.detection.augmentation import DetectionAugmentation
from distill_lightning.data.datamodules.detection.fashion_voc import FashionVOCDataModule, write_fashion_voc
from distill_lightning.data.datamodules.detection.files import AnnotatedFile, AnnotatedFiles, DetectionFiles
from distill_lightning.data.datamodules.detection.scenes import FashionVOC, Scene
from distill_lightning.data.datamodules.detection.voc import VOCDetectionDataModule

__all__ = [
    "AnnotatedFile",
    "AnnotatedFiles",
    "Annotation",
    "DetectionAugmentation",
    "DetectionFiles",
    "FashionVOC",
    "FashionVOCDataModule",
    "Scene",
    "VOCDetectionDataModule",
    "read_annotation",
    "write_fashion_voc",
]
