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
    from distill_lightning.compression import load_compressed as load_compressed
    from distill_lightning.data import samplers as samplers
    from distill_lightning.data.batch import Batch as Batch
    from distill_lightning.data.datamodules import DigitsDataModule as DigitsDataModule
    from distill_lightning.data.datamodules import DocstringsDataModule as DocstringsDataModule
    from distill_lightning.data.datamodules import FashionMNISTDataModule as FashionMNISTDataModule
    from distill_lightning.data.datamodules import ImageFolderDataModule as ImageFolderDataModule
    from distill_lightning.data.datamodules import IndexedDataModule as IndexedDataModule
    from distill_lightning.data.datamodules import InMemoryImageDataModule as InMemoryImageDataModule
    from distill_lightning.data.datamodules import RotatedDigitsDataModule as RotatedDigitsDataModule
    from distill_lightning.data.datamodules import RotatedFashionMNISTDataModule as RotatedFashionMNISTDataModule
    from distill_lightning.data.samplers import CutMixSampler as CutMixSampler
    from distill_lightning.data.samplers import EmpiricalSampler as EmpiricalSampler
    from distill_lightning.data.samplers import FunctionSampler as FunctionSampler
    from distill_lightning.data.samplers import GeneratorSampler as GeneratorSampler
    from distill_lightning.data.samplers import MixupSampler as MixupSampler
    from distill_lightning.errors import InputError as InputError
    from distill_lightning.modules import CompressionBaseline as CompressionBaseline
    from distill_lightning.modules import DistillationModule as DistillationModule
    from distill_lightning.modules import ExtracurricularModule as ExtracurricularModule
    from distill_lightning.modules import FEEDModule as FEEDModule
    from distill_lightning.modules import GeneratorModule as GeneratorModule
    from distill_lightning.modules import KDModule as KDModule
    from distill_lightning.modules import MEALV2Module as MEALV2Module
    from distill_lightning.modules import ParaphraserModule as ParaphraserModule
    from distill_lightning.modules import RegressionModule as RegressionModule
    from distill_lightning.modules import SelfKDModule as SelfKDModule
    from distill_lightning.modules import SupervisedModule as SupervisedModule
    from distill_lightning.modules.sequential_feed import sequential_feed as sequential_feed
    from distill_lightning.networks import AdaptedInput as AdaptedInput
    from distill_lightning.networks import Pretrained as Pretrained
    from distill_lightning.networks import SmallCNN as SmallCNN
    from distill_lightning.networks import SmallLSTM as SmallLSTM
    from distill_lightning.networks import SmallResNet as SmallResNet
    from distill_lightning.networks import SmallTransformer as SmallTransformer
    from distill_lightning.networks import pytorchcv_network as pytorchcv_network
    from distill_lightning.networks import timm_network as timm_network
    from distill_lightning.networks import torchvision_network as torchvision_network
    from distill_lightning.outputs import metrics as metrics
    from distill_lightning.outputs.metrics import AURC as AURC
    from distill_lightning.outputs.metrics import Agreement as Agreement
    from distill_lightning.outputs.metrics import AngularError as AngularError
    from distill_lightning.outputs.metrics import CalibrationError as CalibrationError
    from distill_lightning.outputs.metrics import GapReduction as GapReduction
    from distill_lightning.schedules import GroupSchedules as GroupSchedules
    from distill_lightning.schedules import OneCycle as OneCycle
    from distill_lightning.storage import PredictionStore as PredictionStore
    from distill_lightning.teachers import TeacherEnsemble as TeacherEnsemble
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
    "distill_lightning.compression": ("Compressor", "load_compressed"),
    "distill_lightning.data": ("samplers",),
    "distill_lightning.data.batch": ("Batch",),
    "distill_lightning.data.datamodules": (
        "DigitsDataModule",
        "DocstringsDataModule",
        "FashionMNISTDataModule",
        "ImageFolderDataModule",
        "IndexedDataModule",
        "InMemoryImageDataModule",
        "RotatedDigitsDataModule",
        "RotatedFashionMNISTDataModule",
    ),
    "distill_lightning.data.samplers": (
        "CutMixSampler",
        "EmpiricalSampler",
        "FunctionSampler",
        "GeneratorSampler",
        "MixupSampler",
    ),
    "distill_lightning.errors": ("InputError",),
    "distill_lightning.modules": (
        "CompressionBaseline",
        "DistillationModule",
        "ExtracurricularModule",
        "FEEDModule",
        "GeneratorModule",
        "KDModule",
        "MEALV2Module",
        "ParaphraserModule",
        "RegressionModule",
        "SelfKDModule",
        "SupervisedModule",
    ),
    "distill_lightning.modules.sequential_feed": ("sequential_feed",),
    "distill_lightning.networks": (
        "AdaptedInput",
        "Pretrained",
        "SmallCNN",
        "SmallLSTM",
        "SmallResNet",
        "SmallTransformer",
        "pytorchcv_network",
        "timm_network",
        "torchvision_network",
    ),
    "distill_lightning.outputs": ("metrics",),
    "distill_lightning.outputs.metrics": ("AURC", "Agreement", "AngularError", "CalibrationError", "GapReduction"),
    "distill_lightning.schedules": ("GroupSchedules", "OneCycle"),
    "distill_lightning.storage": ("PredictionStore",),
    "distill_lightning.teachers": ("TeacherEnsemble", "TeacherStore"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605  (type checkers have the imports above)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def import_all() -> None:
    """Import every public part, so that jsonargparse finds the classes by their bare names."""
    for name in __all__:
        getattr(sys.modules[__name__], name)
