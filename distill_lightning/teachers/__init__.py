"""What frozen networks say: asked, remembered, kept on disk."""

from distill_lightning.teachers.about import About
from distill_lightning.teachers.ensemble import EnsembleRule, TeacherEnsemble
from distill_lightning.teachers.frozen import Frozen
from distill_lightning.teachers.questions import Features, Logits, MeanLogits, Question, Softened, TeacherOutputs
from distill_lightning.teachers.store import TeacherStore
from distill_lightning.teachers.teachers import Given, Teachers

__all__ = [
    "About",
    "EnsembleRule",
    "Features",
    "Frozen",
    "Given",
    "Logits",
    "MeanLogits",
    "Question",
    "Softened",
    "TeacherEnsemble",
    "TeacherOutputs",
    "TeacherStore",
    "Teachers",
]
