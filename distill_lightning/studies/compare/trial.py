"""Whether every row can be trained on the data, tried before hours go into the first teacher."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill_lightning.errors import InputError, NonFiniteError, in_a_line, refused_at
from distill_lightning.modules import DistillationModule
from distill_lightning.studies.compare.experiment import Experiment, key_of
from distill_lightning.studies.compare.foreign_data import Prepared, first_batch
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import Row
from distill_lightning.studies.compare.runner import make_trainer
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.subject import Subject


def try_runs(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Make one training step of every row that has a run to make, and of a teacher, on a batch of the data.

    With new networks, which are thrown away; no random number is drawn that a run would draw. The data are those of
    ``experiment.sample``, which are not set up again, so that this takes seconds a row. Where a table has outputs, a
    module of somebody else validates a batch, too, and the network that is evaluated of it is run on one.

    Args:
        experiment: the comparison.
        runs: that are to be made.

    Raises:
        InputError: a row cannot be trained; the message begins with its key.
    """
    rows = {run.row.name: run.row for run in runs if run.row is not None}
    with _nothing_drawn(), _without_warnings():
        number = experiment.config.number_of_teachers
        teachers = [experiment.teacher(place + 1) for place in range(number)] if rows else []
        if any(run.is_teacher and not run.is_given for run in runs):
            network = experiment.teacher()
            _try(experiment, experiment.subject(None, experiment.supervised(network), network), None)
        subjects = {}
        for row in rows.values():
            own = [experiment.student()] if isinstance(row.teachers, str) else teachers[: row.teachers]
            subjects[row.name] = _subject(experiment, row, own)
            _try(experiment, subjects[row.name], row)
        _check_succession(experiment, rows.values(), subjects)


def _subject(experiment: Experiment, row: Row, teachers: Sequence[nn.Module]) -> Subject:
    paraphrasers = experiment.paraphrasers(row, teachers)
    given = None if paraphrasers is None else list(paraphrasers.paraphrasers)
    student = experiment.student()
    return experiment.subject(row, experiment.method(row, student, teachers, given), student)


def _try(experiment: Experiment, subject: Subject, row: Row | None) -> None:
    key, module = key_of(row), subject.module
    has_outputs = isinstance(experiment.task, OutputsTask)
    trainer = make_trainer(
        experiment.config,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1 if has_outputs and not subject.is_own else 0,
        enable_checkpointing=False,
    )
    with refused_at(key), _refusing_foreign(key, module):
        try:
            trainer.fit(module, datamodule=Prepared(experiment.sample))
        except NonFiniteError:
            # A row of the table will say so, with its seed and epoch.
            return
        if has_outputs and not subject.is_own:
            subject.check(key, experiment.sample, first_batch(experiment.sample))


def _check_succession(experiment: Experiment, rows: Iterable[Row], subjects: Mapping[str, Subject]) -> None:
    """See whether the networks that other rows learn from, or begin with, are such as the student."""
    expected = {name: value.shape for name, value in experiment.student().state_dict().items()}
    for row in rows:
        for part, name in (("teachers", row.teachers), ("initial", row.initial)):
            taken = subjects.get(name) if isinstance(name, str) else None
            kept = None if taken is None or taken.is_own else taken.kept
            if kept is not None and {key: value.shape for key, value in kept.state_dict().items()} != expected:
                raise InputError(
                    f"{key_of(row)}.{part}: the network of {name} ({type(kept).__name__}) is not such as the student, "
                    "so that no other row can take it: name another row"
                )


@contextmanager
def _refusing_foreign(key: str, module: Any) -> Iterator[None]:
    """Turn what a module of somebody else raises into a line that says where; what one of ours raises is a bug."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(module, DistillationModule) and type(module).__module__.startswith("distill_lightning."):
            raise
        home = _file_of(module)
        place = next((frame for frame in reversed(frames) if frame.filename == home), frames[-1])
        reason = in_a_line(error)
        raise InputError(
            f"{key}: {type(module).__name__} fails in its first step ({Path(place.filename).name}, line "
            f"{place.lineno}): {type(error).__name__}: {reason}"
        ) from error


def _file_of(module: Any) -> str:
    return str(getattr(__import__(type(module).__module__, fromlist=["_"]), "__file__", ""))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The runs will say again what there is to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Go on afterwards as if no random number had been drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
