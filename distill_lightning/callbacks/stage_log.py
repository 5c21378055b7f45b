"""What is measured in the course of a compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl

from distill_lightning.callbacks.stages import Measurements, measure
from distill_lightning.compression.report.stage import DENSE, FINAL, Stage, StageKind
from distill_lightning.compression.run.compressor import Compressor, Moment
from distill_lightning.compression.run.phases import Phase


class Row(NamedTuple):
    """A row of the report: its name, its kind, and the row whose time is measured instead."""

    name: str
    kind: StageKind
    timed_as: str | None = None


def row_at(moment: Moment, phase: Phase | None, *, last: Phase) -> Row | None:
    """The row of a moment of a compression; ``None``: it has none.

    Args:
        moment: the moment.
        phase: the phase that begins or ends; ``None``: none has begun.
        last: the last phase, whose time stands in the final row.
    """
    if phase is None:
        return Row(DENSE, "dense")
    timed_as = FINAL if phase is last else None
    if moment == "after":
        return Row(phase.name, "after", timed_as)
    if phase.end > phase.begin:
        return Row(f"{phase.name}, before fine-tuning", "before", timed_as or phase.name)
    return None


class StageLog:
    """The stages of a fit, and the share of zeros of each pruned weight after each epoch.

    Args:
        attribute: the module's network that is compressed.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.stages: list[Stage] = []
        self.sparsity: dict[str, list[float]] = {}
        # For how many epochs the network had been trained before; `None`: nobody knows.
        self.earlier: int | None = 0

    def clear(self) -> None:
        """Forget an earlier fit."""
        self.stages, self.sparsity = [], {}

    def note_sparsity(self, compressor: Compressor, epoch: int) -> None:
        """Keep the share of zeros of each pruned weight in this epoch, also if it is saved before it ends here."""
        for name, share in compressor.sparsities().items():
            # It was dense until it was pruned for the first time.
            shares = self.sparsity.setdefault(name, [])
            shares += [0.0] * (epoch - len(shares))
            shares[epoch:] = [share]

    def add(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        compressor: Compressor,
        wanted: Measurements,
        *,
        row: Row,
        final: bool = False,
    ) -> None:
        """Measure the network as it is now, see `measure`; every note of the compressor is told once.

        Args:
            trainer: the Trainer of the current training.
            pl_module: its module.
            compressor: the compressor of the network.
            wanted: the measurements to make.
            row: the row.
            final: whether it is the final network.
        """
        told = {note for stage in self.stages for note in stage.notes}
        self.stages += measure(
            trainer,
            pl_module,
            compressor,
            wanted,
            name=row.name,
            kind=row.kind,
            final=final,
            timed_as=row.timed_as,
            notes=[note for note in compressor.piece.notes if note not in told],
            sparsity=self.sparsity,
            attribute=self.attribute,
            earlier=self.earlier,
        )

    def state_dict(self) -> dict[str, Any]:
        """Stages and shares, in plain values."""
        return {"stages": [stage.as_plain() for stage in self.stages], "sparsity": self.sparsity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.stages = [Stage.of_plain(plain) for plain in state_dict["stages"]]
        self.sparsity = {path: list(shares) for path, shares in state_dict["sparsity"].items()}
