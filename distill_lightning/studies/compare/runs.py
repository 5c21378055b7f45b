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


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        row: of the table; ``None``: a teacher, or a backbone.
        name: the row's, the teacher's or the backbone's.
        seed: of the order of the data.
        initial_seed: of the initial weights.
        epochs: its length.
        folder: where its files are.
        teachers: the runs whose networks teach it.
        initial: the run whose student's weights it begins with.
        backbone: the run whose backbone's weights it begins with.
        makes_backbone: the key in ``backbones`` of the backbone that it makes; empty: it makes none.
        makes_store: whether it asks its teachers about every view and keeps what they say.
        store: the run that has kept what its teachers say; ``None``: they run beside it.
        teacher_set: which set of teachers it is of.
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
        return self.name if self.is_teacher else f"{self.name}, seed {self.seed}"

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
        failed: why it was stopped, if something else went wrong; it has none then, either.
        shared: whether other runs were made on the machine in any of its epochs, so that its seconds say less.
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
    failed: str = ""
    shared: bool = False

    @property
    def without_scores(self) -> str:
        """Why it has no scores; empty: it has some."""
        return self.diverged or self.failed


def plan(experiment: Experiment, folder: Path) -> list[Run]:
    """All runs in the order they are made: the teachers, then seed by seed the backbones and every row of the table."""
    config = experiment.config
    epochs = config.teachers.epochs or config.epochs
    teachers = []
    for number in range(1, config.number_of_teachers + 1):
        name, seed = f"teacher_{number}", TEACHER_SEED + number
        teachers.append(Run(None, name, seed, seed, epochs, folder / "runs" / name))
    runs = list(teachers)
    for seed in config.seeds:
        backbones: dict[str | None, Run] = {
            key: _backbone(key, seed, backbone.epochs, folder)
            for key, backbone in experiment.backbones.items()
            if key in [row.backbone for row in experiment.rows]
        }
        students: dict[str | None, Run] = {}
        for row in experiment.rows:
            own = [students[row.teachers]] if isinstance(row.teachers, str) else teachers[: row.teachers]
            # A student that is taught by one of its kind must not begin with its teacher's initial weights.
            # PyTorch reads the lower 32 bits of a seed.
            initial_seed = (seed + row.stage * _STAGE_STRIDE) % 2**32
            students[row.name] = Run(
                row,
                row.name,
                seed,
                initial_seed,
                config.epochs,
                _place(folder, row.name, seed),
                tuple(own),
                initial=students.get(row.initial),
                backbone=backbones.get(row.backbone),
            )
        runs += [*backbones.values(), *students.values()]
    return runs


def _backbone(key: str, seed: int, epochs: int, folder: Path) -> Run:
    name = backbone_run(key)
    return Run(None, name, seed, seed, epochs, _place(folder, name, seed), makes_backbone=key)


def _place(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / name / f"seed_{seed}"
