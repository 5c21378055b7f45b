"""What a comparison's YAML file says: read and checked without PyTorch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from distill_lightning.errors import InputError, refusing
from distill_lightning.studies.compare.checks import check, no_teachers
from distill_lightning.studies.compare.given import plain
from distill_lightning.studies.compare.rows import ALONE

# A bare dict: where its values may be of any type, jsonargparse makes objects of what has a class_path inside.
Spec = dict
"""A ``class_path`` with its ``init_args``, as everywhere in the YAML files."""

# How and where a table is made, what is shown of it: none of its numbers depend on that.
_HOW = ("output", "workers", "ray", "only", "only_seeds", "retry", "anew", "baseline", "confidence")
# What stands inside of a spec; jsonargparse sets the keys of a plain dict, but not those of a dict in it.
_INSIDE = re.compile(r"--(data|student|methods|supervised|backbones|optimizer|lr_scheduler|search)\.")


@dataclass(frozen=True)
class TeachersConfig:
    """The teachers.

    Args:
        network: what each of them is, by ``class_path`` and ``init_args``; ``None``: there are none.
        number: how many, each from its own seed.
        epochs: how long each is trained; ``None``: as long as the students.
        sets: how many times so many are trained, every time from other seeds, with students of their own under each.
        given: networks that are trained already, perhaps of unlike kinds, each by ``class_path`` and ``init_args``, in
            the place of ``network``: `Pretrained`, or whatever else loads its weights. In the YAML file a list of them
            stands in the place of all keys. None of them is trained again.
    """

    network: Spec | None = None
    number: int = 3
    epochs: int | None = None
    sets: int = 1
    given: list[Spec] | None = None


@dataclass(frozen=True)
class StoreConfig:
    """What the teachers say about the training views, kept for all rows and seeds.

    Args:
        views: how many views of a sample there are; ``None``: as many as there are epochs.
        logits: bytes that the outputs of a set of teachers may take, for example ``"1GB"``; beyond, the teachers run
            beside the students. What is kept stays in the output folder.
        features: bytes that a set's features may take.
    """

    views: int | None = None
    logits: str | int = "1GB"
    features: str | int = 0


@dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    ``num_classes`` or ``num_targets``, ``in_channels``, ``input_shape``, ``optimizer`` and ``lr_scheduler`` need not be
    repeated: where a class takes one and its ``init_args`` are silent, the data's or the top level's is put in.

    Args:
        data: any data module, by ``class_path`` and ``init_args``, whose batches are a `Batch`, tuples or dicts. What
            it does not tell by attributes may stand beside these: ``num_classes``, ``num_targets``, ``task``,
            ``input_shape``, ``class_names``. One with an attribute ``task``, ``"translation"`` or ``"detection"``, is
            compared by what its modules log in a test; any other by its outputs.
        student: the student's network.
        methods: by name, each a module by ``class_path`` and ``init_args``: one of this package, a subclass, or any
            LightningModule, whose first arguments are its networks, ``student`` (or ``model``, ``network``, ``net``)
            and, if it takes any, ``teachers`` or one ``teacher``; one without the former builds a network of its own.
            ``evaluate: <attribute>`` names the network that is evaluated; else that is the module's ``student`` or what
            its ``forward`` computes. ``teachers`` beside them says how many of the teachers it gets (all, if left out),
            or names an earlier row, whose student of the same seed is then its only teacher. ``stages: 3`` makes three
            such rows, ``<name>_1`` to ``<name>_3``: the first taught by the student alone, each other one by the one
            before it, as in sequential FEED. ``initial: <row>`` begins with the weights of an earlier row's student of
            the same seed, for methods that need a trained one, as MEAL V2 does. ``paraphrasers: {epochs: 5, init_args:
            {rate: 0.5}}`` trains a `ParaphraserModule` on the teachers first, for Factor Transfer. ``backbone: <name>``
            gives the student the weights of one of ``backbones``. The student alone is always compared.
        epochs: length of every run.
        seeds: of the students' initial weights and of the order of their data. On the command line, beside ``--only``:
            those of the file's that are made.
        teachers: the teachers' network and number, or a list of networks that are trained already; without, there are
            none, and no row but those taught by an earlier one has a class that takes teachers.
        supervised: what trains the teachers and the student alone, perhaps with a ``backbone``; without a
            ``class_path`` it is `SupervisedModule`, `RegressionModule` where the data have no classes,
            `TranslationModule` or `DetectionModule`.
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
        teachers_store: what of the teachers' answers is kept; ``None``: nothing, they run beside every student.
        search: by row, lists of values to try, by the name of an option in its ``init_args`` or a dotted path there
            (``distance.init_args.p``), in its ``paraphrasers``, or in the optimiser or the schedule that it has or that
            stand at the top: ``alone: {optimizer.init_args.lr: [0.1, 0.03]}``. The combination whose validation is best
            after the last epoch, as a mean over ``search_seeds``, under the first set of teachers, is the row's in the
            table. The teachers keep what they have.
        trials: how many combinations each of these rows tries, drawn from those that it has; ``None``: all, and all
            rows have as many.
        search_seeds: of the trials; none of ``seeds``. ``None``: one that is none of these.
        baseline: the row that the others' differences are taken from.
        confidence: whether the table has columns of how far confidences can be trusted, and there is a figure of it.
        threads_per_run: of PyTorch, in every run; ``None``: its default. Another number gives other last bits.
        workers: how many runs are made side by side on this machine.
        ray: address of a Ray cluster that makes the runs, ``host:port``, ``"auto"`` on one of its machines, or
            ``"local"`` for one that is started here. They share the folder in which the comparison is called, and
            ``output``. ``None``: this machine makes the runs.
        only: rows that are to be made, with what they depend on; ``None``: all of them. The report is written by the
            call after which no run is left.
        only_seeds: of these rows' runs that are made; ``None``: those of all seeds. On the command line it is
            ``--seeds`` beside ``--only``, where the file tells all seeds.
        retry: whether runs that have diverged or failed are made again.
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
    teachers_store: StoreConfig | None = StoreConfig()
    search: dict[str, Spec] | None = None
    trials: int | None = None
    search_seeds: list[int] | None = None
    baseline: str = ALONE
    confidence: bool = False
    threads_per_run: int | None = None
    workers: int = 1
    ray: str | None = None
    only: list[str] | None = None
    only_seeds: list[int] | None = None
    retry: bool = False
    anew: bool = False

    def __post_init__(self) -> None:
        """A list of networks stands for teachers that are given."""
        if isinstance(self.teachers, (list, tuple)):
            object.__setattr__(self, "teachers", TeachersConfig(given=list(self.teachers)))

    def as_plain(self) -> dict[str, Any]:
        """Everything that the results depend on, in plain types."""
        values = plain(self)
        if values["teachers"]["given"] is None:
            # So that folders that were written before there was this key belong to the same configuration.
            values["teachers"].pop("given")
        return {name: value for name, value in values.items() if name not in _HOW}

    @property
    def number_of_teachers(self) -> int:
        """How many there are, in each set."""
        if self.teachers.given is not None:
            return len(self.teachers.given)
        return 0 if self.teachers.network is None else self.teachers.number


def parse_config(arguments: Sequence[str]) -> CompareConfig:
    """Read ``CONFIG [--key value ...]``; a key on the command line, ``data.init_args.seed`` too, wins over the file.

    Raises:
        ArgumentError: the file is missing or no YAML, a key is unknown, a value has the wrong type.
        InputError: a number or a name that cannot be used.
    """
    parser = _parser()
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given[:1] = ["--config", given[0]]
    given, changes = _changes(_listed(given))
    parsed = parser.parse_args(given)
    only_seeds = None
    if parsed.only is not None and any(re.match("--seeds(=|$)", argument) for argument in given):
        # Before the file, which then has the last word.
        only_seeds, parsed = parsed.seeds, parser.parse_args(_seeds_first(given))
    return _config(parser, parsed, changes, only_seeds)


def config_of(keys: Mapping[str, Any], *, only_seeds: list[int] | None = None) -> CompareConfig:
    """The comparison that the keys of a YAML file describe.

    Args:
        keys: with a `Given` where a file would name a class or say a value, if there is something that none can.
        only_seeds: see `CompareConfig`.

    Raises:
        ArgumentError: a key is missing or unknown, or a value has the wrong type.
        InputError: a number or a name that cannot be used.
    """
    parser = _parser()
    if isinstance(keys.get("teachers"), str):
        # jsonargparse would look for a file of that name.
        raise no_teachers(keys["teachers"])
    return _config(parser, parser.parse_object(dict(keys)), [], only_seeds)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="distill-lightning compare",
        usage="distill-lightning compare CONFIG [--epochs N] [--seeds [0,1,2]] [--output FOLDER] [--anew] ...",
        description=(
            "Train the teachers, if any, then every method with every seed; write results.md, results.csv, "
            "report.json and figures, teachers.csv, paired.csv and search.csv where there is something to tell, and "
            "below runs what each run leaves; compare.yaml and data.json tell what the folder belongs to. "
            "Called again with the same configuration and data, it goes on where it stopped."
        ),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="The YAML file.")
    parser.add_class_arguments(CompareConfig, skip={"anew", "retry", "confidence", "only_seeds"})
    parser.add_argument("--confidence", action="store_true", help="Show how far confidences can be trusted, too.")
    parser.add_argument("--retry", action="store_true", help="Make runs again that have diverged or failed.")
    parser.add_argument("--anew", action="store_true", help="Remove the runs in the folder, and make them again.")
    return parser


def _config(
    parser: ArgumentParser, parsed: Namespace, changes: Sequence[tuple[str, Any]], only_seeds: list[int] | None
) -> CompareConfig:
    # What is not of its type is left as it is where a group of keys is expected.
    given_teachers = None if isinstance(parsed.teachers, Namespace) else parsed.pop("teachers")
    if not isinstance(given_teachers, (list, type(None))):
        raise no_teachers(given_teachers)
    options = vars(parser.instantiate(parsed))
    if given_teachers is not None:
        options["teachers"] = given_teachers
    for path, value in changes:
        _change(options, path, value)
    config = CompareConfig(
        **{name: value for name, value in options.items() if name != "config"}, only_seeds=only_seeds
    )
    check(config)
    return config


def _listed(arguments: Sequence[str]) -> list[str]:
    """A command line in which ``--only kd`` and ``--seeds 3`` are lists of one, as jobs of an array write them."""
    listed: list[str] = []
    for argument in arguments:
        name, is_there, value = argument.partition("=")
        if name in ("--only", "--seeds") and is_there:
            listed.append(f"{name}={_as_list(value)}")
        else:
            listed.append(_as_list(argument) if listed and listed[-1] in ("--only", "--seeds") else argument)
    return listed


def _as_list(value: str) -> str:
    return f"[{value}]" if re.fullmatch(r"[\w.+-]+", value) and value != "null" else value


def _seeds_first(arguments: Sequence[str]) -> list[str]:
    """A command line with ``--seeds`` at its beginning."""
    seeds: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--seeds":
            seeds += [argument, next(rest)]
        else:
            (seeds if argument.startswith("--seeds=") else others).append(argument)
    return [*seeds, *others]


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
