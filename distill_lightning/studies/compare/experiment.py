"""The objects that a comparison's configuration describes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import nn

import distill_lightning
from distill_lightning.arguments import takes
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError, refused_at
from distill_lightning.layers import dry_forward
from distill_lightning.modules import DistillationModule, ParaphraserModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare.backbones import backbones_of, with_backbone
from distill_lightning.studies.compare.checks import is_count
from distill_lightning.studies.compare.config import CompareConfig, Spec, TeachersConfig
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import ALONE, Row, rows_of
from distill_lightning.studies.compare.specs import filled, find, parsed, remembering_warnings, set_up, told_by
from distill_lightning.studies.compare.tasks import task_of
from distill_lightning.studies.compare.trials import Options, trials_of, with_options
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
        self._teachers = [
            parsed(key, nn.Module, _filled_teacher(key, spec, known)) for key, spec in _teacher_specs(config.teachers)
        ]
        self._student = self._parsed_student()
        self._supervised = self._parsed_supervised()
        self._methods = {name: self._parsed_method(name) for name in config.methods}
        self._paraphrasers = {
            name: self._parsed_paraphrasers(name) for name, spec in config.methods.items() if "paraphrasers" in spec
        }
        self._try()

    def data(self, *, order_seed: int) -> ViewDataModule:
        """The data module, its training order drawn by ``order_seed``."""
        data: ViewDataModule = self._data()
        data.order_seed = order_seed
        return data

    def teacher(self, number: int = 1) -> nn.Module:
        """One teacher's network.

        Args:
            number: its place in the list of those that are given, from 1; those that are trained here are of one kind.
        """
        network: nn.Module = self._teachers[min(number, len(self._teachers)) - 1]()
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

    def _parsed_supervised(self) -> Callable[[], Any]:
        spec = {"class_path": f"distill_lightning.{self.task.module}", **(self.config.supervised or {})}
        spec.pop("backbone", None)
        kind = Callable[[nn.Module], DistillationModule]
        return parsed("supervised", kind, filled("supervised", spec, self._known))

    def _parsed_method(self, name: str) -> Callable[[], Any]:
        given = self.config.methods[name]
        spec = {key: given[key] for key in ("class_path", "init_args") if key in given}
        kind = (
            Callable[[nn.Module, Sequence[nn.Module]], DistillationModule]
            if self._takes_teachers(name)
            else Callable[[nn.Module], DistillationModule]
        )
        return parsed(f"methods.{name}", kind, filled(f"methods.{name}", spec, self._known))

    def _parsed_paraphrasers(self, name: str) -> Callable[[], Any]:
        spec = filled(f"methods.{name}.paraphrasers", _paraphraser_spec(name, self.config.methods[name]), self._known)
        return parsed(f"methods.{name}.paraphrasers", Callable[[Sequence[nn.Module]], ParaphraserModule], spec)

    def with_options(self, row: Row, options: Options) -> Experiment:
        """The same comparison, in which a row has other options: a trial of its search, or what was chosen by it.

        Raises:
            ArgumentError: the row's class does not take them.
            InputError: there is no such option.
        """
        changed = copy.copy(self)
        changed.use(row, options)
        return changed

    def use(self, row: Row, options: Options) -> None:
        """Give a row other options from now on; see `with_options`."""
        self.config = with_options(self.config, row, options)
        if row.method is None:
            self._supervised = self._parsed_supervised()
            return
        self._methods = {**self._methods, row.method: self._parsed_method(row.method)}
        if row.method in self._paraphrasers:
            self._paraphrasers = {**self._paraphrasers, row.method: self._parsed_paraphrasers(row.method)}

    def supervised(self, network: nn.Module) -> DistillationModule:
        """Plain training, of a teacher or of the student alone."""
        module: DistillationModule = self._supervised()(network)
        return module

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
        return module

    def _takes_teachers(self, method: str) -> bool:
        """Whether a method's class takes teachers; one that cannot be found is left to the parser to report."""
        spec = self.config.methods[method]
        target = find(str(spec.get("class_path")))
        has_teachers = target is None or takes(target, "teachers")
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
        trials = trials_of(self.config, self.rows)
        with torch.random.fork_rng(devices=[]):
            teachers = [self.teacher(number + 1) for number in range(self.config.number_of_teachers)]
            for (key, _), teacher in zip(_teacher_specs(self.config.teachers), teachers, strict=False):
                shape = dry_forward(teacher, self.sample.input_shape).shape
                self.supervised(self.student()).check_output(key, teacher, shape)
            for name in sorted({row.backbone for row in self.rows if row.backbone is not None}):
                self.backbones[name].try_on(self.student)
            for row in self.rows:
                own = [self.student()] if isinstance(row.teachers, str) else teachers[: row.teachers]
                self.try_row(row, own)
                for options in trials.get(row.name, []):
                    self.with_options(row, options).try_row(row, own)

    def try_row(self, row: Row, teachers: Sequence[nn.Module]) -> None:
        """Build a row's module, so that what is wrong with it is said.

        Raises:
            InputError: networks, layers and options that do not fit together.
        """
        with refused_at("supervised" if row.method is None else f"methods.{row.method}"):
            paraphrasers = self.paraphrasers(row, teachers)
            given = None if paraphrasers is None else list(paraphrasers.paraphrasers)
            check_optimizer(self.method(row, self.student(), teachers, given))


def _teacher_specs(teachers: TeachersConfig) -> list[tuple[str, Spec]]:
    """What describes the teachers' networks, under the keys where it stands."""
    if teachers.given is not None:
        return [(f"teachers.{number}", spec) for number, spec in enumerate(teachers.given)]
    return [] if teachers.network is None else [("teachers.network", teachers.network)]


def _filled_teacher(key: str, spec: Spec, known: Mapping[str, Any]) -> Spec:
    """A teacher's spec with the known values in the network whose weights are loaded, too."""
    arguments = spec.get("init_args")
    if isinstance(arguments, Mapping) and isinstance(arguments.get("network"), Mapping):
        nested = _filled_teacher(f"{key}.init_args.network", dict(arguments["network"]), known)
        spec = {**spec, "init_args": {**arguments, "network": nested}}
    return filled(key, spec, known)


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
    target = find(str(spec.get("class_path")))
    if target is not None and not takes(target, "paraphrasers"):
        raise InputError(f"methods.{name}: {spec['class_path']} takes no paraphrasers: leave them out")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}
