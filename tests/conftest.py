"""Settings that every test shares."""

import functools
import gc
import os
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


@pytest.fixture(scope="session")
def start_method():
    """How a test starts processes that share its imports, ``"fork"``; what has seen a GPU cannot be forked."""
    return "spawn" if torch.cuda.is_available() else "fork"
