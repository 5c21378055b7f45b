"""How a report says numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from distill_lightning.compression.report.stage import INT8, LatencyRow, Stage
from distill_lightning.errors import in_a_line
from distill_lightning.pages import fixed

FILES = {
    "state_dict": "state dict",
    "artefact": "artefact",
    "artefact_deflated": "artefact, deflated",
    "onnx": "ONNX",
    INT8: "ONNX int8",
}
"""Kinds of files and their titles."""

RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "onnxruntime int8": "ONNX Runtime int8"}


def title_of(key: str) -> str:
    """What a kind of file is called in a sentence."""
    return "ONNX file" if key == "onnx" else FILES[key]


def epochs_of(stage: Stage) -> str:
    """Epochs of this run, after those before it."""
    if stage.epochs is None:
        return "not noted"
    before = "? + " if stage.earlier is None else f"{stage.earlier} + " if stage.earlier else ""
    return f"{before}{stage.epochs}"


def as_interval(row: LatencyRow) -> str:
    """A ratio of times with its 95 % interval."""
    return f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"


def as_ratio(value: float) -> str:
    """A ratio to dense, with a third decimal where it is small."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def counted(value: int | None, dense: int | None, otherwise: str = "") -> str:
    """A number with its ratio to dense, or the reason why there is none."""
    if value is None:
        return in_a_line(otherwise)
    return f"{value:,} ({as_ratio(value / dense)})" if dense else f"{value:,}"


def without_ratio(cell: str) -> str:
    """The number that `counted` puts before a ratio."""
    return cell.partition(" (")[0]


def ratio_in(cell: str) -> str:
    """The ratio that `counted` puts in brackets, or the whole cell if there is no ratio."""
    before, bracket, ratio = cell.rpartition("(")
    return ratio.removesuffix(")") if bracket and before else cell


def spread(values: Sequence[float], scale: float, *, seeds: int, sign: str = "") -> str:
    """Mean and standard deviation of scores or differences, with their number.

    Args:
        values: one for each seed that has it.
        scale: 100 for percent.
        seeds: the number of seeds; the number of values is left out where it is one.
        sign: ``"+"`` for one before positive numbers, too.
    """
    if not values:
        return "not measured"
    lost = sum(not math.isfinite(value) for value in values)
    if lost:
        return f"not finite in {lost} of {len(values)}"
    digits = 2 if scale == 100 else 3
    mean = fixed(scale * statistics.fmean(values), digits, sign=sign)
    if len(values) > 1:
        mean += f" ± {fixed(scale * statistics.stdev(values), digits)}"
    return mean if seeds == 1 else f"{mean} (n={len(values)})"


def is_percent(metric: str) -> bool:
    """Whether a score is shown in percent."""
    return "accuracy" in metric
