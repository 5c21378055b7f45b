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
from distill_lightning.datamodules import InMemoryImageDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import check_classes, dry_forward
from distill_lightning.modules import DistillationModule, SupervisedModule, check_optimizer

Spec = dict[str, Any]
"""A ``class_path`` with its ``init_args``, as everywhere in the YAML files."""

Method = Callable[[nn.Module, Sequence[nn.Module]], DistillationModule]
_ALONE = "alone"


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

    ``num_classes``, ``in_channels``, ``input_shape``, ``optimizer`` and ``lr_scheduler`` need not be repeated: where a
    class takes one and its ``init_args`` are silent, the data's or the top level's is put in.

    Args:
        data: the data module, by ``class_path`` and ``init_args``.
        teachers: the teachers' network and number.
        student: the student's network.
        methods: by name, each a module with a student and teachers, by ``class_path`` and ``init_args``; ``teachers``
            beside them says how many of the teachers it gets (all, if left out). The student alone is always compared.
        epochs: length of every run.
        seeds: of the students' initial weights and of the order of their data.
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
    optimizer: Spec | None = None
    lr_scheduler: Spec | None = None
    output: str = "results/compare"
    accelerator: str = "auto"
    precision: str = "32"

    def as_plain(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain types."""
        plain = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if name != "output"}


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
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or name in (_ALONE, "ensemble") or name.startswith("teacher_"):
            raise InputError(f"methods: {name!r} cannot be a method's name: letters, digits and _.+-, not a row's own")
        unknown = spec.keys() - {"class_path", "init_args", "teachers"}
        if unknown:
            raise InputError(
                f"methods.{name}: unknown key {sorted(unknown)[0]!r}; known: class_path, init_args, teachers"
            )
        number = spec.get("teachers", config.teachers.number)
        if not isinstance(number, int) or not 1 <= number <= config.teachers.number:
            raise InputError(f"methods.{name}.teachers must be between 1 and {config.teachers.number}, got {number}")


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
        self._data = _parsed("data", LightningDataModule, config.data)
        self.sample = self.data(order_seed=0)
        for name in ("num_classes", "input_shape"):
            if not hasattr(self.sample, name):
                raise InputError(f"data: {type(self.sample).__name__} does not tell its {name}: give it that attribute")
        self.sample.prepare_data()
        for stage in ("fit", "test"):
            self.sample.setup(stage)
        shape = self.sample.input_shape
        known = {
            "num_classes": self.sample.num_classes,
            "in_channels": shape[0],
            "input_shape": list(shape),
            "optimizer": config.optimizer,
            "lr_scheduler": config.lr_scheduler,
        }
        self._teacher = _parsed("teachers.network", nn.Module, _filled(config.teachers.network, known))
        self._student = _parsed("student", nn.Module, _filled(config.student, known))
        supervised = {"class_path": "distill_lightning.SupervisedModule"}
        self._supervised = _parsed("optimizer", Callable[[nn.Module], SupervisedModule], _filled(supervised, known))
        self._methods = {
            name: _parsed(
                f"methods.{name}",
                Callable[[nn.Module, Sequence[nn.Module]], DistillationModule],
                _filled({key: value for key, value in spec.items() if key != "teachers"}, known),
            )
            for name, spec in config.methods.items()
        }
        self._try()

    @property
    def names(self) -> list[str]:
        """The students' rows, the student alone first."""
        return [_ALONE, *self.config.methods]

    def data(self, *, order_seed: int) -> InMemoryImageDataModule:
        """The data module, its training order drawn by ``order_seed``."""
        data: InMemoryImageDataModule = self._data()
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

    def supervised(self, network: nn.Module) -> SupervisedModule:
        """Plain training, of a teacher or of the student alone."""
        module: SupervisedModule = self._supervised()(network)
        return module

    def method(self, name: str, student: nn.Module, teachers: Sequence[nn.Module]) -> DistillationModule:
        """The module of a row of the table."""
        if name == _ALONE:
            return self.supervised(student)
        number = self.config.methods[name].get("teachers", self.config.teachers.number)
        module: DistillationModule = self._methods[name]()(student, list(teachers)[:number])
        return module

    def _try(self) -> None:
        """Build everything once, so that nothing is found wrong after hours of training."""
        with torch.random.fork_rng(devices=[]):
            teachers = [self.teacher() for _ in range(self.config.teachers.number)]
            shape = dry_forward(teachers[0], self.sample.input_shape).shape
            check_classes("teachers.network", teachers[0], shape, self.sample.num_classes)
            for name in self.names:
                check_optimizer(self.method(name, self.student(), teachers))


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
