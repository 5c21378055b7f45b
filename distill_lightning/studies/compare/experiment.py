"""The objects that a comparison's configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning import LightningDataModule
from torch import nn

import distill_lightning
from distill_lightning.arguments import arguments_of, takes
from distill_lightning.callables import check_callables, named
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import dry_forward
from distill_lightning.modules import DistillationModule, ParaphraserModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare.config import CompareConfig, Row, Spec, is_count, rows_of
from distill_lightning.studies.compare.tasks import task_of
from distill_lightning.studies.data import splits_of


class Experiment:
    """Builds the objects of a comparison, fresh ones at every call.

    Args:
        config: the comparison.

    Attributes:
        sample: the data module, set up.
        splits: fingerprints of its data.

    Raises:
        ArgumentError: a class that cannot be found or does not take what it is given.
        InputError: data that cannot be read, or networks, layers and options that do not fit together.
    """

    def __init__(self, config: CompareConfig) -> None:
        # Classes have short names once they are imported.
        distill_lightning.import_all()
        self.config = config
        self.rows = rows_of(config)
        self._data = _parsed("data", LightningDataModule, config.data)
        self.sample = self.data(order_seed=0)
        told = {name: getattr(self.sample, name, None) for name in ("num_classes", "input_shape")}
        # A regression has no classes, and says so.
        is_regression = hasattr(self.sample, "num_classes") and getattr(self.sample, "num_targets", None) is not None
        missing = [name for name in told if told[name] is None and not (name == "num_classes" and is_regression)]
        if missing:
            raise InputError(
                f"data: {type(self.sample).__name__} does not tell its {' and '.join(missing)}: give it "
                f"{'these attributes' if len(missing) > 1 else 'that attribute'}"
            )
        self.task = task_of(self.sample.num_classes)
        self.sample.prepare_data()
        for stage in ("fit", "test"):
            self.sample.setup(stage)
        self.splits = splits_of(self.sample)
        shape = self.sample.input_shape
        known = {
            "num_classes": self.sample.num_classes,
            "num_targets": getattr(self.sample, "num_targets", None),
            "in_channels": shape[0],
            "input_shape": list(shape),
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_scheduler,
        }
        self._teacher = _parsed(
            "teachers.network", nn.Module, _filled("teachers.network", config.teachers.network, known)
        )
        self._student = _parsed("student", nn.Module, _filled("student", config.student, known))
        supervised = config.supervised or {"class_path": f"distill_lightning.{self.task.module.__name__}"}
        self._supervised = _parsed(
            "supervised", Callable[[nn.Module], DistillationModule], _filled("supervised", supervised, known)
        )
        self._methods = {
            name: _parsed(
                f"methods.{name}",
                Callable[[nn.Module, Sequence[nn.Module]], DistillationModule]
                if self._takes_teachers(name)
                else Callable[[nn.Module], DistillationModule],
                _filled(
                    f"methods.{name}", {key: spec[key] for key in ("class_path", "init_args") if key in spec}, known
                ),
            )
            for name, spec in config.methods.items()
        }
        self._paraphrasers = {
            name: _parsed(
                f"methods.{name}.paraphrasers",
                Callable[[Sequence[nn.Module]], ParaphraserModule],
                _filled(f"methods.{name}.paraphrasers", _paraphraser_spec(name, spec), known),
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

    def student(self) -> nn.Module:
        """The student's network."""
        network: nn.Module = self._student()
        return network

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
        target = _find(str(spec.get("class_path")))
        has_teachers = target is None or takes(target, "teachers")
        if not has_teachers and ("teachers" in spec or "stages" in spec):
            raise InputError(f"methods.{method}: {spec['class_path']} has no teachers: leave out teachers and stages")
        return has_teachers

    def _try(self) -> None:
        """Build everything once, so that nothing is found wrong after hours of training."""
        with torch.random.fork_rng(devices=[]):
            teachers = [self.teacher() for _ in range(self.config.teachers.number)]
            shape = dry_forward(teachers[0], self.sample.input_shape).shape
            self.supervised(self.student()).check_output("teachers.network", teachers[0], shape)
            for row in self.rows:
                own = [self.student()] if isinstance(row.teachers, str) else teachers[: row.teachers]
                paraphrasers = self.paraphrasers(row, own)
                given = None if paraphrasers is None else list(paraphrasers.paraphrasers)
                check_optimizer(self.method(row, self.student(), own, given))


def _paraphraser_spec(name: str, spec: Spec) -> Spec:
    """The spec of what trains a method's paraphrasers, its layers those that the method taps."""
    given = spec["paraphrasers"]
    if not isinstance(given, Mapping) or not is_count(given.get("epochs")) or given.keys() - {"epochs", "init_args"}:
        raise InputError(f"methods.{name}.paraphrasers: expected epochs, at least 1, and init_args, got {given}")
    target = _find(str(spec.get("class_path")))
    if target is not None and not takes(target, "paraphrasers"):
        raise InputError(f"methods.{name}: {spec['class_path']} takes no paraphrasers: leave them out")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}


def _parsed(key: str, kind: Any, spec: Spec) -> Callable[[], Any]:
    """A function that builds what a spec describes; the spec itself is checked now."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind, required=True)
    nested: Any = spec
    for part in reversed(key.split(".")):
        nested = {part: nested}
    parsed = parser.parse_object(nested)
    check_callables(key, kind, parsed[key].as_dict() if isinstance(parsed[key], Namespace) else parsed[key])
    return lambda: parser.instantiate(parsed)[key]


def _filled(key: str, spec: Spec, known: Mapping[str, Any]) -> Spec:
    """A spec with the known values that its class takes and its ``init_args`` leave out."""
    arguments = spec.get("init_args") or {}
    if not isinstance(spec.get("class_path"), str) or not isinstance(arguments, Mapping):
        raise InputError(f"{key}: expected a class_path and init_args with its arguments, got {spec!r}")
    target = _find(spec["class_path"])
    accepted = {} if target is None else arguments_of(target)
    missing = {name: value for name, value in known.items() if name in accepted and value is not None}
    return {**spec, "init_args": {**missing, **arguments}}


def _find(class_path: str) -> Any:
    """The class or function; ``None`` if there is none: the parser's message is the better one then."""
    found = named(class_path)
    return found if callable(found) else None
