"""The verb: examine what a configuration describes, and print one table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from distill_lightning.studies.doctor.config import DoctorConfig
from distill_lightning.studies.doctor.examination import examine
from distill_lightning.studies.doctor.findings import Report
from distill_lightning.studies.output import wide_console

_ONE_PROCESS = ("--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto")

Make = Callable[[Sequence[str]], Any]
"""Makes an object with ``model``, ``data`` and ``trainer`` from arguments of the command line."""


def run(config: DoctorConfig, make: Make, *, console: Console | None = None) -> Report:
    """Run ``distill-lightning doctor CONFIG [--steps N] [--scored N] [--key value ...]``.

    Args:
        config: what is looked at, and how long.
        make: what builds a configuration's setup.
        console: where the table is shown.

    Returns:
        What was found.

    Raises:
        ArgumentError: the configuration cannot be parsed.
        InputError: it cannot be used.
    """
    console = wide_console(console)
    with tempfile.TemporaryDirectory() as root:
        setup = make([*config.arguments, *_ONE_PROCESS, "--trainer.default_root_dir", root])
        report = examine(
            setup.model, setup.data, trainer=setup.trainer, steps=config.steps, scored=config.scored, copies=False
        )
    console.print(_table(report))
    for line in report.advice():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.is_well:
        console.print("All is well.", highlight=False)
    return report


def _table(report: Report) -> Table:
    header, *body = report.rows()
    table = Table(*header, box=None, pad_edge=False)
    for row in body:
        table.add_row(*row)
    return table
