"""What of the teachers' answers a comparison keeps for all its rows and seeds, and which rows read it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from distill_lightning.arguments import takes
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError
from distill_lightning.layers import InputShape, dry_forward
from distill_lightning.modules import DistillationModule
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import Row
from distill_lightning.studies.compare.trials import trials_of
from distill_lightning.teachers.origin import own_hooks
from distill_lightning.teachers.shared import AskedForAll, Dtype, OutputsStore, ReadTeachers, Tapped, reason_to_ask

if TYPE_CHECKING:
    from distill_lightning.studies.compare.experiment import Experiment

_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2}
_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?B)?\s*", re.IGNORECASE)


class Reads(NamedTuple):
    """What a row reads.

    Attributes:
        teachers: how many of them, from the first.
        outputs: whether it reads their outputs.
        tapped: the features that it reads.
    """

    teachers: int
    outputs: bool
    tapped: tuple[Tapped, ...]


@dataclass(frozen=True)
class Storage:
    """What is kept, and who reads it.

    Attributes:
        samples: of the training.
        views: of each of them, in the students' runs; ``None``: a new one every epoch.
        kept_views: how many of these differ.
        outputs: the type in which the teachers' outputs are kept; ``None``: they are not.
        tapped: the features that are kept.
        features: the type in which these are.
        rows: what the rows read that do, by name.
        live: why teachers run beside the students of the other rows that have some, by name.
    """

    samples: int = 0
    views: int | None = None
    kept_views: int = 0
    outputs: Dtype | None = None
    tapped: tuple[Tapped, ...] = ()
    features: Dtype = "float32"
    rows: Mapping[str, Reads] = field(default_factory=dict)
    live: Mapping[str, str] = field(default_factory=dict)

    @property
    def teachers(self) -> int:
        """How many teachers are asked."""
        return max((reads.teachers for reads in self.rows.values()), default=0)

    @property
    def views_are_alike(self) -> bool:
        """Whether one view stands for all."""
        return self.views != self.kept_views

    @property
    def name(self) -> str:
        """Of its folder: what is kept otherwise lies in another one."""
        kept = (self.views, self.kept_views, self.teachers, self.outputs, self.tapped, self.features)
        return sha256(repr(kept).encode()).hexdigest()[:8]

    def number(self, data: ViewDataModule) -> None:
        """Give the data of a student's run as many views as are kept."""
        if self.rows:
            data.views = self.views

    def filled_by(self, path: Path, module: DistillationModule, networks: Sequence[nn.Module], shape: Any) -> None:
        """Have a module ask for all that is kept.

        Args:
            path: the store's folder.
            module: of a row that reads.
            networks: all teachers.
            shape: of a sample.
        """
        kept = list(networks[: self.teachers])
        store = OutputsStore(
            path,
            kept,
            outputs=self.outputs,
            tapped=self.tapped,
            features=self.features,
            views_are_alike=self.views_are_alike,
        )
        module.teachers = AskedForAll(store, shape)

    def read_by(self, path: Path, module: Any, row: str) -> None:
        """Have a module of a row read what is kept.

        Args:
            path: the store's folder.
            module: of the row, with networks.
            row: its name.
        """
        teachers, reads = module.teachers, self.rows[row]
        store = OutputsStore(
            path,
            # As one, so that a rule of its own stays.
            teachers.ensemble,
            outputs=self.outputs if reads.outputs else None,
            tapped=reads.tapped,
            features=self.features,
            views_are_alike=self.views_are_alike,
            fill="never",
        )
        module.teachers = ReadTeachers.of(teachers, store)


def bytes_of_size(key: str, size: str | int) -> int:
    """The number of bytes that ``"2GB"`` or a number means.

    Raises:
        InputError: it means none.

    Example:
        >>> from distill_lightning.studies.compare.storage import bytes_of_size
        >>> bytes_of_size("features", "1.5GB"), bytes_of_size("features", 0)
        (1500000000, 0)
    """
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise InputError(f"{key} must be a number of bytes, for example 500MB or 2GB, got {size!r}")
    units = {unit.lower(): factor for unit, factor in _UNITS.items()} | {"b": 1}
    return int(float(match[1]) * units[(match[2] or "").lower()])


def storage_of(experiment: Experiment) -> Storage:
    """What a comparison keeps: what its rows ask for, as far as it fits into the bytes that it may take."""
    config, sample = experiment.config, experiment.sample
    store = config.teachers_store
    # What is no size is refused where there is nothing to keep, too.
    limit = 0 if store is None else bytes_of_size("teachers_store.logits", store.logits)
    features_limit = 0 if store is None else bytes_of_size("teachers_store.features", store.features)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # What they warn of was said when everything was tried.
        warnings.simplefilter("ignore")
        modules = _modules(experiment)
        changing = _changing(experiment, modules)
    if not modules or store is None:
        return Storage(live=dict.fromkeys(modules, ""))
    reason = _no_store_of(sample) if isinstance(experiment.task, OutputsTask) else "the task has no outputs to keep"
    reasons = {name: reason or _reason(module) or changing.get(name, "") for name, module in modules.items()}
    students = {row.name: f"{row.teachers} teaches it" for row in experiment.rows if isinstance(row.teachers, str)}
    reading = {name: module for name, module in modules.items() if not reasons[name]}
    if not reading:
        return Storage(live=reasons | students)
    views = _views(experiment)
    data = sample.train_dataloader().dataset
    samples, kept_views = len(data), 1 if data.views_are_alike else views
    wanted = {name: _reads(module) for name, module in reading.items()}
    widest = max(reading.values(), key=lambda module: len(module.teachers))
    outputs = sum(dry_forward(network, sample.input_shape).shape.numel() for network in widest.teachers)
    dtype = _fitting(samples * kept_views * outputs, limit) if any(reads.outputs for reads in wanted.values()) else None
    tapped, features = _kept_features(reading, samples * kept_views, sample.input_shape, features_limit)
    for name, reads in wanted.items():
        if reads.outputs and dtype is None:
            size = size_in_words(samples * kept_views * outputs * _BYTES["float16"])
            reasons[name] = f"outputs of {size} are more than teachers_store.logits: {store.logits}"
        elif not set(reads.tapped) <= set(tapped):
            reasons[name] = f"features are more than teachers_store.features: {store.features}"
    rows = {name: reads for name, reads in wanted.items() if not reasons[name]}
    live = {name: reason for name, reason in reasons.items() if reason} | students
    tapped = tuple(tap for tap in tapped if any(tap in reads.tapped for reads in rows.values()))
    dtype = dtype if any(reads.outputs for reads in rows.values()) else None
    return Storage(samples, views, kept_views, dtype, tapped, features, rows, live) if rows else Storage(live=live)


