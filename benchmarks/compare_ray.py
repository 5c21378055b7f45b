"""What it costs to hand a run of a comparison to a Ray worker: a section of ``benchmarks.compare``."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.timing import Figure, ratio, take_turns
from distill_lightning.studies.compare.attempt import attempt
from distill_lightning.studies.compare.claims import Presence
from distill_lightning.studies.compare.cluster import LOCAL, RayPool
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.rows import ALONE
from distill_lightning.studies.compare.runs import Run

if TYPE_CHECKING:
    from benchmarks.compare import Bench


def ray_worker(bench: Bench) -> None:
    """A run handed to a Ray worker of this machine, over the same run in this process; its start is not counted."""
    with tempfile.TemporaryDirectory() as output:
        experiment = bench.experiment(f"--output={output}", "--threads_per_run=1", "--epochs=4")
        folders = (Path(output) / str(number) for number in itertools.count())
        pool = RayPool(experiment, LOCAL)

        def here() -> float:
            run = _run_in(experiment, next(folders))
            begin = time.perf_counter()
            attempt(experiment, run, lambda _: None)
            return time.perf_counter() - begin

        def there() -> float:
            run = _run_in(experiment, next(folders))
            begin = time.perf_counter()
            pool.submit(run)
            while not list(pool.wait(lambda *_: None)):
                pass
            return time.perf_counter() - begin

        turns = {"in this process": here, "handed to a worker": there}
        with Presence(Path(output)):
            try:
                # A worker reads its data, and builds everything once, in its first runs.
                measured = take_turns(turns, rounds=bench.rounds, warm_up=2)
            finally:
                pool.close()
    in_process = measured["in this process"]
    rows = [
        {"the student alone": name, "s a run": Figure.of(values), "over in process": ratio(values, in_process)}
        for name, values in measured.items()
    ]
    bench.section("a run handed to a Ray worker", rows, note=f"{bench.images} images, 4 epochs; start not counted")
    bench.ratio("ray_worker_over_process", ratio(measured["handed to a worker"], in_process))


def _run_in(experiment: Experiment, folder: Path) -> Run:
    return next(run for run in plan(experiment, folder) if run.name == ALONE)
