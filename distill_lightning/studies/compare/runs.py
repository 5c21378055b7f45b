"""The runs of a comparison: what each is, where its files are, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from distill_lightning.errors import refusing
from distill_lightning.studies.compare.rows import Row
from distill_lightning.studies.compare.trials import Options, told

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
        epochs: its length; 0 for a teacher that is given.
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
        in_search: whether it is part of a search: a trial, or one that a trial learns from. Such a run sees no test
            samples, and the table does not know it.
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
    options: Options = field(default=(), hash=False)
    chosen_from: tuple[Run, ...] = ()
    in_search: bool = False

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
    def is_given(self) -> bool:
        """Whether it makes nothing, and only evaluates a teacher that was trained before."""
        return self.is_teacher and self.epochs == 0

    @property
    def number(self) -> int:
        """The place of a teacher among those of its set, from 1."""
        return int(self.name.rpartition("_")[2])

    @property
    def is_student(self) -> bool:
        """Whether it is one of a row of the table."""
        return self.row is not None and not self.in_search

    @property
    def title(self) -> str:
        """For the progress bar."""
        which = [] if self.is_teacher or self.makes_store else [f"seed {self.seed}"]
        which += [f"set {self.teacher_set}"] if self.sets > 1 else []
        which += [f"search ({told(self.options)})" if self.options else "search"] if self.in_search else []
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
        failed: why it was stopped, if something else went wrong; it has none then, either.
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

    @property
    def without_scores(self) -> str:
        """Why it has no scores; empty: it has some."""
        return self.diverged or self.failed


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
