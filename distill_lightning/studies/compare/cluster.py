"""The runs of a comparison as tasks of a Ray cluster, each begun when those that it learns from have ended."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from distill_lightning.errors import InputError, refusing
from distill_lightning.libraries import package
from distill_lightning.studies.compare.cluster_task import Answer, Parcel, appears, make_there
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.pool import Finished, OnEpochOf
from distill_lightning.studies.compare.runs import Run

LOCAL = "local"
_ON_GPU = ("auto", "gpu", "cuda")
_SECONDS = 1.0
_GRACE = 10.0
_PATIENCE = 5.0
# Little goes through Ray: what the runs leave is in the folder.
_STARTED = {"include_dashboard": False, "object_store_memory": 100 * 2**20}


class RayPool:
    """Hands all runs to a Ray cluster at once, as tasks with futures of the runs that they depend on.

    Each has as many CPUs as it has threads, and a GPU where the cluster has any. The machines share the folder in which
    `compare` is called, under the same path, with the output in it or beside it: a run whose worker is lost is begun
    again on another one, from its last checkpoint there. Workers find modules where this process does.

    A program that has called ``ray.init`` itself uses its cluster, and keeps it.

    Args:
        experiment: the comparison.
        address: of the cluster, ``host:port``; ``"auto"``: the one that this machine is part of; ``"local"``: one is
            started here, and ended by `close`.
        say: is given a line of what there is to wait for before the first run begins; ``None``: nobody is told.

    Raises:
        InputError: Ray is not installed, or nothing answers at the address.
    """

    # Ray keeps those that there is no room for, and a cluster that grows on demand sees what is to be done.
    capacity = sys.maxsize
    waits_for_others = True

    def __init__(self, experiment: Experiment, address: str, say: Callable[[str], None] | None = None) -> None:
        self._ray = package("ray", extra="ray")
        self._say = say or (lambda _: None)
        self.experiment, self.address = experiment, address
        self._threads = experiment.config.threads_per_run or torch.get_num_threads()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _check_address(address)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[Any, Run] = {}
        self._held: list[Run] = []
        self._news: Any = None

    def submit(self, run: Run) -> None:
        """Hand it to the cluster, with the futures of what is not made yet of the runs that it depends on."""
        if self._news is None:
            self._connect()
        self._runs[str(run.folder)] = run
        at_work = {other.folder: task for task, other in self._tasks.items()}
        others = [at_work[other.folder] for other in run.depends_on if other.folder in at_work]
        make = self._ray.remote(make_there).options(name=run.title, **self._options)
        task = make.remote(self._parcel, self._token, run, self._news.actor, *others)
        self._tasks[task] = run

    def wait(self, on_epoch: OnEpochOf) -> Iterable[Finished]:
        """Wait until a run has ended, or a second."""
        self._submit_held()
        if not self._tasks:
            time.sleep(_SECONDS)
            return []
        ended, _ = self._ray.wait(list(self._tasks), timeout=_SECONDS)
        for folder, epoch in self._news.get_nowait_batch(self._news.qsize()):
            on_epoch(self._runs[folder], epoch)
        return [finished for task in ended if (finished := self._ended(task)) is not None]

    def close(self) -> None:
        """Interrupt the runs, so that they leave their claims, and end the cluster if it was started here."""
        if self._news is not None:
            self._cancel()
        if self._is_ours and self._ray.is_initialized():
            self._ray.shutdown()

    def _cancel(self) -> None:
        begun = [task for task, run in self._tasks.items() if all(other.is_finished for other in run.depends_on)]
        # Those that wait for others first: they are not to begin.
        for task in reversed(self._tasks):
            self._ray.cancel(task)
        left = self._ray.wait(begun, num_returns=len(begun), timeout=_GRACE)[1] if begun else []
        for task in left:
            self._ray.cancel(task, force=True)
        self._news.shutdown(force=True)
        self._tasks, self._held, self._news = {}, [], None

    def _connect(self) -> None:
        ray, config = self._ray, self.experiment.config
        if self._is_ours:
            self._say("ray: starting Ray" if self.address == LOCAL else f"ray: connecting to {self.address}")
            started = _STARTED if self.address == LOCAL else {}
            # A cluster that is started here tells nobody of it.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with refusing(f"ray: {self.address}", ConnectionError, RuntimeError, ValueError):
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **started)
        needs = needs_of_a_run(config.accelerator, self._threads, ray.nodes())
        # Who tries a run again, and how often, is the schedule's business.
        self._options = {"max_retries": 0, "runtime_env": _environment(self._threads), **needs}
        backbones = {name: backbone.splits for name, backbone in self.experiment.backbones.items()}
        parcel = Parcel(config, Path.cwd(), self._threads, self.experiment.splits, backbones)
        with refusing(
            "ray: what was given in Python cannot be sent to the workers, give a class or a function of a module",
            pickle.PicklingError, AttributeError, TypeError,
        ):  # fmt: skip
            # In a list: Ray would unpack it anew for every run.
            self._parcel = [ray.put(parcel)]
        self._token = uuid4().hex
        queue = package("ray.util.queue", extra="ray").Queue
        self._news = queue(actor_options={"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1})
        self._say("ray: waiting for a worker, which has the first run begin")

    def _submit_held(self) -> None:
        """Submit those again whose turn had not come, once what they depend on is made or at work."""
        for run in list(self._held):
            at_work = [other.folder for other in self._tasks.values()]
            if all(other.is_finished or other.folder in at_work for other in run.depends_on):
                self._held.remove(run)
                self.submit(run)

    def _ended(self, task: Any) -> Finished | None:
        """What became of a run; ``None``: it is held back, as one that it depends on was lost or is not made yet."""
        errors = self._ray.exceptions
        run = self._tasks.pop(task)
        try:
            answer: Answer = self._ray.get(task)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, errors.RayError):
                raise
            # That of a task whose future it was given.
            answer = Answer(is_early=True)
        except errors.OutOfMemoryError:
            return Finished(run, error="its worker was ended by Ray, because memory ran out")
        except errors.RayError:
            return Finished(run, error="its worker was lost")
        if answer.refused is not None:
            raise answer.refused
        if answer.is_early:
            self._held.append(run)
            return None
        if not answer.elsewhere and not appears(run.result_file):
            raise InputError(
                f"ray: {answer.host} has finished {run.title}, and {run.result_file} is not there: give a folder with "
                "--output that all machines of the cluster share under the same path"
            )
        return Finished(run, elsewhere=answer.elsewhere)


def needs_of_a_run(accelerator: str, threads: int, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What Ray is to reserve for a run.

    Args:
        accelerator: the Trainer's.
        threads: of the run.
        nodes: what ``ray.nodes()`` tells of the cluster's machines.

    Raises:
        InputError: no machine has so much, and the runs would wait for ever.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    needs = {"CPU": threads, "GPU": int(accelerator in _ON_GPU and any(has.get("GPU", 0) >= 1 for has in there))}
    if not any(all(has.get(kind, 0) >= count for kind, count in needs.items()) for has in there):
        largest = max((int(has.get("CPU", 0)) for has in there), default=0)
        raise InputError(
            f"ray: a run has {threads} threads{' and a GPU' if needs['GPU'] else ''}, and no machine of the cluster "
            f"that much, at most {largest} CPUs: give a smaller number with --threads_per_run"
        )
    return {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}


def _check_address(address: str) -> None:
    """Refuse an address at which nothing answers: Ray itself would try for minutes."""
    if address in (LOCAL, "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise InputError(f"ray must be local, auto or the address of a cluster, host:port, got {address!r}")
    with refusing(f"ray: nothing answers at {address}", OSError, OverflowError):
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _environment(threads: int) -> dict[str, Any]:
    """Of the workers: the folders in which this process finds modules that are not installed, and the threads."""
    installed = (sys.prefix, sys.base_prefix)
    folders = [str(Path(folder).absolute()) for folder in sys.path]
    own = [folder for folder in folders if not Path(folder).is_relative_to(installed[0])]
    own = [folder for folder in own if not Path(folder).is_relative_to(installed[1])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": str(threads)}}
