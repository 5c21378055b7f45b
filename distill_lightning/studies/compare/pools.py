"""Which pool makes the runs of a comparison, and with how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from distill_lightning.studies.compare.cluster import RayPool
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.pool import InProcess, Pool
from distill_lightning.studies.compare.sharing import stored_config
from distill_lightning.studies.compare.workers import Processes


def pool_of(experiment: Experiment, say: Callable[[str], None] | None = None) -> Pool:
    """The pool that a comparison's configuration asks for.

    Args:
        experiment: the comparison.
        say: is given lines of what the pool waits for.
    """
    config = experiment.config
    if config.ray is not None:
        return RayPool(experiment, config.ray, say)
    if config.workers > 1:
        # Without a number, as many as the runs have that were made one after the other.
        return Processes(config, config.workers, config.threads_per_run or torch.get_num_threads())
    return InProcess(experiment)


def with_threads(config: CompareConfig, known: Path) -> CompareConfig:
    """The configuration with the number of threads that its runs have, of which the last bits of all numbers depend.

    Where it says none, it is that of the runs that are there, however many workers have made them; where there are
    none, it is PyTorch's own, several workers share the processor, and on a Ray cluster, it is 1.

    Args:
        config: the comparison.
        known: the file of its folder that tells of the runs there.

    Raises:
        InputError: that file is damaged.
    """
    if config.threads_per_run is not None:
        return config
    stored = None if config.anew else stored_config(known)
    if stored is not None:
        return replace(config, threads_per_run=stored.get("threads_per_run"))
    if config.ray is not None:
        return replace(config, threads_per_run=1)
    threads = torch.get_num_threads() if config.workers == 1 else max(1, _usable_cores() // config.workers)
    return replace(config, threads_per_run=threads)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
