"""What a study leaves in its folder: Markdown tables, CSV files and figures; and on what its figures depend."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from distill_lightning.storage import whole_file, write_whole

_TOO_LONG = 1e6
"""From here on a number with decimals is harder to read than its power of ten."""


def fixed(value: float, digits: int, *, sign: str = "") -> str:
    """A number with so many decimals, and one that has diverged in scientific notation.

    Args:
        value: the number.
        digits: decimals.
        sign: ``"+"`` for one before positive numbers, too.

    Example:
        >>> from distill_lightning.pages import fixed
        >>> fixed(0.12345, 3), fixed(-0.0001, 3), fixed(603652620288.0, 3)
        ('0.123', '0.000', '6.04e+11')
    """
    if abs(value) >= _TOO_LONG:
        return f"{value:{sign}.2e}"
    # Adding zero turns a rounded -0 into 0.
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """A header and rows as a Markdown table, with all columns but the first to the right."""
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def csv_text(lines: Sequence[Mapping[str, Any]], *, last: Sequence[str] = ()) -> str:
    """Lines as CSV; a line may lack columns.

    Args:
        lines: the values of each line by the title of their column.
        last: columns that come last, whatever the first line has.
    """
    text = io.StringIO()
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in last]
    writer = csv.DictWriter(text, [*names, *last], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_pages(folder: Path, pages: Mapping[str, str], figures: Mapping[str, Figure]) -> list[Path]:
    """Write files of text and, under ``figures``, images; each whole or not at all.

    Returns:
        The paths.

    Raises:
        InputError: the disk is full or refuses.
    """
    for name, text in pages.items():
        write_whole(folder / name, [text.encode()])
    for name, figure in figures.items():
        with whole_file(folder / "figures" / name) as partial:
            figure.savefig(partial, format=Path(name).suffix[1:], dpi=150)
    return [*(folder / name for name in pages), *(folder / "figures" / name for name in figures)]


def machine(*packages: str) -> dict[str, str | int]:
    """Versions, processor and threads, on which measured figures depend.

    Args:
        packages: names of distributions besides PyTorch.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "cpu": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
