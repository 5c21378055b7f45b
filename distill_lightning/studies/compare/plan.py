"""Which runs a comparison consists of, and which of them wait for which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.rows import Row, backbone_run
from distill_lightning.studies.compare.runs import TEACHER_SEED, Run, seed_in_set
from distill_lightning.studies.compare.trials import search_seeds_of, trials_of


def plan(experiment: Experiment, folder: Path) -> list[Run]:
    """All runs in the order they are made.

    Set by set of teachers: the teachers, under the first of them the trials of searches, then seed by seed the
    backbones and every row of the table, also those without a teacher, as the seeds are nested in the sets. The first
    set's runs are where those of a comparison with one set are, so that sets can be added.
    """
    sets = [_Set(experiment, folder, number) for number in range(1, experiment.config.teachers.sets + 1)]
    search = _Search(sets[0])
    found: list[Run] = []
    for each in sets:
        found += [*each.teachers, *each.stores, *(search.runs if each is sets[0] else [])]
        found += [run for seed in experiment.config.seeds for run in each.of_seed(seed, search.trials)]
    return found


class _Set:
    """The runs under one set of teachers."""

    def __init__(self, experiment: Experiment, folder: Path, number: int) -> None:
        self.experiment = experiment
        self.number = number
        self.folder = folder / "runs" if number == 1 else folder / "runs" / f"set_{number}"
        self.teachers = [self._teacher(count) for count in range(1, experiment.config.number_of_teachers + 1)]
        self.stores = [self._store()] if experiment.storage.rows else []

    def of_seed(self, seed: int, trials: Mapping[str, tuple[Run, ...]]) -> list[Run]:
        rows = self.experiment.rows
        backbones = {
            key: self.backbone(key, seed, self.folder)
            for key in self.experiment.backbones
            if key in [row.backbone for row in rows]
        }
        students: dict[str, Run] = {}
        for row in rows:
            place, chosen_from = self.folder / row.name, trials.get(row.name, ())
            students[row.name] = self.student(row, seed, place, students, backbones, chosen_from=chosen_from)
        return [*backbones.values(), *students.values()]

    def student(
        self,
        row: Row,
        seed: int,
        folder: Path,
        students: Mapping[str, Run],
        backbones: Mapping[str, Run],
        **more: Any,
    ) -> Run:
        """A row's run of a seed, which learns from and begins with ``students`` and ``backbones`` of that seed."""
        own = [students[row.teachers]] if isinstance(row.teachers, str) else self.teachers[: row.teachers]
        return self._run(
            row.name,
            seed,
            folder / f"seed_{seed}",
            row=row,
            epochs=self.experiment.config.epochs,
            initial_seed=seed_in_set(seed, self.number, stage=row.stage),
            teachers=tuple(own),
            initial=None if row.initial is None else students[row.initial],
            backbone=None if row.backbone is None else backbones[row.backbone],
            store=self.stores[0] if row.name in self.experiment.storage.rows else None,
            **more,
        )

    def _store(self) -> Run:
        """What asks the teachers for all that is kept of them."""
        storage = self.experiment.storage
        own = tuple(self.teachers[: storage.teachers])
        place = self.folder / "store" / storage.name
        return self._run("store", 0, place, epochs=storage.kept_views, teachers=own, makes_store=True)

    def backbone(self, key: str, seed: int, folder: Path, **more: Any) -> Run:
        name = backbone_run(key)
        epochs = self.experiment.backbones[key].epochs
        return self._run(name, seed, folder / name / f"seed_{seed}", epochs=epochs, makes_backbone=key, **more)

    def _teacher(self, count: int) -> Run:
        name, seed = f"teacher_{count}", TEACHER_SEED + count
        config = self.experiment.config
        epochs = 0 if config.teachers.given is not None else config.teachers.epochs or config.epochs
        return self._run(name, seed, self.folder / name, epochs=epochs)

    def _run(self, name: str, seed: int, folder: Path, *, row: Row | None = None, epochs: int, **more: Any) -> Run:
        initial_seed = more.pop("initial_seed", seed_in_set(seed, self.number))
        of_set: dict[str, Any] = {"teacher_set": self.number, "sets": self.experiment.config.teachers.sets}
        return Run(row, name, seed, initial_seed, epochs, folder, **of_set, **more)


class _Search:
    """The trials of all rows that are searched, and what these learn from, on seeds that are none of the table's.

    Attributes:
        runs: all, in the order they are made.
        trials: by row.
    """

    def __init__(self, under: _Set) -> None:
        rows = under.experiment.rows
        self.under, self.folder = under, under.folder / "search"
        self.seeds = search_seeds_of(under.experiment.config)
        self.options = trials_of(under.experiment.config, rows)
        needed = _learned_from(rows, self.options)
        self.runs: list[Run] = []
        self.trials: dict[str, tuple[Run, ...]] = {}
        self._students: dict[int, dict[str, Run]] = {seed: {} for seed in self.seeds}
        self._backbones: dict[int, dict[str, Run]] = {seed: {} for seed in self.seeds}
        for row in rows:
            if row.name in needed or row.name in self.options:
                self._add_backbones(row)
            if row.name in self.options:
                self._add_trials(row)
            if row.name in needed:
                self._add_students(row)

    def _add_backbones(self, row: Row) -> None:
        for seed, known in self._backbones.items():
            if row.backbone is not None and row.backbone not in known:
                known[row.backbone] = self.under.backbone(row.backbone, seed, self.folder, in_search=True)
                self.runs.append(known[row.backbone])

    def _add_trials(self, row: Row) -> None:
        made = [
            self._student(row, seed, self.folder / row.name / f"trial_{number}", options=options)
            for number, options in enumerate(self.options[row.name], start=1)
            for seed in self.seeds
        ]
        self.trials[row.name] = tuple(made)
        self.runs += made

    def _add_students(self, row: Row) -> None:
        """Students with what was chosen for a row, for others to learn from."""
        for seed, known in self._students.items():
            trials = self.trials.get(row.name, ())
            known[row.name] = self._student(row, seed, self.folder / row.name, chosen_from=trials)
            self.runs.append(known[row.name])

    def _student(self, row: Row, seed: int, folder: Path, **more: Any) -> Run:
        return self.under.student(
            row, seed, folder, self._students[seed], self._backbones[seed], in_search=True, **more
        )


def _learned_from(rows: Sequence[Row], names: Iterable[str]) -> set[str]:
    """The rows whose students those of the given rows learn from or begin with, and theirs, and so on."""
    found, wanted = set(), set(names)
    for row in reversed(rows):
        if row.name in wanted:
            earlier = {name for name in (row.teachers, row.initial) if isinstance(name, str)}
            found |= earlier
            wanted |= earlier
    return found
