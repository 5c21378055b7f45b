"""How much memory a training holds at most."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Written to clear_refs, it makes the kernel forget the peak of the resident memory: see proc(5).
_FORGET_PEAK = "5"
_IS_KNOWN = _CLEAR.exists() and os.access(_CLEAR, os.W_OK) and "VmHWM" in _STATUS.read_text()


class PeakMemory(pl.Callback):
    """Notes the most memory that a training holds.

    On a GPU, that is what PyTorch has allocated there. Elsewhere it is the resident memory of the whole process, with
    its libraries and data: what the machine must have. What earlier trainings of the process have left is given back
    first. The growth alone is not told: it varies by half from one training to the next of the same kind, because the
    allocator keeps what it once had. Where there is no ``/proc``, nothing is known.

    A training that is resumed tells of all its parts.

    Attributes:
        bytes: the peak, after the training; 0: not known.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._device = torch.device("cpu")

    def state_dict(self) -> dict[str, Any]:
        """The peak so far."""
        return {"bytes": max(self.bytes, _peak(self._device))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the training held before it was resumed."""
        self.bytes = state_dict["bytes"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget earlier trainings' peaks."""
        self._device = pl_module.device
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _IS_KNOWN:
            _give_back()
            _CLEAR.write_text(_FORGET_PEAK)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the peak."""
        self.bytes = max(self.bytes, _peak(self._device))


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _IS_KNOWN:
        return 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def _give_back() -> None:
    """Let the allocator return to the system what nobody uses; musl has no such call, and keeps less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
