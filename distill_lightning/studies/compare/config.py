"""What a comparison's YAML file says: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from distill_lightning.errors import InputError

# A bare dict: where its values may be of any type, jsonargparse makes objects of what has a class_path inside.
Spec = dict
"""A ``class_path`` with its ``init_args``, as everywhere in the YAML files."""

ALONE = "alone"
# A row has a folder of its name, which must not be hidden or stand elsewhere.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
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
        anew: whether the runs that are in the folder are removed and made again.
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
    anew: bool = False

    def as_plain(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain types."""
        plain = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if name not in ("output", "anew")}


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
        InputError: a row has a name that another has or that is reserved, or names as its teacher or its beginning one
            that does not come before it.
    """
    rows = {ALONE: Row(ALONE)}
    for method, spec in config.methods.items():
        names = [f"{method}_{stage}" for stage in range(1, spec.get("stages", 0) + 1)] or [method]
        teachers = ALONE if "stages" in spec else spec.get("teachers", config.teachers.number)
        initial = spec.get("initial")
        for name in (method, *names):
            if not _NAME.fullmatch(name) or name in (ALONE, "ensemble") or name.startswith("teacher_"):
                raise InputError(
                    f"methods: {name!r} cannot be a method's name: letters, digits and _.+-, not a row's own"
                )
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
        usage="distill-lightning compare CONFIG [--epochs N] [--seeds [0,1,2]] [--output FOLDER] [--anew] ...",
        description=(
            "Train the teachers, then every method with every seed; write results.csv, results.md and figures. "
            "Called again with the same configuration and data, it goes on where it stopped."
        ),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="The YAML file.")
    parser.add_class_arguments(CompareConfig, skip={"anew"})
    parser.add_argument("--anew", action="store_true", help="Remove the runs in the folder, and make them again.")
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given[:1] = ["--config", given[0]]
    try:
        parsed = parser.parse_args(given)
    except ArgumentError as error:
        if "arguments are required: teachers.network" not in str(error):
            raise
        raise InputError(
            "teachers is a network and a number, for example {network: {class_path: SmallResNet}, number: 2}: compare "
            "trains them itself, all of one kind; for networks that are there, of unlike kinds, see fit and Pretrained"
        ) from error
    options = vars(parser.instantiate(parsed))
    config = CompareConfig(**{name: value for name, value in options.items() if name != "config"})
    _check(config)
    return config


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
    unknown = spec.keys() - set(_METHOD_KEYS)
    if unknown:
        raise InputError(f"methods.{name}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(_METHOD_KEYS)}")
    if "stages" in spec and ("teachers" in spec or not is_count(spec["stages"])):
        raise InputError(f"methods.{name}.stages is a number, at least 1, and leaves no choice of teachers")
    if not isinstance(spec.get("initial", ""), str) or ("stages" in spec and "initial" in spec):
        raise InputError(f"methods.{name}.initial is an earlier row's name, and stages begin afresh")
    teachers = spec.get("teachers", available)
    counted = is_count(teachers) and teachers <= available
    if not counted and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers must be between 1 and {available}, or an earlier row's name, got {teachers}"
        )


def is_count(value: Any) -> bool:
    """Whether a value from the file is a number of things, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
