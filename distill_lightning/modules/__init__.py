"""One LightningModule per method."""

from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.compression import CompressionBaseline
from distill_lightning.modules.extracurricular import ExtracurricularModule
from distill_lightning.modules.feed import FEEDModule, LogitTerm
from distill_lightning.modules.generator import GeneratorModule
from distill_lightning.modules.kd import KDModule
from distill_lightning.modules.meal_v2 import MEALV2Module
from distill_lightning.modules.options import TrainingOptions, default_optimizer
from distill_lightning.modules.paraphraser import ParaphraserModule
from distill_lightning.modules.self_kd import SelfKDModule
from distill_lightning.modules.sequential_feed import Stage, sequential_feed
from distill_lightning.modules.supervised import RegressionModule, SupervisedModule

__all__ = [
    "CompressionBaseline",
    "DistillationModule",
    "ExtracurricularModule",
    "FEEDModule",
    "GeneratorModule",
    "KDModule",
    "LogitTerm",
    "MEALV2Module",
    "ParaphraserModule",
    "RegressionModule",
    "SelfKDModule",
    "Stage",
    "SupervisedModule",
    "TrainingOptions",
    "default_optimizer",
    "sequential_feed",
]
