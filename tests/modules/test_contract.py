"""Every module of the package keeps the contract."""

import pytest

from distill_lightning import FEEDModule, KDModule, SupervisedModule, TeacherEnsemble
from distill_lightning.testing import CONTRACT


def supervised(student, teachers, num_classes):
    return SupervisedModule(student, num_classes=num_classes)


def kd(student, teachers, num_classes):
    return KDModule(student, TeacherEnsemble(teachers, weights=[1, 3]), num_classes=num_classes)


def feed(student, teachers, num_classes):
    return FEEDModule(
        student, teachers, num_classes=num_classes, student_layer="features", beta=10.0, kd_weight=0.5,
        teacher_weights=[1.0, 2.0], input_shape=(1, 8, 8),
    )  # fmt: skip


@pytest.mark.parametrize("build", [supervised, kd, feed])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point, build):
    CONTRACT[point](build)
