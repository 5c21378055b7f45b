"""What a whole comparison takes, as the command line makes it: sections of ``benchmarks.compare``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import Figure, ratio

if TYPE_CHECKING:
    from benchmarks.compare import Bench

DEMO = Path(__file__).parent.parent / "configs/compare/digits.yaml"
# The comparison as it was made before there were stores and workers, and as it is made with both.
WAYS = {"one after the other, teachers live": ["--teachers_store", "null"], "a store, 2 workers": ["--workers", "2"]}


def whole_table(bench: Bench) -> None:
    """All rows of the table with 2 seeds and 4 epochs: with the store and 2 workers, over neither; once each."""
    size = ["--data.init_args.subset", str(bench.images)] if bench.is_small else []
    length = ["--epochs", "1" if bench.is_small else "4", "--seeds", "[0,1]", "--accelerator", "cpu"]
    # As many threads a run: others would give other last bits.
    threads = ["--threads_per_run", "1"]
    taken = {way: _seconds([str(bench.config), *size, *length, *threads, *how]) for way, how in WAYS.items()}
    before, now = taken.values()
    rows: list[dict[str, Any]] = [{"all rows": way, "s": seconds} for way, seconds in taken.items()]
    bench.section("a whole table", rows, note=f"{' '.join([*length, *threads])}; once, start included")
    bench.ratio("whole_table_over_before", ratio([now], [before]))


def demo(bench: Bench) -> None:
    """``make demo`` after the installation, in minutes; once."""
    minutes = _seconds([str(DEMO), "--workers", "2", *(["--epochs", "1"] if bench.is_small else [])]) / 60
    bench.section("make demo", [{"": "after the installation", "min": minutes}], note="once, start included")
    bench.ratio("demo_minutes", Figure.of([minutes]))


def _seconds(arguments: list[str]) -> float:
    """What a comparison takes in a process of its own.

    Raises:
        CalledProcessError: it has failed.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "distill_lightning", "compare", *arguments, "--output", f"{output}/out"]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  (its own command line)
        return time.perf_counter() - begin