def _modules(experiment: Experiment) -> dict[str, Any]:
    """A module of every row that the comparison's own teachers teach."""
    teachers = [experiment.teacher(number + 1) for number in range(experiment.config.number_of_teachers)]
    modules = {}
    for row in experiment.rows:
        if isinstance(row.teachers, int) and row.teachers and row.method is not None:
            module = _module(experiment, row, teachers[: row.teachers])
            if takes(type(module), "teachers") or takes(type(module), "teacher"):
                modules[row.name] = module
    return modules


def _module(experiment: Experiment, row: Row, teachers: Sequence[nn.Module]) -> Any:
    stage = experiment.paraphrasers(row, teachers)
    given = None if stage is None else list(stage.paraphrasers)
    return experiment.method(row, experiment.student(), teachers, given)


def _changing(experiment: Experiment, modules: Mapping[str, DistillationModule]) -> dict[str, str]:
    """Which rows cannot read the same with all options that they try."""
    trials, found = trials_of(experiment.config, experiment.rows), {}
    for row in experiment.rows:
        if row.name in modules and row.name in trials:
            known = modules[row.name]
            teachers = [experiment.teacher(number + 1) for number in range(int(row.teachers))]
            tried = [_module(experiment.with_options(row, options), row, teachers) for options in trials[row.name]]
            if any(_reason(module) or _reads(module) != _reads(known) for module in tried):
                found[row.name] = "its search changes what is asked"
    return found


def _reason(module: Any) -> str:
    """Why a row's teachers have to run beside it; empty: they need not."""
    if not isinstance(module, DistillationModule):
        return f"{type(module).__name__} asks them itself"
    return reason_to_ask(module) or _no_store_of(module)


def _no_store_of(who: Any) -> str:
    """Why nothing can be kept of what data, or a module, make; empty: something can."""
    hooks = own_hooks(who)
    if hooks:
        return f"{type(who).__name__} has a hook {hooks[0]}"
    if isinstance(who, DistillationModule):
        own = [name for name in ("prepared", "read_batch") if name in _overridden(type(who), DistillationModule)]
        return f"{type(who).__name__} has a {own[0]} of its own" if own else ""
    return "" if isinstance(who, ViewDataModule) else f"{type(who).__name__} does not number its views"


def _overridden(kind: type, base: type) -> set[str]:
    return {name for name, value in vars(base).items() if callable(value) and getattr(kind, name) is not value}


def _views(experiment: Experiment) -> int:
    """Of a training sample, in the students' runs.

    Raises:
        InputError: the data have another number than the store is to keep.
    """
    sample, config = experiment.sample, experiment.config
    given = None if config.teachers_store is None else config.teachers_store.views
    if None not in (given, sample.views) and given != sample.views:
        raise InputError(
            f"teachers_store.views is {given}, and the data have views={sample.views}: leave one of them out"
        )
    if given is not None and given % sample.views_per_load:
        raise InputError(
            f"teachers_store.views is {given}, which is not a multiple of views_per_load={sample.views_per_load}"
        )
    return int(sample.views or given or config.epochs * sample.views_per_load)


def _reads(module: DistillationModule) -> Reads:
    teachers = module.teachers
    tapped = tuple(Tapped(number, tap.layers[0], tap.channels) for number, tap in enumerate(teachers.taps))
    outputs = any(not question.needs_features for question in teachers.questions)
    return Reads(len(teachers), outputs, tapped)


def _kept_features(
    modules: Mapping[str, DistillationModule], rows: int, shape: InputShape, limit: int
) -> tuple[tuple[Tapped, ...], Dtype]:
    """The features that fit, those of earlier rows first, and their type."""
    kept: dict[Tapped, int] = {}
    for module in modules.values():
        wanted = dict(zip(_reads(module).tapped, module.teachers.taps, strict=True))
        more = {wish: tap.shapes(shape)[1][wish.layer].numel() for wish, tap in wanted.items() if wish not in kept}
        both = kept | more
        agree = len({(wish.teacher, wish.channels) for wish in both}) == len({wish.teacher for wish in both})
        if agree and _fitting(rows * sum(both.values()), limit) is not None:
            kept = both
    return tuple(kept), _fitting(rows * sum(kept.values()), limit) or "float16"


def _fitting(numbers: int, limit: int) -> Dtype | None:
    """The most exact type in which so many numbers take no more bytes; ``None``: there is none."""
    return next((dtype for dtype, size in _BYTES.items() if numbers * size <= limit), None)


def size_in_words(count: float) -> str:
    """A number of bytes, for a line of text."""
    unit = next(unit for unit, factor in reversed(_UNITS.items()) if count >= factor or factor == 1)
    return f"{count / _UNITS[unit]:.3g} {unit or 'bytes'}"
