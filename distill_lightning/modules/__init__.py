"""One LightningModule per method, a file each; none is imported before it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_lightning.modules.base import DistillationModule as DistillationModule
    from distill_lightning.modules.compression import CompressionBaseline as CompressionBaseline
    from distill_lightning.modules.detection import DetectionModule as DetectionModule
    from distill_lightning.modules.extracurricular import ExtracurricularModule as ExtracurricularModule
    from distill_lightning.modules.feed import FEEDModule as FEEDModule
    from distill_lightning.modules.generator import GeneratorModule as GeneratorModule
    from distill_lightning.modules.kd import KDModule as KDModule
    from distill_lightning.modules.meal_v2 import MEALV2Module as MEALV2Module
    from distill_lightning.modules.options import TrainingOptions as TrainingOptions
    from distill_lightning.modules.options import default_optimizer as default_optimizer
    from distill_lightning.modules.paraphraser import ParaphraserModule as ParaphraserModule
    from distill_lightning.modules.self_kd import SelfKDModule as SelfKDModule
    from distill_lightning.modules.self_kd_detection import SelfKDDetectionModule as SelfKDDetectionModule
    from distill_lightning.modules.sequential_feed import Stage as Stage
    from distill_lightning.modules.supervised import RegressionModule as RegressionModule
    from distill_lightning.modules.supervised import SupervisedModule as SupervisedModule
    from distill_lightning.modules.translation import SelfKDTranslationModule as SelfKDTranslationModule
    from distill_lightning.modules.translation import TranslationModule as TranslationModule

_FILES = {
    "CompressionBaseline": "compression",
    "DetectionModule": "detection",
    "DistillationModule": "base",
    "ExtracurricularModule": "extracurricular",
    "FEEDModule": "feed",
    "GeneratorModule": "generator",
    "KDModule": "kd",
    "MEALV2Module": "meal_v2",
    "ParaphraserModule": "paraphraser",
    "RegressionModule": "supervised",
    "SelfKDDetectionModule": "self_kd_detection",
    "SelfKDModule": "self_kd",
    "SelfKDTranslationModule": "translation",
    "Stage": "sequential_feed",
    "SupervisedModule": "supervised",
    "TrainingOptions": "options",
    "TranslationModule": "translation",
    "default_optimizer": "options",
}

__all__ = sorted(_FILES)  # noqa: PLE0605  (type checkers have the imports above)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
