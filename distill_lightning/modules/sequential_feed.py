"""FEED, its teachers one after another: each generation of students teaches the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import pytorch_lightning as pl
import torch
from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.feed import FEEDModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.supervised import SupervisedModule


class Stage(NamedTuple):
    """What one stage of sequential training left.

    Attributes:
        number: 0 for the stage without a teacher.
        student: its trained network, in eval mode.
        metrics: the last values under ``val/`` and, where the student was tested, ``test/``.
    """

    number: int
    student: nn.Module
    metrics: dict[str, float]


def sequential_feed(
    make_student: Callable[[], nn.Module],
    make_trainer: Callable[[], pl.Trainer],
    datamodule: pl.LightningDataModule,
    *,
    stages: int,
    num_classes: int,
    student_layer: str | None = None,
    beta: float | None = None,
    make_module: Callable[[nn.Module, nn.Module], DistillationModule] | None = None,
    seed: int | None = 0,
    test: bool = False,
    **options: Unpack[TrainingOptions],
) -> list[Stage]:
    """Sequential FEED: stage 0 learns from the labels alone, every later stage from the stage before it.

    A stage is a new student and a new translator; the frozen student of the stage before is its only teacher. Nothing
    is continued and nothing is averaged. Every later stage is a `FEEDModule` with one teacher. With another method it
    is training in generations, Born-Again Networks (https://arxiv.org/abs/1805.04770) for example::

        stages = sequential_feed(
            lambda: SmallResNet(10),
            lambda: Trainer(max_epochs=30),
            DigitsDataModule(),
            stages=5,
            num_classes=10,
            make_module=partial(KDModule, num_classes=10, temperature=1.0),
        )
        [stage.metrics["val/accuracy"] for stage in stages]

    Within a stage the order is: seed, student, module, trainer, ``fit``.

    Park, Kwak: *FEED: Feature-level Ensemble for Knowledge Distillation*, https://arxiv.org/abs/1909.10754

    Args:
        make_student: makes a new, freshly initialised student on every call.
        make_trainer: makes a new Trainer on every call; it decides how long a stage trains and where it logs.
        datamodule: the data of every stage.
        stages: number of stages with a teacher, so that ``stages + 1`` students are trained.
        num_classes: ``K``.
        student_layer: dotted path of the student's and so of the teacher's last feature map, for `FEEDModule`.
        beta: weight of the feature term, for `FEEDModule`; ``None``: its default.
        make_module: makes a later stage's module from its student and its teacher, in place of ``student_layer`` and
            ``beta``: ``functools.partial(FEEDModule, num_classes=10, student_layer="stage3", beta=100)``.
        seed: stage ``k`` begins with ``torch.manual_seed(seed + k)``; ``None``: the random state is left alone.
        test: whether every stage's student is tested, too.
        options: of stage 0 and of `FEEDModule`, see `TrainingOptions`; what ``make_module`` makes has its own.

    Returns:
        Every stage's student and metrics, stage 0 first.

    Raises:
        InputError: ``stages`` is not positive, neither or both of ``student_layer`` and ``make_module`` are given,
            ``beta`` beside ``make_module``, or ``make_student`` or ``make_trainer`` returns what it returned before.
    """
    _check(stages, student_layer, beta, make_module)

    def supervised(student: nn.Module) -> DistillationModule:
        return SupervisedModule(student, num_classes=num_classes, **options)

    def distilled(student: nn.Module, teacher: nn.Module) -> DistillationModule:
        if make_module is not None:
            return make_module(student, teacher)
        return FEEDModule(
            student, teacher, num_classes=num_classes, student_layer=str(student_layer), beta=beta, **options
        )

    finished: list[Stage] = []
    trainers: list[pl.Trainer] = []
    for number in range(stages + 1):
        if seed is not None:
            torch.manual_seed(seed + number)
        student = make_student()
        _refuse_again("make_student", student, [stage.student for stage in finished])
        # A copy teaches, because a teacher is frozen and what is returned should not be.
        module = distilled(student, copy.deepcopy(finished[-1].student)) if finished else supervised(student)
        trainer = make_trainer()
        _refuse_again("make_trainer", trainer, trainers)
        trainers.append(trainer)
        trainer.fit(module, datamodule=datamodule)
        if trainer.interrupted:
            # Older Lightning versions return from an interrupted fit as if it had ended.
            raise KeyboardInterrupt(f"stage {number} was interrupted")
        metrics = _metrics(trainer, "val/")
        if test:
            trainer.test(module, datamodule=datamodule, verbose=False)
            metrics |= _metrics(trainer, "test/")
        finished.append(Stage(number, student.eval(), metrics))
    return finished


def _check(stages: int, student_layer: str | None, beta: float | None, make_module: object) -> None:
    if stages < 1:
        raise InputError(f"stages must be at least 1, got {stages}")
    if (student_layer is None) == (make_module is None):
        raise InputError("sequential_feed needs student_layer, for FEED as it is, or make_module, and not both")
    if beta is not None and make_module is not None:
        raise InputError("beta is for FEED as it is: let make_module give it to what it makes")


def _metrics(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _refuse_again(name: str, made: object, before: Sequence[object]) -> None:
    if any(made is other for other in before):
        raise InputError(f"{name} returned the same object twice: it must make a new one on every call")
