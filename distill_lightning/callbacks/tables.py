"""Tables of texts, for whichever logger is there."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from distill_lightning.callbacks.loggers import Take, folder_of, hand_over
from distill_lightning.storage import write_whole


@dataclass(frozen=True)
class Table:
    r"""Rows of texts under names of columns.

    Attributes:
        columns: their names.
        rows: of as many texts each.

    Example:
        >>> from distill_lightning.callbacks import Table
        >>> print(Table(("source", "translation"), [("a house", "ein|Haus")]).markdown())
        | source | translation |
        | --- | --- |
        | a house | ein\|Haus |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(
            "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def _save(logger: Any, name: str, table: Table, step: int) -> None:
    folder = folder_of(logger, "tables", name)
    if folder is not None:
        write_whole(folder / _file_name(name, step), [table.csv().encode()])


def _file_name(name: str, step: int) -> str:
    return f"{name.replace('/', '_')}_{step}.csv"


_TAKES: dict[str, Take] = {
    "TensorBoardLogger": lambda logger, name, table, step: logger.experiment.add_text(
        name, table.markdown(), global_step=step
    ),
    "WandbLogger": lambda logger, name, table, step: logger.log_table(
        key=name, columns=list(table.columns), data=[list(row) for row in table.rows], step=step
    ),
    "MLFlowLogger": lambda logger, name, table, step: logger.experiment.log_text(
        logger.run_id, table.csv(), f"tables/{_file_name(name, step)}"
    ),
    "CometLogger": lambda logger, name, table, step: logger.experiment.log_table(
        _file_name(name, step), tabular_data=[list(row) for row in table.rows], headers=list(table.columns)
    ),
    "NeptuneLogger": lambda logger, name, table, step: logger.experiment[name].append(table.markdown(), step=step),
    "Logger": _save,
}


def log_table(trainer: pl.Trainer, name: str, table: Table, step: int) -> None:
    """Log a table with every logger of a Trainer; only the first process does anything, and only if there are loggers.

    Weights & Biases and Comet receive a table, TensorBoard and Neptune its text in Markdown, MLflow a file. For any
    other logger, such as `CSVLogger`, the file ``tables/<name>_<step>.csv`` is written to its folder.

    Args:
        trainer: the Trainer with the loggers.
        name: the table's name in the logger, such as ``val/translations``.
        table: the table.
        step: the training step it belongs to.
    """
    hand_over(trainer, _TAKES, name, table, step)
