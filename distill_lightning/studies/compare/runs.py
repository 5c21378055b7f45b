"""The runs of a comparison: what each is, where its files are, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from distill_lightning.errors import refusing
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.rows import Row, backbone_run

# Teachers' seeds begin far from the students', so that no teacher shares its initial weights with a student.
TEACHER_SEED = 1000
# An odd number near the golden ratio of 2 ** 32: no stage meets its teacher's seed again.
_STAGE_STRIDE = 0x9E3779B1
# Another odd number far from its multiples: no two sets of teachers share a seed, and no two students of two sets.
_SET_STRIDE = 0x5851F42D


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        row: of the table; ``None``: a teacher, or a backbone.
        name: the row's, the teacher's or the backbone's.
        seed: which of the comparison's seeds it is of.
        initial_seed: of the initial weights.
        epochs: its length.
        folder: where its files are.
        teachers: the runs whose networks teach it.
        initial: the run whose student's weights it begins with.
        backbone: the run whose backbone's weights it begins with.
        makes_backbone: the key in ``backbones`` of the backbone that it makes; empty: it makes none.
        makes_store: whether it asks its teachers about every view and keeps what they say.
        store: the run that has kept what its teachers say; ``None``: they run beside it.
        teacher_set: which set of teachers it is of, from 1; its students have this number as well.
        sets: how many sets there are.
        options: values in place of those of the row's ``init_args`` and of the optimiser, by dotted path.
        chosen_from: the trials of a search that its options are chosen from.
    """

    row: Row | None
    name: str
    seed: int
    initial_seed: int
    epochs: int
    folder: Path
    teachers: tuple[Run, ...] = ()
    initial: Run | None = None
    backbone: Run | None = None
    makes_backbone: str = ""
    makes_store: bool = False
    store: Run | None = None
    teacher_set: int = 1
    sets: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    chosen_from: tuple[Run, ...] = ()

    @property
    def depends_on(self) -> tuple[Run, ...]:
        """The runs that must have ended before it begins."""
        others = (*self.teachers, self.initial, self.backbone, self.store, *self.chosen_from)
        return tuple(run for run in others if run is not None)

    @property
    def is_teacher(self) -> bool:
        """Whether it makes one of the teachers."""
        return self.row is None and not self.makes_backbone and not self.makes_store

    @property
    def is_student(self) -> bool:
        """Whether it is one of a row of the table."""
        return self.row is not None

    @property
    def title(self) -> str:
        """For the progress bar."""
        which = [] if self.is_teacher else [f"seed {self.seed}"]
        which += [f"set {self.teacher_set}"] if self.sets > 1 else []
        return ", ".join([self.name, *which])

    @property
    def order_seed(self) -> int:
        """Of the order of the data and of what is drawn in training.

        Students of the same seed under two sets of teachers have nothing in common: they count as two draws.
        """
        return seed_in_set(self.seed, self.teacher_set)

    @property
    def result_file(self) -> Path:
        """Written last: a run with this file is finished."""
        return self.folder / "result.json"

    @property
    def is_finished(self) -> bool:
        """Whether it has left its result."""
        return self.result_file.exists()

    @property
    def checkpoint(self) -> Path:
        """Of the last complete epoch, while the run is not finished."""
        return self.folder / "last.ckpt"

    @property
    def student_file(self) -> Path:
        """The trained network's weights after the last epoch."""
        return self.folder / "student.safetensors"

    @property
    def backbone_file(self) -> Path:
        """The weights of a backbone after the last epoch."""
        return self.folder / "backbone.safetensors"

    def result(self) -> RunResult:
        """What the finished run left.

        Raises:
            InputError: the file is damaged.
        """
        with refusing(f"{self.result_file} is damaged, remove it to make the run again", ValueError, TypeError):
            return RunResult(**json.loads(self.result_file.read_text()))

    def outputs(self) -> dict[str, Tensor]:
        """The outputs on the test samples, with the weights after the ``"last"`` and at the ``"selected"`` epoch.

        Despite the file's name, these are a regression's outputs as well.
        """
        return load_file(self.folder / "test_logits.safetensors")


