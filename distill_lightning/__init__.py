"""distill_lightning: knowledge distillation and compression as PyTorch Lightning modules."""

from distill_lightning import functional, layers, metrics, networks
from distill_lightning.batch import Batch
from distill_lightning.datamodules import DigitsDataModule, FashionMNISTDataModule, InMemoryImageDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import TeacherEnsemble
from distill_lightning.metrics import Agreement, CalibrationError
from distill_lightning.modules import DistillationModule, FEEDModule, KDModule, SupervisedModule
from distill_lightning.networks import Pretrained, SmallResNet, pytorchcv_network, timm_network, torchvision_network
from distill_lightning.schedules import OneCycle

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Batch",
    "CalibrationError",
    "DigitsDataModule",
    "DistillationModule",
    "FEEDModule",
    "FashionMNISTDataModule",
    "InMemoryImageDataModule",
    "InputError",
    "KDModule",
    "OneCycle",
    "Pretrained",
    "SmallResNet",
    "SupervisedModule",
    "TeacherEnsemble",
    "functional",
    "layers",
    "metrics",
    "networks",
    "pytorchcv_network",
    "timm_network",
    "torchvision_network",
]
