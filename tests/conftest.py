"""Settings that every test shares."""

import functools
import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

# One thread each: the workers of a parallel run and the spawned processes would otherwise wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import registry

# Every Trainer looks through the metadata of all installed packages, which takes longer than most of these trainings.
if hasattr(registry, "entry_points"):  # since Lightning 2
    registry.entry_points = functools.cache(registry.entry_points)

# What is written whole waits for the disk, in case the power fails, which no test can make happen.
os.fsync = os.fstat


# Only with lightning-bolts, which goes with an old Lightning alone: `make test-bolts`.
collect_ignore = [] if find_spec("pl_bolts") else ["bolts"]


def pytest_collection_finish(session):
    """The imported modules and collected tests stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip what the installed Lightning does not have."""
    for mark in item.iter_markers("lightning"):
        if tuple(map(int, pl.__version__.split(".")[:2])) < mark.kwargs["since"]:
            pytest.skip(f"pytorch-lightning {pl.__version__} has no such feature")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# New processes are forked by a server that has imported everything and run nothing: they start at once.
NEW = multiprocessing.get_context("forkserver")
NEW.set_forkserver_preload(["distill_lightning.testing", "distill_lightning.teachers.recorder"])


@pytest.fixture
def elsewhere():
    """Calls a function in a new process, which knows nothing of this one, and returns what it returns."""
    with ProcessPoolExecutor(1, mp_context=NEW) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture
def undrawn():
    """Studies leave no figures, which take as long as a small training: for tests of what they compute and keep."""
    with pytest.MonkeyPatch.context() as patch:
        for report in ("studies.compare.report.Report", "compression.report.report.Report"):
            patch.setattr(f"distill_lightning.{report}.figures", lambda report: {})
        yield


@pytest.fixture(scope="session")
def start_method():
    """How a test starts processes that share its imports, ``"fork"``; what has seen a GPU cannot be forked."""
    return "spawn" if torch.cuda.is_available() else "fork"
