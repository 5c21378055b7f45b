"""Processes of this machine that make runs side by side."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch

from distill_lightning.errors import InputError, disk_line, is_of_the_disk, refusing
from distill_lightning.studies.compare.attempt import attempt, clean_up
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.pool import Finished, OnEpochOf
from distill_lightning.studies.compare.runs import Run

_SECONDS = 1.0
# Nothing of what a process has done so far, its threads and its GPU, goes over to another.
_START_METHOD: Literal["spawn", "fork"] = "spawn"
_LOGGERS = ("pytorch_lightning", "lightning_fabric")


class Processes:
    """Makes runs in processes of its own, which are started as they are needed.

    Each computes with the same number of threads, of which the last bits of all numbers depend, and not on how many
    processes there are. Where there are GPUs, each has one for itself as long as there are enough.

    Args:
        config: the comparison.
        count: of the processes.
        threads: of PyTorch, in each.

    Raises:
        InputError: the comparison has objects that cannot be sent to another process.
    """

    waits_for_others = False

    def __init__(self, config: CompareConfig, count: int, threads: int) -> None:
        with refusing(
            "workers: what was given in Python cannot be sent to another process, give a class or a function of a "
            "module, or workers=1",
            pickle.PicklingError, AttributeError, TypeError,
        ):  # fmt: skip
            pickle.dumps(config)
        self.capacity = count
        self._config, self._threads = config, threads
        self._places: list[_Worker | None] = [None] * count

    def submit(self, run: Run) -> None:
        """Hand the run to a process that has none."""
        number, worker = next(
            (number, worker) for number, worker in enumerate(self._places) if worker is None or worker.run is None
        )
        if worker is None:
            worker = self._places[number] = _started(self._config, self._threads, _device_of(number))
        worker.run = run
        # What it dies of is told by wait.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(run)

    def wait(self, on_epoch: OnEpochOf) -> Iterable[Finished]:
        """Wait until a run has ended, or a second."""
        workers = {worker.connection: worker for worker in self._places if worker is not None}
        finished = []
        for connection in wait(list(workers), _SECONDS):
            worker = workers[connection]  # type: ignore[index]  # they are those that it was given
            while worker.connection.poll():
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    finished += self._bury(worker)
                    break
                if kind == "ready":
                    worker.is_ready = True
                elif kind == "refused":
                    raise InputError(content)
                elif worker.run is not None and kind == "epoch":
                    on_epoch(worker.run, content)
                elif worker.run is not None:
                    finished.append(Finished(worker.run, elsewhere=content))
                    worker.run = None
        return finished

    def close(self) -> None:
        """Kill the processes; what they had begun goes on from its last epoch another time."""
        workers = [worker for worker in self._places if worker is not None]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()
            if worker.run is not None and not worker.run.is_finished:
                clean_up(worker.run)
        self._places = [None] * self.capacity

    def _bury(self, worker: _Worker) -> list[Finished]:
        """Let a dead process's place be taken by another; its run, if it had one."""
        worker.process.join()
        status = worker.process.exitcode or 0
        self._places[self._places.index(worker)] = None
        worker.connection.close()
        if not worker.is_ready and status >= 0:
            raise InputError(
                f"workers: a process could not be started (status {status}, what it has said stands above): in a "
                "script, compare must be called below if __name__ == '__main__':, or with workers=1"
            )
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        return [] if worker.run is None else [Finished(worker.run, error=f"its process {how}")]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    run: Run | None = None
    is_ready: bool = False


@dataclass(frozen=True)
class Quiet:
    """What a process leaves unsaid, for those that it starts.

    Attributes:
        filters: of warnings.
        levels: of Lightning's loggers.
    """

    filters: list[Any]
    levels: dict[str, int]

    @classmethod
    def here(cls) -> Quiet:
        """As quiet as this process."""
        return cls(list(warnings.filters), {name: logging.getLogger(name).getEffectiveLevel() for name in _LOGGERS})

    def keep(self) -> None:
        """Be as quiet."""
        warnings.filters[:] = self.filters  # type: ignore[index]  # a list, in spite of its type
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)


def quiet_experiment(config: CompareConfig) -> Experiment:
    """The comparison's objects in another process than the first, which has said all that is to be said of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Experiment(config)


def _started(config: CompareConfig, threads: int, device: str | None) -> _Worker:
    context: Any = multiprocessing.get_context(_START_METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(config, threads, device, Quiet.here(), theirs), name="compare worker", daemon=False
    )
    with _interrupts_blocked():
        process.start()
    # Now its end of the pipe is open there alone, and shows its death.
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: who has started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(config: CompareConfig, threads: int, device: str | None, quiet: Quiet, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    quiet.keep()
    torch.set_num_threads(threads)
    try:
        experiment = quiet_experiment(config)
        # The hundreds of thousands of objects of the imports stay; to look through them before each run takes long.
        gc.freeze()
        connection.send(("ready", None))
        while True:
            run = connection.recv()
            elsewhere = attempt(experiment, run, lambda epoch: connection.send(("epoch", epoch)))
            connection.send(("ended", elsewhere))
    except InputError as error:
        connection.send(("refused", str(error)))
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        connection.send(("refused", disk_line(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    # Nobody is left to hear of what it does.
    os._exit(1)


def _device_of(number: int) -> str | None:
    """The GPU of a process, by the name that CUDA knows it by; ``None``: there is none."""
    count = torch.cuda.device_count()
    if not count:
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",")[:count] if seen else [str(number) for number in range(count)]
    return names[number % count]


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
