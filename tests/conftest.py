"""Settings that every test shares."""

import functools
import gc
import os

# One thread each: the workers of a parallel run and the spawned processes would otherwise wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from lightning_fabric.utilities import registry

# Every Trainer looks through the metadata of all installed packages, which takes longer than most of these trainings.
registry.entry_points = functools.cache(registry.entry_points)


def pytest_collection_finish(session):
    """The imported modules and collected tests stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start_method():
    """How a test starts processes that share its imports, ``"fork"``; what has seen a GPU cannot be forked."""
    return "spawn" if torch.cuda.is_available() else "fork"
