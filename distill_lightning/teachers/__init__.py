"""What frozen networks say: asked, remembered, kept on disk."""

from distill_lightning.teachers.ensemble import EnsembleRule, TeacherEnsemble, check_classes, check_gaussian
from distill_lightning.teachers.store import TeacherStore

__all__ = ["EnsembleRule", "TeacherEnsemble", "TeacherStore", "check_classes", "check_gaussian"]
