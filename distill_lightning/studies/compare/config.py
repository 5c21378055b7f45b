"""What a comparison's YAML file says, and the objects that it describes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule
from torch import nn

import distill_lightning
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import dry_forward
from distill_lightning.modules import DistillationModule, ParaphraserModule
from distill_lightning.modules.parts.optimization import check_optimizer
from distill_lightning.studies.compare.tasks import Classification, Regression, Task

# A bare dict: where its values may be of any type, jsonargparse makes objects of what has a class_path inside.
Spec = dict
"""A ``class_path`` with its ``init_args``, as everywhere in the YAML files."""

ALONE = "alone"
_METHOD_KEYS = ("class_path", "init_args", "teachers", "stages", "initial", "paraphrasers")


@dataclass(frozen=True)
class TeachersConfig:
    """The teachers.

    Args:
        network: what each of them is, by ``class_path`` and ``init_args``.
        number: how many, each from its own seed.
        epochs: how long each is trained; ``None``: as long as the students.
    """

    network: Spec
    number: int = 3
    epochs: int | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    ``num_classes`` or ``num_targets``, ``in_channels``, ``input_shape``, ``optimizer`` and ``lr_scheduler`` need not be
    repeated: where a class takes one and its ``init_args`` are silent, the data's or the top level's is put in.

    Args:
        data: the data module, by ``class_path`` and ``init_args``.
        teachers: the teachers' network and number.
        student: the student's network.
        methods: by name, each a module with a student and, if it takes any, teachers, by ``class_path`` and
            ``init_args``. ``teachers`` beside them says how many of the teachers it gets (all, if left out), or names
            an earlier row, whose student of the same seed is then its only teacher. ``stages: 3`` makes three such
            rows, ``<name>_1`` to ``<name>_3``: the first taught by the student alone, each other one by the one before
            it, as in sequential FEED. ``initial: <row>`` begins with the weights of an earlier row's student of the
            same seed, for methods that need a trained one, as MEAL V2 does. ``paraphrasers: {epochs: 5, init_args:
            {rate: 0.5}}`` trains a `ParaphraserModule` on the teachers first, for Factor Transfer. The student alone is
            always compared.
        epochs: length of every run.
        seeds: of the students' initial weights and of the order of their data.
        supervised: what trains the teachers and the student alone; without, `SupervisedModule`, or `RegressionModule`
            where the data have no classes.
        optimizer: of every run.
        lr_scheduler: of every run.
        output: folder for everything that is written.
        accelerator: the Trainer's.
        precision: the Trainer's.
    """

    data: Spec
    teachers: TeachersConfig
    student: Spec
    methods: dict[str, Spec]
    epochs: int
    seeds: list[int]
    supervised: Spec | None = None
    optimizer: Spec | None = None
    lr_scheduler: Spec | None = None
    output: str = "results/compare"
    accelerator: str = "auto"
    precision: str = "32"

    def as_plain(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain types."""
        plain = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if name != "output"}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: how it is called.
        method: the key in ``methods`` that describes it; ``None``: the student alone.
        teachers: how many of the teachers it gets, or the row whose student teaches it.
        stage: how many students taught one another before this one.
        initial: the row whose student's weights it begins with.
    """

    name: str
    method: str | None = None
    teachers: int | str = 0
    stage: int = 0
    initial: str | None = None


def rows_of(config: CompareConfig) -> list[Row]:
    """The students' rows, the student alone first.

    Raises:
        InputError: a row that is called like another, or is taught by one that does not come before it.
    """
    rows = {ALONE: Row(ALONE)}
    for method, spec in config.methods.items():
        names = [f"{method}_{stage}" for stage in range(1, spec.get("stages", 0) + 1)] or [method]
        teachers = ALONE if "stages" in spec else spec.get("teachers", config.teachers.number)
        initial = spec.get("initial")
        for name in names:
            for key, earlier in (("teachers", teachers), ("initial", initial)):
                if isinstance(earlier, str) and earlier not in rows:
                    raise InputError(
                        f"methods.{method}.{key}: {earlier!r} is no earlier row; rows so far: {', '.join(rows)}"
                    )
            if name in rows:
                raise InputError(f"methods: two rows are called {name!r}")
            stage = rows[teachers].stage + 1 if isinstance(teachers, str) else 0
            rows[name] = Row(name, method, teachers, stage, initial)
            teachers = name if "stages" in spec else teachers
    return list(rows.values())


def parse_config(arguments: Sequence[str]) -> CompareConfig:
    """Read ``CONFIG [--key value ...]``; a key on the command line wins over the file.

    Raises:
        ArgumentError: the file is missing or no YAML, a key is unknown, a value has the wrong type.
        InputError: a number or a name that cannot be used.
    """
    parser = ArgumentParser(
        prog="distill-lightning compare",
        usage="distill-lightning compare CONFIG [--epochs N] [--seeds [0,1,2]] [--output FOLDER] ...",
        description=(
            "Train the teachers, then every method with every seed; write results.csv, results.md and figures. "
            "Called again with the same configuration, it goes on where it stopped."
        ),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="The YAML file.")
    parser.add_class_arguments(CompareConfig)
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given[:1] = ["--config", given[0]]
    config = cast("CompareConfig", _build(CompareConfig, parser.instantiate(parser.parse_args(given))))
    _check(config)
    return config


def _build(cls: type, options: Any) -> Any:
    return cls(**{name: value for name, value in vars(options).items() if name != "config"})


def _check(config: CompareConfig) -> None:
    for epochs in (config.epochs, config.teachers.epochs):
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs must be at least 1, got {epochs}")
    if config.teachers.number < 1:
        raise InputError(f"teachers.number must be at least 1, got {config.teachers.number}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must be different numbers, at least one, got {config.seeds}")
    if not all(0 <= seed < 2**32 for seed in config.seeds):
        raise InputError(f"seeds must lie between 0 and 2**32 - 1, got {config.seeds}")
    for name, spec in config.methods.items():
        _check_method(name, spec, config.teachers.number)
    rows_of(config)


def _check_method(name: str, spec: Spec, available: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or name in (ALONE, "ensemble") or name.startswith("teacher_"):
        raise InputError(f"methods: {name!r} cannot be a method's name: letters, digits and _.+-, not a row's own")
    unknown = spec.keys() - set(_METHOD_KEYS)
    if unknown:
        raise InputError(f"methods.{name}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(_METHOD_KEYS)}")
    if "stages" in spec and ("teachers" in spec or not _is_count(spec["stages"])):
        raise InputError(f"methods.{name}.stages is a number, at least 1, and leaves no choice of teachers")
    if not isinstance(spec.get("initial", ""), str) or ("stages" in spec and "initial" in spec):
        raise InputError(f"methods.{name}.initial is an earlier row's name, and stages begin afresh")
    teachers = spec.get("teachers", available)
    counted = _is_count(teachers) and teachers <= available
    if not counted and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers must be between 1 and {available}, or an earlier row's name, got {teachers}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Experiment:
    """Builds the objects of a comparison, fresh ones at every call.

    Args:
        config: the comparison.

    Raises:
        ArgumentError: a class that cannot be found or does not take what it is given.
        InputError: data that cannot be read, or networks, layers and options that do not fit together.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.rows = rows_of(config)
        self._data = _parsed("data", LightningDataModule, config.data)
        self.sample = self.data(order_seed=0)
        for name in ("num_classes", "input_shape"):
            if not hasattr(self.sample, name):
                raise InputError(f"data: {type(self.sample).__name__} does not tell its {name}: give it that attribute")
        self.task: Task = Regression() if self.sample.num_classes is None else Classification()
        self.sample.prepare_data()
        for stage in ("fit", "test"):
            self.sample.setup(stage)
        shape = self.sample.input_shape
        known = {
            "num_classes": self.sample.num_classes,
            "num_targets": getattr(self.sample, "num_targets", None),
            "in_channels": shape[0],
            "input_shape": list(shape),
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_scheduler,
        }
        self._teacher = _parsed("teachers.network", nn.Module, _filled(config.teachers.network, known))
        self._student = _parsed("student", nn.Module, _filled(config.student, known))
        supervised = config.supervised or {"class_path": f"distill_lightning.{self.task.module.__name__}"}
        self._supervised = _parsed("supervised", Callable[[nn.Module], DistillationModule], _filled(supervised, known))
        self._methods = {
            name: _parsed(
                f"methods.{name}",
                Callable[[nn.Module, Sequence[nn.Module]], DistillationModule]
                if self._takes_teachers(name)
                else Callable[[nn.Module], DistillationModule],
                _filled({key: spec[key] for key in ("class_path", "init_args") if key in spec}, known),
            )
            for name, spec in config.methods.items()
        }
        self._paraphrasers = {
            name: _parsed(
                f"methods.{name}.paraphrasers",
                Callable[[Sequence[nn.Module]], ParaphraserModule],
                _filled(_paraphraser_spec(name, spec), known),
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
        """What trains the paraphrasers of a row's own teachers, if it wants any."""
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
        """Whether a method's class has teachers; one that cannot be found is reported by the parser."""
        spec = self.config.methods[method]
        target = _find(str(spec.get("class_path")))
        takes = target is None or "teachers" in inspect.signature(target).parameters
        if not takes and ("teachers" in spec or "stages" in spec):
            raise InputError(f"methods.{method}: {spec['class_path']} has no teachers: leave out teachers and stages")
        return takes

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
    if not isinstance(given, Mapping) or not _is_count(given.get("epochs")) or given.keys() - {"epochs", "init_args"}:
        raise InputError(f"methods.{name}.paraphrasers: expected epochs, at least 1, and init_args, got {given}")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}


def _parsed(key: str, kind: Any, spec: Spec) -> Callable[[], Any]:
    """Check a spec now, build its object whenever it is called."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind, required=True)
    nested: Any = spec
    for part in reversed(key.split(".")):
        nested = {part: nested}
    parsed = parser.parse_object(nested)
    return lambda: parser.instantiate(parsed)[key]


def _filled(spec: Spec, known: Mapping[str, Any]) -> Spec:
    """Put in what the class takes and its ``init_args`` leave out."""
    arguments = spec.get("init_args") or {}
    if not isinstance(spec.get("class_path"), str) or not isinstance(arguments, Mapping):
        raise InputError(f"expected a class_path and init_args with its arguments, got {spec!r}")
    target = _find(spec["class_path"])
    accepted: Iterable[str] = inspect.signature(target).parameters if target is not None else ()
    missing = {name: value for name, value in known.items() if name in accepted and value is not None}
    return {**spec, "init_args": {**missing, **arguments}}


def _find(class_path: str) -> Any:
    """The class or function; ``None`` if there is none, which the parser then says better."""
    module, _, name = class_path.rpartition(".")
    if not module:
        return getattr(distill_lightning, name, None)
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
