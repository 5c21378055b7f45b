"""distill_lightning: knowledge distillation and compression as PyTorch Lightning modules."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_lightning import compression as compression
    from distill_lightning import functional as functional
    from distill_lightning import layers as layers
    from distill_lightning import networks as networks
    from distill_lightning.callbacks import CompressionCallback as CompressionCallback
    from distill_lightning.compression import Compressor as Compressor
    from distill_lightning.compression import export_onnx as export_onnx
    from distill_lightning.compression import load_compressed as load_compressed
    from distill_lightning.data import samplers as samplers
    from distill_lightning.data.batch import Batch as Batch
    from distill_lightning.data.datamodules import DetectionAugmentation as DetectionAugmentation
    from distill_lightning.data.datamodules import DigitsDataModule as DigitsDataModule
    from distill_lightning.data.datamodules import DocstringsDataModule as DocstringsDataModule
    from distill_lightning.data.datamodules import FashionMNISTDataModule as FashionMNISTDataModule
    from distill_lightning.data.datamodules import FashionVOC as FashionVOC
    from distill_lightning.data.datamodules import FashionVOCDataModule as FashionVOCDataModule
    from distill_lightning.data.datamodules import GettextCatalogues as GettextCatalogues
    from distill_lightning.data.datamodules import ImageFolderDataModule as ImageFolderDataModule
    from distill_lightning.data.datamodules import IndexedDataModule as IndexedDataModule
    from distill_lightning.data.datamodules import InMemoryImageDataModule as InMemoryImageDataModule
    from distill_lightning.data.datamodules import LibreOfficeHelp as LibreOfficeHelp
    from distill_lightning.data.datamodules import ParallelText as ParallelText
    from distill_lightning.data.datamodules import RotatedDigitsDataModule as RotatedDigitsDataModule
    from distill_lightning.data.datamodules import RotatedFashionMNISTDataModule as RotatedFashionMNISTDataModule
    from distill_lightning.data.datamodules import TranslationDataModule as TranslationDataModule
    from distill_lightning.data.datamodules import VOCDetectionDataModule as VOCDetectionDataModule
    from distill_lightning.data.datamodules import write_fashion_voc as write_fashion_voc
    from distill_lightning.data.detection_batch import DetectionBatch as DetectionBatch
    from distill_lightning.data.samplers import CutMixSampler as CutMixSampler
    from distill_lightning.data.samplers import EmpiricalSampler as EmpiricalSampler
    from distill_lightning.data.samplers import FunctionSampler as FunctionSampler
    from distill_lightning.data.samplers import GeneratorSampler as GeneratorSampler
    from distill_lightning.data.samplers import MixupSampler as MixupSampler
    from distill_lightning.data.transforms import CutMix as CutMix
    from distill_lightning.data.transforms import Cutout as Cutout
    from distill_lightning.data.transforms import LabelSmoothing as LabelSmoothing
    from distill_lightning.data.transforms import Mixup as Mixup
    from distill_lightning.data.unlabelled import UnlabelledSampler as UnlabelledSampler
    from distill_lightning.errors import InputError as InputError
    from distill_lightning.layers.call import call as call
    from distill_lightning.modules.base import DistillationModule as DistillationModule
    from distill_lightning.modules.compression import CompressionBaseline as CompressionBaseline
    from distill_lightning.modules.detection import DetectionModule as DetectionModule
    from distill_lightning.modules.extracurricular import ExtracurricularModule as ExtracurricularModule
    from distill_lightning.modules.extracurricular import MatchDistribution as MatchDistribution
    from distill_lightning.modules.extracurricular import MatchPoint as MatchPoint
    from distill_lightning.modules.feed import FEEDModule as FEEDModule
    from distill_lightning.modules.generator import GeneratorModule as GeneratorModule
    from distill_lightning.modules.kd import KDModule as KDModule
    from distill_lightning.modules.meal_v2 import MEALV2Module as MEALV2Module
    from distill_lightning.modules.options import TrainingOptions as TrainingOptions
    from distill_lightning.modules.paraphraser import ParaphraserModule as ParaphraserModule
    from distill_lightning.modules.parts.adversary import FixedDiscriminator as FixedDiscriminator
    from distill_lightning.modules.parts.adversary import NoDiscriminator as NoDiscriminator
    from distill_lightning.modules.parts.adversary import OfficialDiscriminator as OfficialDiscriminator
    from distill_lightning.modules.parts.adversary import OwnDiscriminator as OwnDiscriminator
    from distill_lightning.modules.parts.distances import AttentionDistance as AttentionDistance
    from distill_lightning.modules.parts.distances import Conv1x1Translator as Conv1x1Translator
    from distill_lightning.modules.parts.distances import Conv3Translator as Conv3Translator
    from distill_lightning.modules.parts.distances import FactorDistance as FactorDistance
    from distill_lightning.modules.parts.distances import FunctionTranslator as FunctionTranslator
    from distill_lightning.modules.parts.distances import HintDistance as HintDistance
    from distill_lightning.modules.parts.distances import LinearTranslator as LinearTranslator
    from distill_lightning.modules.parts.distances import LogitTerm as LogitTerm
    from distill_lightning.modules.parts.distances import NoTranslator as NoTranslator
    from distill_lightning.modules.parts.past import MovingAverage as MovingAverage
    from distill_lightning.modules.parts.past import PastModel as PastModel
    from distill_lightning.modules.parts.past import StoredPast as StoredPast
    from distill_lightning.modules.parts.search import BeamSearch as BeamSearch
    from distill_lightning.modules.parts.search import NoSearch as NoSearch
    from distill_lightning.modules.parts.sizes import EqualSizes as EqualSizes
    from distill_lightning.modules.parts.sizes import PooledSize as PooledSize
    from distill_lightning.modules.parts.sizes import StudentSize as StudentSize
    from distill_lightning.modules.parts.sizes import TeacherSize as TeacherSize
    from distill_lightning.modules.self_kd import SelfKDModule as SelfKDModule
    from distill_lightning.modules.self_kd_detection import SelfKDDetectionModule as SelfKDDetectionModule
    from distill_lightning.modules.sequential_feed import sequential_feed as sequential_feed
    from distill_lightning.modules.supervised import RegressionModule as RegressionModule
    from distill_lightning.modules.supervised import SupervisedModule as SupervisedModule
    from distill_lightning.modules.translation import SelfKDTranslationModule as SelfKDTranslationModule
    from distill_lightning.modules.translation import TranslationModule as TranslationModule
    from distill_lightning.networks import AdaptedInput as AdaptedInput
    from distill_lightning.networks import Pretrained as Pretrained
    from distill_lightning.networks import SmallCNN as SmallCNN
    from distill_lightning.networks import SmallLSTM as SmallLSTM
    from distill_lightning.networks import SmallResNet as SmallResNet
    from distill_lightning.networks import SmallTransformer as SmallTransformer
    from distill_lightning.networks import faster_rcnn as faster_rcnn
    from distill_lightning.networks import pytorchcv_network as pytorchcv_network
    from distill_lightning.networks import timm_network as timm_network
    from distill_lightning.networks import torchvision_network as torchvision_network
    from distill_lightning.networks import translation_transformer as translation_transformer
    from distill_lightning.outputs import Boxes as Boxes
    from distill_lightning.outputs import Categorical as Categorical
    from distill_lightning.outputs import Gaussian as Gaussian
    from distill_lightning.outputs import Tokens as Tokens
    from distill_lightning.outputs import metrics as metrics
    from distill_lightning.outputs.metrics import AURC as AURC
    from distill_lightning.outputs.metrics import Agreement as Agreement
    from distill_lightning.outputs.metrics import AngularError as AngularError
    from distill_lightning.outputs.metrics import CalibrationError as CalibrationError
    from distill_lightning.outputs.metrics import GapReduction as GapReduction
    from distill_lightning.schedules import GroupSchedules as GroupSchedules
    from distill_lightning.schedules import InverseSquareRoot as InverseSquareRoot
    from distill_lightning.schedules import OneCycle as OneCycle
    from distill_lightning.storage import PredictionStore as PredictionStore
    from distill_lightning.studies.compare.api import compare as compare
    from distill_lightning.studies.compare.comparison import Comparison as Comparison
    from distill_lightning.studies.export.command import export_checkpoint as export_checkpoint
    from distill_lightning.studies.export.student import load_exported as load_exported
    from distill_lightning.teachers import Features as Features
    from distill_lightning.teachers import Logits as Logits
    from distill_lightning.teachers import MeanLogits as MeanLogits
    from distill_lightning.teachers import Softened as Softened
    from distill_lightning.teachers import TeacherEnsemble as TeacherEnsemble
    from distill_lightning.teachers import Teachers as Teachers
    from distill_lightning.teachers import TeacherStore as TeacherStore
else:

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name, __name__)
        if home != __name__:
            value = getattr(__import__(home, fromlist=[name]), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


__version__ = "0.1.0"

# The public names, by the module that each is imported from when it is first asked for: importing this package loads
# neither PyTorch nor Lightning. Type checkers read the same from the imports above.
_PUBLIC = {
    "distill_lightning": ("compression", "functional", "layers", "networks"),
    "distill_lightning.callbacks": ("CompressionCallback",),
    "distill_lightning.compression": ("Compressor", "export_onnx", "load_compressed"),
    "distill_lightning.data": ("samplers",),
    "distill_lightning.data.batch": ("Batch",),
    "distill_lightning.data.detection_batch": ("DetectionBatch",),
    "distill_lightning.data.datamodules": (
        "DetectionAugmentation",
        "DigitsDataModule",
        "DocstringsDataModule",
        "FashionMNISTDataModule",
        "FashionVOC",
        "FashionVOCDataModule",
        "GettextCatalogues",
        "ImageFolderDataModule",
        "InMemoryImageDataModule",
        "IndexedDataModule",
        "LibreOfficeHelp",
        "ParallelText",
        "RotatedDigitsDataModule",
        "RotatedFashionMNISTDataModule",
        "TranslationDataModule",
        "VOCDetectionDataModule",
        "write_fashion_voc",
    ),
    "distill_lightning.data.samplers": (
        "CutMixSampler",
        "EmpiricalSampler",
        "FunctionSampler",
        "GeneratorSampler",
        "MixupSampler",
    ),
    "distill_lightning.data.transforms": ("CutMix", "Cutout", "LabelSmoothing", "Mixup"),
    "distill_lightning.data.unlabelled": ("UnlabelledSampler",),
    "distill_lightning.errors": ("InputError",),
    "distill_lightning.layers.call": ("call",),
    "distill_lightning.modules.base": ("DistillationModule",),
    "distill_lightning.modules.compression": ("CompressionBaseline",),
    "distill_lightning.modules.detection": ("DetectionModule",),
    "distill_lightning.modules.extracurricular": ("ExtracurricularModule", "MatchDistribution", "MatchPoint"),
    "distill_lightning.modules.feed": ("FEEDModule",),
    "distill_lightning.modules.generator": ("GeneratorModule",),
    "distill_lightning.modules.kd": ("KDModule",),
    "distill_lightning.modules.meal_v2": ("MEALV2Module",),
    "distill_lightning.modules.options": ("TrainingOptions",),
    "distill_lightning.modules.paraphraser": ("ParaphraserModule",),
    "distill_lightning.modules.parts.adversary": (
        "FixedDiscriminator",
        "NoDiscriminator",
        "OfficialDiscriminator",
        "OwnDiscriminator",
    ),
    "distill_lightning.modules.parts.distances": (
        "AttentionDistance",
        "Conv1x1Translator",
        "Conv3Translator",
        "FactorDistance",
        "FunctionTranslator",
        "HintDistance",
        "LinearTranslator",
        "LogitTerm",
        "NoTranslator",
    ),
    "distill_lightning.modules.parts.past": ("MovingAverage", "PastModel", "StoredPast"),
    "distill_lightning.modules.parts.search": ("BeamSearch", "NoSearch"),
    "distill_lightning.modules.parts.sizes": ("EqualSizes", "PooledSize", "StudentSize", "TeacherSize"),
    "distill_lightning.modules.self_kd": ("SelfKDModule",),
    "distill_lightning.modules.self_kd_detection": ("SelfKDDetectionModule",),
    "distill_lightning.modules.sequential_feed": ("sequential_feed",),
    "distill_lightning.modules.supervised": ("RegressionModule", "SupervisedModule"),
    "distill_lightning.modules.translation": ("SelfKDTranslationModule", "TranslationModule"),
    "distill_lightning.networks": (
        "AdaptedInput",
        "Pretrained",
        "SmallCNN",
        "SmallLSTM",
        "SmallResNet",
        "SmallTransformer",
        "faster_rcnn",
        "pytorchcv_network",
        "timm_network",
        "torchvision_network",
        "translation_transformer",
    ),
    "distill_lightning.outputs": ("Boxes", "Categorical", "Gaussian", "Tokens", "metrics"),
    "distill_lightning.outputs.metrics": ("AURC", "Agreement", "AngularError", "CalibrationError", "GapReduction"),
    "distill_lightning.schedules": ("GroupSchedules", "InverseSquareRoot", "OneCycle"),
    "distill_lightning.storage": ("PredictionStore",),
    "distill_lightning.studies.compare.api": ("compare",),
    "distill_lightning.studies.compare.comparison": ("Comparison",),
    "distill_lightning.studies.export.command": ("export_checkpoint",),
    "distill_lightning.studies.export.student": ("load_exported",),
    "distill_lightning.teachers": (
        "Features",
        "Logits",
        "MeanLogits",
        "Softened",
        "TeacherEnsemble",
        "TeacherStore",
        "Teachers",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605  (type checkers have the imports above)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def import_all() -> None:
    """Import every public part, so that jsonargparse finds the classes by their bare names."""
    for name in __all__:
        getattr(sys.modules[__name__], name)