@dataclass(frozen=True)
class RunResult:
    """What is kept of a finished run, besides its weights and, where these are measured, its outputs on test samples.

    Attributes:
        parameters: of its network.
        selected_epoch: whose validation was the best.
        history: what was logged of each epoch.
        made: when and with what.
        diverged: why the run was stopped, if its numbers were not finite; it has no weights and no outputs then.
        scores: what was logged of the test samples with the weights after the ``"last"`` and at the ``"selected"``
            epoch, where no outputs are kept.
        signatures: how scores were computed, by their names, where the module says so.
    """

    parameters: int
    selected_epoch: int
    history: list[dict[str, float]]
    made: str
    diverged: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


def seed_in_set(seed: int, teacher_set: int, *, stage: int = 0) -> int:
    """A seed under a set of teachers; in the first set it is the seed itself.

    Args:
        seed: as it was given.
        teacher_set: which set, from 1.
        stage: of a student that others of its kind have taught before; it must not begin with its teacher's weights.

    Returns:
        Between 0 and 2**32 - 1: PyTorch reads the lower 32 bits of a seed.
    """
    return (seed + (teacher_set - 1) * _SET_STRIDE + stage * _STAGE_STRIDE) % 2**32


def plan(experiment: Experiment, folder: Path) -> list[Run]:
    """All runs in the order they are made.

    Set by set of teachers: the teachers, then seed by seed the backbones and every row of the table, also those without
    a teacher, as the seeds are nested in the sets. The first set's runs are where those of a comparison with one set
    are, so that sets can be added.
    """
    sets = experiment.config.teachers.sets
    return [run for number in range(1, sets + 1) for run in _Set(experiment, folder, number).runs()]


class _Set:
    """The runs under one set of teachers."""

    def __init__(self, experiment: Experiment, folder: Path, number: int) -> None:
        self.experiment = experiment
        self.number = number
        self.folder = folder / "runs" if number == 1 else folder / "runs" / f"set_{number}"
        self.teachers = [self._teacher(count) for count in range(1, experiment.config.number_of_teachers + 1)]

    def runs(self) -> list[Run]:
        return self.teachers + [run for seed in self.experiment.config.seeds for run in self._of_seed(seed)]

    def _of_seed(self, seed: int) -> list[Run]:
        rows = self.experiment.rows
        backbones: dict[str | None, Run] = {
            key: self._backbone(key, seed) for key in self.experiment.backbones if key in [row.backbone for row in rows]
        }
        students: dict[str | None, Run] = {}
        for row in rows:
            own = [students[row.teachers]] if isinstance(row.teachers, str) else self.teachers[: row.teachers]
            students[row.name] = self._run(
                row.name,
                seed,
                self.folder / row.name / f"seed_{seed}",
                row=row,
                epochs=self.experiment.config.epochs,
                initial_seed=seed_in_set(seed, self.number, stage=row.stage),
                teachers=tuple(own),
                initial=students.get(row.initial),
                backbone=backbones.get(row.backbone),
            )
        return [*backbones.values(), *students.values()]

    def _teacher(self, count: int) -> Run:
        name, seed = f"teacher_{count}", TEACHER_SEED + count
        config = self.experiment.config
        return self._run(name, seed, self.folder / name, epochs=config.teachers.epochs or config.epochs)

    def _backbone(self, key: str, seed: int) -> Run:
        name = backbone_run(key)
        epochs = self.experiment.backbones[key].epochs
        return self._run(name, seed, self.folder / name / f"seed_{seed}", epochs=epochs, makes_backbone=key)

    def _run(self, name: str, seed: int, folder: Path, *, row: Row | None = None, epochs: int, **more: Any) -> Run:
        initial_seed = more.pop("initial_seed", seed_in_set(seed, self.number))
        of_set = {"teacher_set": self.number, "sets": self.experiment.config.teachers.sets}
        return Run(row, name, seed, initial_seed, epochs, folder, **of_set, **more)
