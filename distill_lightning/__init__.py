"""distill_lightning: knowledge distillation and compression as PyTorch Lightning modules."""

from distill_lightning import compression, functional, layers, networks
from distill_lightning.callbacks import CompressionCallback
from distill_lightning.compression import Compressor, load_compressed
from distill_lightning.data import samplers
from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules import (
    DigitsDataModule,
    DocstringsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    IndexedDataModule,
    InMemoryImageDataModule,
    RotatedDigitsDataModule,
    RotatedFashionMNISTDataModule,
)
from distill_lightning.data.samplers import (
    CutMixSampler,
    EmpiricalSampler,
    FunctionSampler,
    GeneratorSampler,
    MixupSampler,
)
from distill_lightning.errors import InputError
from distill_lightning.modules import (
    CompressionBaseline,
    DistillationModule,
    ExtracurricularModule,
    FEEDModule,
    GeneratorModule,
    KDModule,
    MEALV2Module,
    ParaphraserModule,
    RegressionModule,
    SelfKDModule,
    SupervisedModule,
    sequential_feed,
)
from distill_lightning.networks import (
    AdaptedInput,
    Pretrained,
    SmallCNN,
    SmallLSTM,
    SmallResNet,
    SmallTransformer,
    pytorchcv_network,
    timm_network,
    torchvision_network,
)
from distill_lightning.outputs import metrics
from distill_lightning.outputs.metrics import AURC, Agreement, AngularError, CalibrationError, GapReduction
from distill_lightning.schedules import GroupSchedules, OneCycle
from distill_lightning.storage import PredictionStore
from distill_lightning.teachers import TeacherEnsemble, TeacherStore

__version__ = "0.1.0"

__all__ = [
    "AURC",
    "AdaptedInput",
    "Agreement",
    "AngularError",
    "Batch",
    "CalibrationError",
    "CompressionBaseline",
    "CompressionCallback",
    "Compressor",
    "CutMixSampler",
    "DigitsDataModule",
    "DistillationModule",
    "DocstringsDataModule",
    "EmpiricalSampler",
    "ExtracurricularModule",
    "FEEDModule",
    "FashionMNISTDataModule",
    "FunctionSampler",
    "GapReduction",
    "GeneratorModule",
    "GeneratorSampler",
    "GroupSchedules",
    "ImageFolderDataModule",
    "InMemoryImageDataModule",
    "IndexedDataModule",
    "InputError",
    "KDModule",
    "MEALV2Module",
    "MixupSampler",
    "OneCycle",
    "ParaphraserModule",
    "PredictionStore",
    "Pretrained",
    "RegressionModule",
    "RotatedDigitsDataModule",
    "RotatedFashionMNISTDataModule",
    "SelfKDModule",
    "SmallCNN",
    "SmallLSTM",
    "SmallResNet",
    "SmallTransformer",
    "SupervisedModule",
    "TeacherEnsemble",
    "TeacherStore",
    "compression",
    "functional",
    "layers",
    "load_compressed",
    "metrics",
    "networks",
    "pytorchcv_network",
    "samplers",
    "sequential_feed",
    "timm_network",
    "torchvision_network",
]
