"""One LightningModule per method."""

from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.feed import FEEDModule
from distill_lightning.modules.kd import KDModule
from distill_lightning.modules.optimization import check_optimizer
from distill_lightning.modules.supervised import SupervisedModule

__all__ = ["DistillationModule", "FEEDModule", "KDModule", "SupervisedModule", "check_optimizer"]
