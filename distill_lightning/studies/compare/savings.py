"""What a comparison says of the teachers' answers that it has kept."""

from __future__ import annotations

from collections.abc import Sequence

from distill_lightning.studies.compare.runs import Run, RunResult
from distill_lightning.studies.compare.storage import Storage, size_in_words


def asked_once(result: RunResult) -> str:
    """What filling a store took, for a line about its run."""
    took = result.scores["store"]
    return f"{took['answers']:,.0f} views asked about, {size_in_words(took['bytes'])}, {took['seconds']:.0f} s"


def told_of_storage(storage: Storage, runs: Sequence[Run]) -> str:
    """Which rows read what was kept, and what that has saved; empty: there are no teachers that answer."""
    live = ", ".join(f"{name} ({reason})" if reason else name for name, reason in storage.live.items())
    if not storage.rows:
        return f"Teachers' answers: live for {live}." if live else ""
    views = f"{storage.kept_views} views" if storage.kept_views > 1 else "one view, all are alike"
    kinds = [f"outputs {storage.outputs}"] if storage.outputs else []
    layers = ", ".join(dict.fromkeys(tap.layer for tap in storage.tapped))
    kinds += [f"features {storage.features} of {layers}"] if layers else []
    told = f"Teachers' answers: kept once for {', '.join(storage.rows)} ({views}, {'; '.join(kinds)})"
    told += f"; live for {live}. " if live else ". "
    filled = [run for run in runs if run.makes_store and not run.result().without_scores]
    took = [run.result().scores["store"] for run in filled]
    asked, seconds = (sum(one[what] for one in took) for what in ("answers", "seconds"))
    # What every student's teachers would have been asked.
    spared = sum(run.epochs * storage.samples * len(run.teachers) for run in runs if run.store in filled)
    each = seconds / (asked * storage.teachers) if asked else 0
    told += f"{asked * storage.teachers:,.0f} forward passes of a teacher and a sample in {seconds:.0f} s, instead of "
    return f"{told}{spared:,} beside the students, about {each * spared:.0f} s."
