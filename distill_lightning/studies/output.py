"""What the studies show and where they write: the console, the output folder, tables and the list of files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill_lightning.errors import InputError, refusing_to_write
from distill_lightning.storage import sweep_partial, write_whole

# Columns of a log file, which has no edge to wrap at.
_WIDTH = 132


def wide_console(console: Console | None) -> Console:
    """The given console or a new one, wide enough for a table where it is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    return console


def refuse_foreign_folder(folder: Path, *, known: str, ignored: str = "") -> None:
    """Refuse an output folder that holds something else than the study's own files.

    Args:
        folder: that was given with ``--output``.
        known: name of the file that makes a folder the study's own.
        ignored: name of a file that may be there before it.

    Raises:
        InputError: it is a file, or other files are in it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: give the path of a folder with --output")
    # A call killed at its very start leaves a partial file.
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    found = any(not name.startswith("partial.") and name != ignored for name in names)
    if found and not (folder / known).exists():
        raise InputError(f"output folder {folder} holds something else: give an empty or new one with --output")


def claim_folder(folder: Path, *, known: str, content: str, sweeps: bool = True) -> None:
    """Make an output folder a study's own, and remove what killed calls have left half-written in it.

    Args:
        folder: the folder, which may exist.
        known: see `refuse_foreign_folder`.
        content: what that file says.
        sweeps: whether to remove that; not while other calls may write there.

    Raises:
        InputError: the folder cannot be written to.
    """
    with refusing_to_write("output"):
        folder.mkdir(parents=True, exist_ok=True)
        if sweeps:
            sweep_partial(folder, "**/*")
        write_whole(folder / known, [content.encode()])


def table_of(rows: Sequence[Sequence[str]]) -> Table:
    """A table of a header and rows, narrow enough for a terminal of 80 columns."""
    header, *body = rows
    # Where it is too wide all the same, only what follows a space, "± sd", moves to a second line.
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left", no_wrap=number == 0, overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


def print_written(console: Console, paths: Iterable[Path]) -> None:
    """List the files that were written."""
    console.print("Written:")
    for path in paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
