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
from distill_lightning.data.transforms import CutMix, Cutout, LabelSmoothing, Mixup
from distill_lightning.errors import InputError
from distill_lightning.modules import (
    CompressionBaseline,
    DistillationModule,
    ExtracurricularModule,
    FEEDModule,
    GeneratorModule,
    KDModule,
    LogitTerm,
    MEALV2Module,
    ParaphraserModule,
    RegressionModule,
    SelfKDModule,
    SupervisedModule,
    TrainingOptions,
    sequential_feed,
)
from distill_lightning.modules.extracurricular import MatchDistribution, MatchPoint
from distill_lightning.modules.parts.adversary import (
    FixedDiscriminator,
    NoDiscriminator,
    OfficialDiscriminator,
    OwnDiscriminator,
)
from distill_lightning.modules.parts.distances import (
    AttentionDistance,
    Conv1x1Translator,
    Conv3Translator,
    FactorDistance,
    FunctionTranslator,
    HintDistance,
    LinearTranslator,
    NoTranslator,
)
from distill_lightning.modules.parts.past import MovingAverage, PastModel, StoredPast
from distill_lightning.modules.parts.sizes import EqualSizes, PooledSize, StudentSize, TeacherSize
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
from distill_lightning.outputs import Categorical, Gaussian, metrics
from distill_lightning.outputs.metrics import AURC, Agreement, AngularError, CalibrationError, GapReduction
from distill_lightning.schedules import GroupSchedules, OneCycle
from distill_lightning.storage import PredictionStore
from distill_lightning.teachers import Features, Logits, MeanLogits, Softened, TeacherEnsemble, Teachers, TeacherStore

__version__ = "0.1.0"

__all__ = [
    "AURC",
    "AdaptedInput",
    "Agreement",
    "AngularError",
    "AttentionDistance",
    "Batch",
    "CalibrationError",
    "Categorical",
    "CompressionBaseline",
    "CompressionCallback",
    "Compressor",
    "Conv1x1Translator",
    "Conv3Translator",
    "CutMix",
    "CutMixSampler",
    "Cutout",
    "DigitsDataModule",
    "DistillationModule",
    "DocstringsDataModule",
    "EmpiricalSampler",
    "EqualSizes",
    "ExtracurricularModule",
    "FEEDModule",
    "FactorDistance",
    "FashionMNISTDataModule",
    "Features",
    "FixedDiscriminator",
    "FunctionSampler",
    "FunctionTranslator",
    "GapReduction",
    "Gaussian",
    "GeneratorModule",
    "GeneratorSampler",
    "GroupSchedules",
    "HintDistance",
    "ImageFolderDataModule",
    "InMemoryImageDataModule",
    "IndexedDataModule",
    "InputError",
    "KDModule",
    "LabelSmoothing",
    "LinearTranslator",
    "LogitTerm",
    "Logits",
    "MEALV2Module",
    "MatchDistribution",
    "MatchPoint",
    "MeanLogits",
    "Mixup",
    "MixupSampler",
    "MovingAverage",
    "NoDiscriminator",
    "NoTranslator",
    "OfficialDiscriminator",
    "OneCycle",
    "OwnDiscriminator",
    "ParaphraserModule",
    "PastModel",
    "PooledSize",
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
    "Softened",
    "StoredPast",
    "StudentSize",
    "SupervisedModule",
    "TeacherEnsemble",
    "TeacherSize",
    "TeacherStore",
    "Teachers",
    "TrainingOptions",
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
