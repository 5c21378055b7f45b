"""How tests train in several processes."""

from __future__ import annotations

import multiprocessing
import os

import pytorch_lightning as pl
import torch


def process_strategy() -> str:
    """The strategy by which a test trains in several processes, ``"ddp_fork"`` where it is possible.

    A forked process need not import everything again, which takes longer than the training; but CUDA, once it is
    initialised, does not work in one, and OpenMP waits for ever for the threads of the process that it came from.
    """
    has_one_thread = torch.get_num_threads() == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    return "ddp_fork" if can_fork and has_one_thread else "ddp_spawn"


def leave_the_group() -> None:
    """End the connection between processes: threads of it that are left at a process's exit may abort it.

    Those of PyTorch 2.6 do not, but may wait for ever for one another when they are told to end.
    """
    if torch.distributed.is_initialized() and not torch.__version__.startswith("2.6."):
        torch.distributed.destroy_process_group()


class LeaveTheGroup(pl.Callback):
    """Ends the processes' connection with the fit."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave."""
        leave_the_group()
