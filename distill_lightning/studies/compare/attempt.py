"""One run, made by whoever has claimed it; what goes wrong with it alone becomes its result."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import Path
from typing import Any

from distill_lightning.errors import DiskError, InputError, NonFiniteError, is_full
from distill_lightning.networks.weights import read_checkpoint
from distill_lightning.storage import sweep_partial, write_whole
from distill_lightning.studies.compare.claims import Claim, ClaimLostError, Neighbours
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runner import IN_EPOCH, execute, leave_none
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.data import OtherDataError
from distill_lightning.studies.progress import OnEpoch

# They would stop every other run as well, or are no matter of what the run computes.
_OF_ALL = (DiskError, OtherDataError, ClaimLostError)
_ERROR_FILE = "error.txt"
_LONGEST = 300


def attempt(experiment: Experiment, run: Run, on_epoch: OnEpoch) -> str:
    """Make a run, unless another process is making it.

    Args:
        experiment: builds its objects.
        run: which; those that it depends on are finished.
        on_epoch: called with the number of finished epochs, after each.

    Returns:
        Who is making it; empty: it is finished.

    Raises:
        InputError: what concerns the other runs as well: the disk is full or refuses, the data are others, or files of
            this run or of one that it depends on are damaged.
    """
    claim = Claim(run.folder)
    holder = claim.take()
    if holder is not None:
        return holder
    neighbours = Neighbours(Path(experiment.config.output), claim)

    def ended(epoch: int) -> None:
        # Before its files are written.
        claim.check()
        on_epoch(epoch)

    try:
        # Whoever held the claim before may have finished it.
        if not run.is_finished:
            sweep_partial(run.folder, "*")
            _leave_result(experiment, run, ended, neighbours)
    except ClaimLostError as lost:
        return str(lost)
    finally:
        claim.release()
    return ""


def clean_up(run: Run) -> None:
    """Remove what a killed process has left of a run, besides what the run goes on from."""
    claim = Claim(run.folder)
    if claim.take() is None:
        sweep_partial(run.folder, "*")
        claim.release()


def forget(run: Run) -> None:
    """Let a run that has diverged or failed be made from its beginning."""
    for path in (run.checkpoint, run.folder / _ERROR_FILE, run.result_file):
        path.unlink(missing_ok=True)


def _leave_result(experiment: Experiment, run: Run, on_epoch: OnEpoch, neighbours: Neighbours) -> None:
    if run.checkpoint.exists():
        read_checkpoint(run.checkpoint)
    lacking = _lacking(run)
    if lacking:
        leave_none(experiment, run, **lacking)
        return
    try:
        execute(experiment, run, on_epoch, neighbours.were_there)
    except _OF_ALL:
        raise
    except NonFiniteError as error:
        leave_none(experiment, run, diverged=str(error) if " epoch " in str(error) else f"{error}{_when(error)}")
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            raise
        write_whole(run.folder / _ERROR_FILE, [traceback.format_exc().encode()])
        leave_none(experiment, run, failed=_line_of(error))


def _lacking(run: Run) -> dict[str, Any]:
    """Why a run cannot be made, if one that it learns from has no scores."""
    for other in (*run.teachers, run.initial, run.backbone):
        if other is None:
            continue
        result = other.result()
        if result.diverged:
            return {"diverged": f"{other.title}, from which it learns, has no finite numbers"}
        if result.failed:
            return {"failed": f"{other.title}, from which it learns, has failed"}
    return {}


def _line_of(error: Exception) -> str:
    """What went wrong, when, and where to read more, in one line."""
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    said = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    return f"{kind}{said}{_when(error)} ({_ERROR_FILE} in its folder tells more)"


def _when(error: Exception) -> str:
    return "".join(f", {note}" for note in getattr(error, "__notes__", ()) if note.startswith(IN_EPOCH))
