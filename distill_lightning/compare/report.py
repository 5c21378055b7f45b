"""From finished runs to the table, the files and the figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from distill_lightning import functional
from distill_lightning.compare.runner import Run, write_atomically
from distill_lightning.metrics import Agreement, CalibrationError, NegativeLogLikelihood
from distill_lightning.plots import accuracy_bars, learning_curves, reliability_diagram

ECE_BINS = 15


@dataclass(frozen=True)
class Score:
    """One run's line of ``results.csv``; accuracies, ECE, agreement and gap are parts of 1, NLL is in nats."""

    method: str
    seed: int
    test_accuracy: float
    test_accuracy_selected: float
    nll: float
    ece: float
    agreement: float
    gap_closed: float
    parameters: int
    seconds_per_epoch: float


COLUMNS = [field.name for field in fields(Score)]
HEADER = ["row", "test %", "sel. %", "NLL", "ECE %", "agree %", "gap %", "params", "s/epoch"]
LEGEND = f"""\
test: accuracy on the test images with the weights after the last epoch, which all columns but the next describe
sel.: test accuracy with the weights of the epoch that was best on the validation images
NLL: mean negative log-likelihood (nats); ECE: expected calibration error ({ECE_BINS} bins)
agree: test images on which the ensemble names the same class
gap: how much of the way from the student alone (mean over its seeds) to the ensemble is closed
params: parameters of the network that is used at test time; s/epoch: median over the epochs, training only"""


