"""What a comparison's YAML file says: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from distill_lightning.errors import InputError, refusing

# A bare dict: where its values may be of any type, jsonargparse makes objects of what has a class_path inside.
Spec = dict
"""A ``class_path`` with its ``init_args``, as everywhere in the YAML files."""

ALONE = "alone"
# A row has a folder of its name, which must not be hidden or stand elsewhere.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# What stands inside of a spec; jsonargparse sets the keys of a plain dict, but not those of a dict in it.
_INSIDE = re.compile(r"--(data|student|methods|supervised|backbones|optimizer|lr_scheduler)\.")
_METHOD_KEYS = ("class_path", "init_args", "teachers", "stages", "initial", "paraphrasers", "backbone")
_BACKBONE_KEYS = ("class_path", "init_args", "data", "epochs", "optimizer", "lr_scheduler")


@dataclass(frozen=True)
class TeachersConfig:
    """The teachers.

    Args:
        network: what each of them is, by ``class_path`` and ``init_args``; ``None``: there are none.
        number: how many, each from its own seed.
        epochs: how long each is trained; ``None``: as long as the students.
    """

    network: Spec | None = None
    number: int = 3
    epochs: int | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    ``num_classes`` or ``num_targets``, ``in_channels``, ``input_shape``, ``optimizer`` and ``lr_scheduler`` need not be
    repeated: where a class takes one and its ``init_args`` are silent, the data's or the top level's is put in.

    Args:
        data: the data module, by ``class_path`` and ``init_args``. One with an attribute ``task``, ``"translation"`` or
            ``"detection"``, is compared by what its modules log in a test; any other by its outputs.
        student: the student's network.
        methods: by name, each a module with a student and, if it takes any, teachers, by ``class_path`` and
            ``init_args``. ``teachers`` beside them says how many of the teachers it gets (all, if left out), or names
            an earlier row, whose student of the same seed is then its only teacher. ``stages: 3`` makes three such
            rows, ``<name>_1`` to ``<name>_3``: the first taught by the student alone, each other one by the one before
            it, as in sequential FEED. ``initial: <row>`` begins with the weights of an earlier row's student of the
            same seed, for methods that need a trained one, as MEAL V2 does. ``paraphrasers: {epochs: 5, init_args:
            {rate: 0.5}}`` trains a `ParaphraserModule` on the teachers first, for Factor Transfer. ``backbone: <name>``
            gives the student the weights of one of ``backbones``. The student alone is always compared.
        epochs: length of every run.
        seeds: of the students' initial weights and of the order of their data.
        teachers: the teachers' network and number; without, there are none, and no row but those taught by an earlier
            one has a class that takes teachers.
        supervised: what trains the teachers and the student alone, perhaps with a ``backbone``; without a
            ``class_path``, `SupervisedModule`, `RegressionModule` where the data have no classes, `TranslationModule`
            or `DetectionModule`.
        backbones: by name, each a training of the classifier that stands in the student's ``init_args.backbone``: a
            module's ``class_path`` and ``init_args``, ``data`` and ``epochs`` of its own, and perhaps ``optimizer``
            and ``lr_scheduler``. For each seed it is trained from that seed, the same initial weights under every name,
            and its weights without the head go to the student as ``backbone_weights``.
        optimizer: of every run but the backbones'.
        lr_scheduler: of every run but the backbones'.
        output: folder for everything that is written.
        accelerator: the Trainer's.
        precision: the Trainer's.
        gradient_clip_val: the Trainer's: the norm that the gradients of every run are cut down to; ``None``: none.
        anew: whether the runs that are in the folder are removed and made again.
    """

    data: Spec
    student: Spec
    methods: dict[str, Spec]
    epochs: int
    seeds: list[int]
    teachers: TeachersConfig = TeachersConfig()
    supervised: Spec | None = None
    backbones: dict[str, Spec] | None = None
    optimizer: Spec | None = None
    lr_scheduler: Spec | None = None
    output: str = "results/compare"
    accelerator: str = "auto"
    precision: str = "32"
    gradient_clip_val: float | None = None
    anew: bool = False

    def as_plain(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain types."""
        plain = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if name not in ("output", "anew")}

    @property
    def number_of_teachers(self) -> int:
        """How many there are."""
        return 0 if self.teachers.network is None else self.teachers.number


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: how it is called.
        method: the key in ``methods`` that describes it; ``None``: the student alone.
        teachers: how many of the teachers it gets, or the row whose student teaches it.
        stage: how many students taught one another before this one.
        initial: the row whose student's weights it begins with.
        backbone: the key in ``backbones`` of the weights that its student's backbone begins with.
    """

    name: str
    method: str | None = None
    teachers: int | str = 0
    stage: int = 0
    initial: str | None = None
    backbone: str | None = None


def rows_of(config: CompareConfig) -> list[Row]:
    """The students' rows, the student alone first.

    Raises:
        InputError: a row has a name that another has or that is reserved, or names as its teacher or its beginning one
            that does not come before it, or a backbone that is none.
    """
    backbones = config.backbones or {}
    reserved = (ALONE, "ensemble", *map(backbone_run, backbones))
    rows = {ALONE: Row(ALONE, backbone=(config.supervised or {}).get("backbone"))}
    for method, spec in config.methods.items():
        names = [f"{method}_{stage}" for stage in range(1, spec.get("stages", 0) + 1)] or [method]
        teachers = ALONE if "stages" in spec else spec.get("teachers", config.number_of_teachers)
        initial = spec.get("initial")
        for name in (method, *names):
            if not _NAME.fullmatch(name) or name in reserved or name.startswith("teacher_"):
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
            rows[name] = Row(name, method, teachers, stage, initial, spec.get("backbone"))
            teachers = name if "stages" in spec else teachers
    for row in rows.values():
        if row.backbone is not None and row.backbone not in backbones:
            where = "supervised" if row.method is None else f"methods.{row.method}"
            raise InputError(
                f"{where}.backbone: {row.backbone!r} is none of the backbones; these are: {', '.join(backbones) or '-'}"
            )
    return list(rows.values())


def backbone_run(name: str) -> str:
    """How the runs are called that train the backbone of a name."""
    return f"backbone_{name}"


def parse_config(arguments: Sequence[str]) -> CompareConfig:
    """Read ``CONFIG [--key value ...]``; a key on the command line, ``data.init_args.seed`` too, wins over the file.

    Raises:
        ArgumentError: the file is missing or no YAML, a key is unknown, a value has the wrong type.
        InputError: a number or a name that cannot be used.
    """
    parser = ArgumentParser(
        prog="distill-lightning compare",
        usage="distill-lightning compare CONFIG [--epochs N] [--seeds [0,1,2]] [--output FOLDER] [--anew] ...",
        description=(
            "Train the teachers, if any, then every method with every seed; write results.csv, results.md and figures. "
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
    given, changes = _changes(given)
    parsed = parser.parse_args(given)
    if not isinstance(parsed.teachers, Namespace):
        raise InputError(
            "teachers is a network and a number, for example {network: {class_path: SmallResNet}, number: 2}: compare "
            "trains them itself, all of one kind; for networks that are there, of unlike kinds, see fit and Pretrained"
        )
    options = vars(parser.instantiate(parsed))
    for path, value in changes:
        _change(options, path, value)
    config = CompareConfig(**{name: value for name, value in options.items() if name != "config"})
    _check(config)
    return config


def _changes(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """What is left of a command line without ``--data.init_args.key value`` and the like, and these."""
    left, changes, given = [], [], iter(arguments)
    for argument in given:
        if not _INSIDE.match(argument):
            left.append(argument)
            continue
        name, is_there, value = argument.partition("=")
        value = value if is_there else next(given, "--")
        if value.startswith("--"):
            raise InputError(f"{name} needs a value")
        with refusing(f"{name} is no YAML", yaml.YAMLError):
            changes.append((name.removeprefix("--"), yaml.safe_load(value)))
    return left, changes


def _change(options: dict[str, Any], path: str, value: Any) -> None:
    """Set a value inside of a spec, whose ``init_args`` need not be there."""
    *parts, last = path.split(".")
    place: Any = options
    for number, part in enumerate(parts):
        if part == "init_args" and isinstance(place, dict):
            place[part] = place.get(part) or {}
        if not isinstance(place, dict) or not isinstance(place.get(part), dict):
            raise InputError(f"--{path}: there is no {'.'.join(parts[: number + 1])} with keys of its own")
        place = place[part]
    place[last] = value


def _check(config: CompareConfig) -> None:
    for epochs in (config.epochs, config.teachers.epochs):
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs must be at least 1, got {epochs}")
    if config.teachers.number < 1:
        raise InputError(f"teachers.number must be at least 1, got {config.teachers.number}")
    if config.teachers.network is None and config.teachers != TeachersConfig():
        raise InputError("teachers.network is missing: give it by class_path and init_args, or no teachers at all")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must be different numbers, at least one, got {config.seeds}")
    if not all(0 <= seed < 2**32 for seed in config.seeds):
        raise InputError(f"seeds must lie between 0 and 2**32 - 1, got {config.seeds}")
    for name, spec in config.methods.items():
        _check_method(name, spec, config.number_of_teachers)
    for name, spec in (config.backbones or {}).items():
        _check_backbone(name, spec)
    rows_of(config)


def _check_method(name: str, spec: Spec, available: int) -> None:
    _check_keys(f"methods.{name}", spec, _METHOD_KEYS)
    if "stages" in spec and ("teachers" in spec or not is_count(spec["stages"])):
        raise InputError(f"methods.{name}.stages is a number, at least 1, and leaves no choice of teachers")
    if not isinstance(spec.get("initial", ""), str) or ("stages" in spec and "initial" in spec):
        raise InputError(f"methods.{name}.initial is an earlier row's name, and stages begin afresh")
    if "initial" in spec and "backbone" in spec:
        raise InputError(f"methods.{name}: initial and backbone both give weights to begin with: leave one out")
    teachers = spec.get("teachers", available)
    if not available and "teachers" in spec and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers is {teachers}, but the comparison has no teachers: give some at the top level, "
            "or an earlier row's name"
        )
    counted = is_count(teachers) and teachers <= available
    if available and not counted and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers must be between 1 and {available}, or an earlier row's name, got {teachers}"
        )


def _check_backbone(name: str, spec: Spec) -> None:
    _check_keys(f"backbones.{name}", spec, _BACKBONE_KEYS)
    if not _NAME.fullmatch(name):
        raise InputError(f"backbones: {name!r} cannot be a backbone's name: letters, digits and _.+-")
    if not isinstance(spec.get("data"), Mapping) or not is_count(spec.get("epochs")):
        raise InputError(f"backbones.{name}: expected data and epochs, at least 1, beside class_path and init_args")


def _check_keys(where: str, spec: Spec, known: Sequence[str]) -> None:
    unknown = spec.keys() - set(known)
    if unknown:
        raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(known)}")


def is_count(value: Any) -> bool:
    """Whether a value from the file is a number of things, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
