"""The objects that a comparison's configuration describes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn

import distill_lightning
from distill_lightning.errors import InputError, refused_at
from distill_lightning.layers import dry_forward, eval_mode
from distill_lightning.layers.call import call
from distill_lightning.modules import DistillationModule, ParaphraserModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare.backbones import backbones_of, with_backbone
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.constructors import Constructor
from distill_lightning.studies.compare.foreign_data import (
    TOLD,
    check_loaders,
    check_told,
    find_shape,
    first_batch,
    ordered,
    tell,
)
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import ALONE, Row, rows_of
from distill_lightning.studies.compare.specs import (
    check_top_level,
    constructor_for,
    filled,
    filled_network,
    find,
    paraphraser_spec,
    parsed,
    remembering_warnings,
    set_up,
    teacher_specs,
    told_by,
    with_optimizer,
)
from distill_lightning.studies.compare.storage import Storage, storage_of
from distill_lightning.studies.compare.subject import Subject
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
        check_top_level(config)
        spec = {name: value for name, value in config.data.items() if name not in TOLD}
        self._data = parsed("data", LightningDataModule, spec)
        with remembering_warnings() as self.warned:
            self.sample = self.data(order_seed=0)
            self.task = task_of(self.sample)
            self._refuse_teachers()
            if isinstance(self.task, OutputsTask):
                # Not after a download of hours.
                check_told(self.sample)
            set_up(self.sample)
            check_told(self.sample)
            check_loaders(self.sample)
            if isinstance(self.task, OutputsTask):
                find_shape(self.sample)
            self.splits = splits_of(self.sample)
        self._known = known = told_by(self.sample) | {
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_scheduler,
        }
        self.backbones = backbones_of(config)
        self._teachers = [
            parsed(key, nn.Module, filled_network(key, spec, known)) for key, spec in teacher_specs(config.teachers)
        ]
        self._student = self._parsed_student()
        self._supervised = self._parsed_supervised()
        self._methods = {name: self._parsed_method(name) for name in config.methods}
        self._paraphrasers = {
            name: self._parsed_paraphrasers(name) for name, spec in config.methods.items() if "paraphrasers" in spec
        }
        self._try()
        self.storage  # noqa: B018  (a limit that is none is found before a training)

    @cached_property
    def storage(self) -> Storage:
        """What of the teachers' answers is kept for all rows and seeds."""
        return storage_of(self)

    def data(self, *, order_seed: int, first_epoch: int = 0) -> Any:
        """The data module, its training order drawn by ``order_seed``.

        Args:
            order_seed: the seed.
            first_epoch: in which the training begins, or goes on.
        """
        data = self._data()
        tell(data, {name: self.config.data[name] for name in TOLD if name in self.config.data})
        return ordered(data, order_seed, first_epoch)

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

    def _parsed_supervised(self) -> tuple[Constructor, Callable[[], Any]]:
        spec = {"class_path": f"distill_lightning.{self.task.module}", **(self.config.supervised or {})}
        for name in ("backbone", "evaluate"):
            spec.pop(name, None)
        constructor = constructor_for("supervised", spec["class_path"])
        if constructor.student is None:
            raise InputError(
                f"supervised: {spec['class_path']} builds a network of its own, and has to train the student and the "
                "teachers: let it take a network as its first argument"
            )
        constructor = dataclasses.replace(constructor, teachers=None)
        return constructor, parsed("supervised", constructor.kind, filled("supervised", spec, self._known))

    def _parsed_method(self, name: str) -> tuple[Constructor, Callable[[], Any]]:
        given, key = self.config.methods[name], f"methods.{name}"
        spec = {part: given[part] for part in ("class_path", "init_args") if part in given}
        constructor = self._constructor(name)
        for part in ("initial", "backbone"):
            if constructor.student is None and part in given:
                raise InputError(f"{key}: {spec['class_path']} builds a network of its own: leave {part} out")
        return constructor, parsed(key, constructor.kind, filled(key, spec, self._known))

    def _parsed_paraphrasers(self, name: str) -> Callable[[], Any]:
        spec = filled(f"methods.{name}.paraphrasers", paraphraser_spec(name, self.config.methods[name]), self._known)
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

    def supervised(self, network: nn.Module) -> Any:
        """Plain training, of a teacher or of the student alone."""
        constructor, make = self._supervised
        module = constructor.build("supervised", make(), network, [])
        return with_optimizer(module, self.config.supervised or {}, self._known)

    def subject(self, row: Row | None, module: LightningModule, given: nn.Module | None) -> Subject:
        """What of a module is evaluated, and kept.

        Args:
            row: of the table; ``None``: a teacher.
            module: of a run.
            given: the network that it was given.
        """
        spec = (self.config.supervised or {}) if row is None or row.method is None else self.config.methods[row.method]
        return Subject(key_of(row), module, given, evaluate=spec.get("evaluate"))

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
    ) -> Any:
        """The module of a row of the table, under the teachers that are its own."""
        if row.method is None:
            return self.supervised(student)
        constructor, make = self._methods[row.method]
        options = {} if paraphrasers is None else {"paraphrasers": list(paraphrasers)}
        module = constructor.build(key_of(row), make(), student, teachers, **options)
        return with_optimizer(module, self.config.methods[row.method], self._known)

    def _constructor(self, method: str) -> Constructor:
        """How a method's class takes its networks; one that cannot be found is left to the parser to report."""
        spec = self.config.methods[method]
        target = find(spec.get("class_path"))
        constructor = constructor_for(f"methods.{method}", spec.get("class_path"))
        has_teachers = constructor.teachers is not None
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
        return constructor

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
            student = self.student()
            if teachers:
                judge = self.subject(None, self.supervised(student), student).judge(self.sample)
                for (key, _), teacher in zip(teacher_specs(self.config.teachers), teachers, strict=False):
                    judge.check_output(key, teacher, self._output_shape(teacher))
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
        with refused_at(key_of(row)):
            paraphrasers = self.paraphrasers(row, teachers)
            given = None if paraphrasers is None else list(paraphrasers.paraphrasers)
            module = self.method(row, self.student(), teachers, given)
            if isinstance(module, DistillationModule):
                check_optimizer(module)

    def _output_shape(self, network: nn.Module) -> Sequence[int]:
        if getattr(self.sample, "input_shape", None) is not None:
            return tuple(dry_forward(network, self.sample.input_shape).shape)
        with eval_mode(network), torch.no_grad():
            return tuple(call(network, first_batch(self.sample).input).shape)


def key_of(row: Row | None) -> str:
    """Where the class that trains a row stands in the YAML file."""
    return "supervised" if row is None or row.method is None else f"methods.{row.method}"