class Report:
    """Scores of a finished comparison.

    The gap that a run closes is its distance from the mean accuracy of the student alone, as a part of the distance
    from there to the ensemble; 0 for the student alone on average, 1 at the ensemble's accuracy.

    Args:
        runs: the finished runs, teachers first.
        targets: the test images' classes ``(N,)``.
    """

    def __init__(self, runs: Sequence[Run], targets: Tensor) -> None:
        self.runs = list(runs)
        self.targets = targets
        self._logits = {run.folder: run.logits() for run in runs}
        teachers = [run for run in self.runs if run.name.startswith("teacher_")]
        self.ensemble = functional.mean_probabilities([self._logits[run.folder]["last"] for run in teachers])
        self.ensemble_accuracy = _accuracy(self.ensemble, targets)
        alone = [_accuracy(self._logits[run.folder]["last"], targets) for run in self.runs if run.name == "alone"]
        self._alone = statistics.fmean(alone)
        self.teachers = [self._score(run) for run in teachers]
        self.students = [self._score(run) for run in self.runs if run not in teachers]
        self.methods = list(dict.fromkeys(score.method for score in self.students))

    def _score(self, run: Run) -> Score:
        result, logits = run.result(), self._logits[run.folder]
        return Score(
            method=run.name,
            seed=run.seed,
            test_accuracy_selected=_accuracy(logits["selected"], self.targets),
            parameters=result.parameters,
            seconds_per_epoch=statistics.median(line["seconds"] for line in result.history),
            **self._quality(logits["last"]),
        )

    def _quality(self, logits: Tensor) -> dict[str, float]:
        accuracy = _accuracy(logits, self.targets)
        nll, ece, agreement = NegativeLogLikelihood(), CalibrationError(bins=ECE_BINS), Agreement()
        nll.update(logits, self.targets)
        ece.update(logits, self.targets)
        agreement.update(logits, self.ensemble)
        # Where the ensemble is no better than the student alone there is no gap to close.
        gap = max(self.ensemble_accuracy - self._alone, 0.0)
        return {
            "test_accuracy": accuracy,
            "nll": float(nll.compute()),
            "ece": float(ece.compute()),
            "agreement": float(agreement.compute()),
            "gap_closed": (accuracy - self._alone) / gap if gap else float("nan"),
        }

    def rows(self) -> list[list[str]]:
        """The table: a header, then teachers, ensemble, student alone and methods, ``mean ± sd`` over the seeds."""
        rows = [HEADER, *(_row(score.method, [score]) for score in self.teachers)]
        quality = self._quality(self.ensemble.log())
        # The ensemble runs every teacher: it has all their parameters, and no training or selection of its own.
        parameters = sum(score.parameters for score in self.teachers)
        accuracy, nll, ece = quality["test_accuracy"], quality["nll"], quality["ece"]
        rows.append(
            [
                "ensemble",
                f"{100 * accuracy:.2f}",
                "",
                f"{nll:.3f}",
                f"{100 * ece:.2f}",
                "100.0",
                "100",
                f"{parameters:,}",
                "",
            ]
        )
        return rows + [_row(name, [score for score in self.students if score.method == name]) for name in self.methods]

    def figures(self) -> dict[str, Figure]:
        """The figures by file name."""
        return {
            "accuracy.png": accuracy_bars(
                {name: [s.test_accuracy for s in self.students if s.method == name] for name in self.methods},
                {
                    "ensemble": self.ensemble_accuracy,
                    "teachers' mean": statistics.fmean(score.test_accuracy for score in self.teachers),
                },
            ),
            "learning_curves.png": learning_curves(
                {
                    name: np.array(
                        [
                            [line["val/accuracy"] for line in run.result().history]
                            for run in self.runs
                            if run.name == name
                        ]
                    )
                    for name in self.methods
                }
            ),
            "reliability.png": reliability_diagram(
                {name: self._bins(self._of(name)) for name in self.methods},
                {"ensemble": self._bins([self.ensemble.log()])},
            ),
        }

    def _of(self, name: str) -> list[Tensor]:
        """Test logits of a row, one tensor per seed."""
        return [self._logits[run.folder]["last"] for run in self.runs if run.name == name]

    def _bins(self, logits: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        confidence, predicted = F.softmax(torch.cat(list(logits)), dim=-1).max(dim=-1)
        correct = predicted == self.targets.repeat(len(logits))
        counts, confidences, hits = functional.calibration_bins(confidence, correct, bins=ECE_BINS)
        return counts.numpy(), confidences.numpy(), hits.numpy()

    def write(self, folder: Path, *, heading: str) -> list[Path]:
        """Write ``results.csv``, ``teachers.csv``, ``results.md`` and the figures.

        Args:
            folder: where.
            heading: what stands above the table in ``results.md``.

        Returns:
            The paths.
        """
        pages: dict[str, Callable[[Path], object]] = {
            "results.csv": lambda path: path.write_text(_as_csv(self.students)),
            "teachers.csv": lambda path: path.write_text(_as_csv(self.teachers)),
            "results.md": lambda path: path.write_text(f"{heading}\n\n{_as_markdown(self.rows())}"),
        }
        for name, figure in self.figures().items():
            pages[f"figures/{name}"] = partial(figure.savefig, dpi=150)
        (folder / "figures").mkdir(exist_ok=True)
        for name, write in pages.items():
            write_atomically(folder / name, write)
        return [folder / name for name in pages]


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(dim=-1) == targets).double().mean())


def _row(name: str, scores: Sequence[Score]) -> list[str]:
    def cell(values: Sequence[float], scale: float, digits: int) -> str:
        if not np.isfinite(values).all():
            return "-"
        # Adding zero turns a rounded -0 into 0.
        mean = f"{round(scale * statistics.fmean(values), digits) + 0.0:.{digits}f}"
        return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"

    return [
        name,
        cell([score.test_accuracy for score in scores], 100, 2),
        cell([score.test_accuracy_selected for score in scores], 100, 2),
        cell([score.nll for score in scores], 1, 3),
        cell([score.ece for score in scores], 100, 2),
        cell([score.agreement for score in scores], 100, 1),
        cell([score.gap_closed for score in scores], 100, 0),
        f"{scores[0].parameters:,}",
        cell([score.seconds_per_epoch for score in scores], 1, 2),
    ]


def _as_csv(scores: Sequence[Score]) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(score) for score in scores)
    return lines.getvalue()


def _as_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
