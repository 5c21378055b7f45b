"""The objects that a comparison's configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import nn

import distill_lightning
from distill_lightning.arguments import takes
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import dry_forward
from distill_lightning.modules import DistillationModule, ParaphraserModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare.backbones import backbones_of, with_backbone
from distill_lightning.studies.compare.checks import is_count
from distill_lightning.studies.compare.config import CompareConfig, Spec
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import ALONE, Row, rows_of
from distill_lightning.studies.compare.specs import (
    filled,
    find,
    parsed,
    remembering_warnings,
    set_up,
    takes_teachers,
    told_by,
    with_optimizer,
)
from distill_lightning.studies.compare.tasks import task_of
from distill_lightning.studies.data import splits_of


class Experiment:
    """Builds the objects of a comparison, fresh ones at every call.

    Args:
        config: the comparison.

    Attributes:
        sample: the data module, set up.
        task: what is measured.
        splits: fingerprints of its data.
        warned: what the data have warned of.
        backbones: what trains the students' backbones, by name.

    Raises:
        ArgumentError: a class that cannot be found or does not take what it is given.
        InputError: data that cannot be read, or networks, layers and options that do not fit together.
    """

    def __init__(self, config: CompareConfig) -> None:
        # Classes have short names once they are imported.
        distill_lightning.import_all()
        self.config = config
        self.rows = rows_of(config)
        self._data = parsed("data", LightningDataModule, config.data)
        with remembering_warnings() as self.warned:
            self.sample = self.data(order_seed=0)
            self.task = task_of(self.sample)
            self._refuse_teachers()
            if isinstance(self.task, OutputsTask):
                # Not after a download of hours.
                _check_told(self.sample, "num_classes", "input_shape")
            set_up(self.sample)
            _check_told(self.sample, "num_classes")
            self.splits = splits_of(self.sample)
        self._known = known = told_by(self.sample) | {
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_scheduler,
        }
        self.backbones = backbones_of(config)
        if config.teachers.network is not None:
            self._teacher = parsed(
                "teachers.network", nn.Module, filled("teachers.network", config.teachers.network, known)
            )
        self._student = self._parsed_student()
        supervised = {"class_path": f"distill_lightning.{self.task.module}", **(config.supervised or {})}
        supervised.pop("backbone", None)
        self._supervised = parsed(
            "supervised", Callable[[nn.Module], DistillationModule], filled("supervised", supervised, known)
        )
        self._methods = {
            name: parsed(
                f"methods.{name}",
                Callable[[nn.Module, Sequence[nn.Module]], DistillationModule]
                if self._takes_teachers(name)
                else Callable[[nn.Module], DistillationModule],
                filled(
                    f"methods.{name}", {key: spec[key] for key in ("class_path", "init_args") if key in spec}, known
                ),
            )
            for name, spec in config.methods.items()
        }
        self._paraphrasers = {
            name: parsed(
                f"methods.{name}.paraphrasers",
                Callable[[Sequence[nn.Module]], ParaphraserModule],
                filled(f"methods.{name}.paraphrasers", _paraphraser_spec(name, spec), known),
            )
            for name, spec in config.methods.items()
            if "paraphrasers" in spec
        }
        self._try()

    def data(self, *, order_seed: int) -> ViewDataModule:
        """The data module, its training order drawn by ``order_seed``."""
        data: ViewDataModule = self._data()
        data.order_seed = order_seed
        return data

    def teacher(self) -> nn.Module:
        """One teacher's network."""
        network: nn.Module = self._teacher()
        return network

    def student(self, backbone: Path | None = None) -> nn.Module:
        """The student's network.

        Args:
            backbone: the file of the weights that its backbone begins with.
        """
        network: nn.Module = (self._student if backbone is None else self._parsed_student(backbone))()
        return network

    def _parsed_student(self, backbone: Path | None = None) -> Callable[[], Any]:
        spec = with_backbone(self.config.student, self._known, backbone)
        return parsed("student", nn.Module, filled("student", spec, self._known))

    def supervised(self, network: nn.Module) -> DistillationModule:
        """Plain training, of a teacher or of the student alone."""
        module: DistillationModule = self._supervised()(network)
        return with_optimizer(module, self.config.supervised or {}, self._known)

    def paraphrasers(self, row: Row, teachers: Sequence[nn.Module]) -> ParaphraserModule | None:
        """The module that trains the paraphrasers of a row's own teachers, if the row has any."""
        if row.method not in self._paraphrasers:
            return None
        module: ParaphraserModule = self._paraphrasers[row.method]()(list(teachers))
        return module

    def method(
        self,
        row: Row,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        paraphrasers: Sequence[nn.Module] | None = None,
    ) -> DistillationModule:
        """The module of a row of the table, under the teachers that are its own."""
        if row.method is None:
            return self.supervised(student)
        networks = (student, list(teachers)) if self._takes_teachers(row.method) else (student,)
        options = {} if paraphrasers is None else {"paraphrasers": list(paraphrasers)}
        module: DistillationModule = self._methods[row.method]()(*networks, **options)
        return with_optimizer(module, self.config.methods[row.method], self._known)

    def _takes_teachers(self, method: str) -> bool:
        """Whether a method's class takes teachers; one that cannot be found is left to the parser to report."""
        spec = self.config.methods[method]
        target = find(spec.get("class_path"))
        has_teachers = takes_teachers(spec.get("class_path"))
        if not has_teachers and ("teachers" in spec or "stages" in spec):
            raise InputError(f"methods.{method}: {spec['class_path']} has no teachers: leave out teachers and stages")
        if (
            target is not None
            and has_teachers
            and not ({"teachers", "stages"} & spec.keys() or self.config.number_of_teachers)
        ):
            raise InputError(
                f"methods.{method}: {spec['class_path']} takes teachers, and the comparison has none: give some at the "
                f"top level, or let an earlier row be its teacher, for example with teachers: {ALONE}"
            )
        return has_teachers

    def _refuse_teachers(self) -> None:
        if self.config.number_of_teachers and not isinstance(self.task, OutputsTask):
            raise InputError(
                f"teachers: {type(self.sample).__name__} is for a task that has no ensembles here: leave them out, or "
                f"let an earlier row teach, for example by methods.NAME.teachers: {ALONE}"
            )

    def _try(self) -> None:
        """Build everything once, so that nothing is found wrong after hours of training."""
        with torch.random.fork_rng(devices=[]):
            teachers = [self.teacher() for _ in range(self.config.number_of_teachers)]
            if teachers:
                shape = dry_forward(teachers[0], self.sample.input_shape).shape
                self.supervised(self.student()).check_output("teachers.network", teachers[0], shape)
            for name in sorted({row.backbone for row in self.rows if row.backbone is not None}):
                self.backbones[name].try_on(self.student)
            for row in self.rows:
                own = [self.student()] if isinstance(row.teachers, str) else teachers[: row.teachers]
                paraphrasers = self.paraphrasers(row, own)
                given = None if paraphrasers is None else list(paraphrasers.paraphrasers)
                check_optimizer(self.method(row, self.student(), own, given))


def _check_told(data: Any, *names: str) -> None:
    """Refuse data that do not tell what everything is built with.

    Raises:
        InputError: a name has no value; a regression has no classes, and says so.
    """
    is_regression = hasattr(data, "num_classes") and getattr(data, "num_targets", None) is not None
    missing = [
        name for name in names if getattr(data, name, None) is None and not (name == "num_classes" and is_regression)
    ]
    if missing:
        raise InputError(
            f"data: {type(data).__name__} does not tell its {' and '.join(missing)}: give it "
            f"{'these attributes' if len(missing) > 1 else 'that attribute'}"
        )


def _paraphraser_spec(name: str, spec: Spec) -> Spec:
    """The spec of what trains a method's paraphrasers, its layers those that the method taps."""
    given = spec["paraphrasers"]
    if not isinstance(given, Mapping) or not is_count(given.get("epochs")) or given.keys() - {"epochs", "init_args"}:
        raise InputError(f"methods.{name}.paraphrasers: expected epochs, at least 1, and init_args, got {given}")
    target = find(spec.get("class_path"))
    if target is not None and not takes(target, "paraphrasers"):
        raise InputError(f"methods.{name}: {spec['class_path']} takes no paraphrasers: leave them out")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}
