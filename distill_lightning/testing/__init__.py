"""For people who write a method: tiny networks and data, and the contract that every module of the package keeps.

::

    def build(student, teachers, num_classes):
        return MyModule(student, teachers, num_classes=num_classes)

    def test_contract():
        assert_module_contract(build)
"""

from distill_lightning.testing.contract import assert_module_contract
from distill_lightning.testing.kits import DetectionKit, ImageKit, Kit, TranslationKit
from distill_lightning.testing.points import CONTRACT, Build
from distill_lightning.testing.tiny import TinyDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.tiny_detection import TinyDetectionDataModule, TinyFasterRCNN
from distill_lightning.testing.tiny_translation import TinyEncoderDecoder, TinyTranslationDataModule

__all__ = [
    "CONTRACT",
    "Build",
    "DetectionKit",
    "ImageKit",
    "Kit",
    "TinyDataModule",
    "TinyDetectionDataModule",
    "TinyEncoderDecoder",
    "TinyFasterRCNN",
    "TinyNet",
    "TinyTranslationDataModule",
    "TranslationKit",
    "assert_module_contract",
    "tiny_trainer",
]
