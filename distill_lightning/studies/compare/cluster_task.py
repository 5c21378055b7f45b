"""What a worker of a Ray cluster does with a run."""

from __future__ import annotations

import os
import socket
import time
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_lightning.errors import InputError, disk_line, in_a_line, is_of_the_disk
from distill_lightning.libraries import package
from distill_lightning.studies.compare.attempt import attempt
from distill_lightning.studies.compare.claims import AT_WORK
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runner import make_trainer
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.workers import quiet_experiment
from distill_lightning.studies.data import OtherDataError, Splits, differences_of

# A file of another machine may be shown late.
_LATE = 60.0
_PAUSE = 0.2

# A worker makes one run after the other.
_experiments: dict[str, Experiment] = {}


@dataclass(frozen=True)
class Parcel:
    """What a worker builds a comparison's objects from.

    Attributes:
        config: the comparison.
        place: the folder in which it was called.
        threads: of PyTorch, in every run.
        splits: fingerprints of its data.
        backbones: those of its backbones' data, by name.
    """

    config: CompareConfig
    place: Path
    threads: int
    splits: Splits
    backbones: Mapping[str, Splits]


@dataclass(frozen=True)
class Answer:
    """What became of a run.

    Attributes:
        host: the worker's machine.
        elsewhere: who else is making it; empty: it has left its result.
        is_early: whether it was not its turn yet: somebody else is making one that it depends on.
        refused: what no further run can do anything about.
    """

    host: str = ""
    elsewhere: str = ""
    is_early: bool = False
    refused: InputError | None = None


def make_there(parcels: Sequence[Any], token: str, run: Run, news: Any, *others: Answer) -> Answer:
    """Make a run.

    Args:
        parcels: Ray's reference to the `Parcel`.
        token: of the comparison: its objects are built once in a worker.
        run: which.
        news: the actor of the queue that is told of each epoch.
        others: what became of those that it depends on, as far as they were not made when it was submitted.
    """
    host = socket.gethostname()
    if any(other.elsewhere or other.is_early for other in others):
        return Answer(host, is_early=True)

    def tell(epoch: int) -> None:
        # Nobody waits for it to arrive.
        news.put_nowait.remote((str(run.folder), epoch))

    try:
        experiment = _experiment(parcels, token)
        for other in run.depends_on:
            _check_shared(other.result_file)
        return Answer(host, elsewhere=attempt(experiment, run, tell))
    except InputError as error:
        return Answer(host, refused=error)
    except ArgumentError as error:
        return Answer(host, refused=InputError(f"ray: on {host}: {in_a_line(error)}"))
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        return Answer(host, refused=InputError(f"ray: on {host}: {disk_line(error)}"))
    except SystemExit:
        # Lightning's, once it has seen the interrupt by which Ray cancels a task; the worker is to live on.
        raise KeyboardInterrupt from None


def _experiment(parcels: Sequence[Any], token: str) -> Experiment:
    """The comparison's objects in this process.

    Raises:
        InputError: this machine sees other folders or other data than the one that has called the comparison.
    """
    if token in _experiments:
        return _experiments[token]
    parcel: Parcel = package("ray", extra="ray").get(parcels[0])
    if not parcel.place.is_dir():
        raise InputError(
            f"ray: {socket.gethostname()} has no folder {parcel.place}: call compare in a folder that all machines of "
            "the cluster share under the same path"
        )
    # Paths in the configuration begin there.
    os.chdir(parcel.place)
    torch.set_num_threads(parcel.threads)
    _check_shared(Path(parcel.config.output) / AT_WORK)
    experiment = quiet_experiment(parcel.config)
    _check_same("data", parcel.splits, experiment.splits)
    for name, splits in parcel.backbones.items():
        _check_same(f"data of backbone {name}", splits, experiment.backbones[name].splits)
    make_trainer(parcel.config)
    _experiments.clear()
    _experiments[token] = experiment
    return experiment


def _check_shared(file: Path) -> None:
    if not appears(file):
        raise InputError(
            f"ray: {socket.gethostname()} does not see {file.absolute()}: give a folder with --output that all "
            "machines of the cluster share under the same path"
        )


def _check_same(name: str, known: Splits, present: Splits) -> None:
    found = differences_of(known, present)
    if found:
        raise OtherDataError(
            f"ray: {name}: {socket.gethostname()} reads others than the machine that has called compare "
            f"({'; '.join(found)}): give all the same files"
        )


def appears(file: Path) -> bool:
    """Whether a file that another machine has written is seen here, perhaps after a while."""
    until = time.monotonic() + _LATE
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE)
    return True
