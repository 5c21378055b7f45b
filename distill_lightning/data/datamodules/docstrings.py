"""Language modelling on a text that every machine with Python has: the documentation of its standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.options import LoadingOptions
from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.errors import InputError, refusing

# Tests, what is not the library's own, and what some distributions leave out.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_BETWEEN = b"\n\n"

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class ByteWindows(ViewDataset):
    """Windows of a text as sequences of bytes, each with the bytes that follow; every view is the plain window.

    Args:
        text: uint8 ``(B,)``.
        starts: where the windows begin, int64 ``(N,)``; each is followed by at least ``length`` bytes.
        length: bytes of a window.
    """

    depends_on = ("length",)

    def __init__(self, text: Tensor, starts: Tensor, *, length: int) -> None:
        super().__init__(seed=0, partners=False)
        self.text, self.starts, self.length = text, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these windows, input and target int64 ``(N, T)``."""
        window = self._bytes(self.starts[index]).long()
        return Batch(window[:, :-1], window[:, 1:], index, view)

    def columns(self) -> Columns:
        """All windows."""
        windows = self._bytes(self.starts)
        return Columns(labels=windows[:, 1:], contents=(windows[:, :-1],))

    def _bytes(self, starts: Tensor) -> Tensor:
        """uint8 ``(N, T + 1)``."""
        return self.text[starts[:, None] + torch.arange(self.length + 1)]


class DocstringsDataModule(ViewDataModule):
    """Language modelling on the bytes of the documentation strings of Python's standard library; no download.

    An input is ``length`` bytes, int64 ``(N, T)``, its target the byte after each of them, ``(N, T)``, in 256 classes.
    The strings are read from the library's source files, which are not run, file by file and in the order in which they
    stand there. The files are dealt out by ``seed``: to test until they fill ``test_size`` windows, then to validation,
    the rest to training; so no split knows a file of another one. The windows of a split do not overlap.

    **The text depends on the version of Python**, and slightly on the distribution: results of different versions are
    not comparable. With 3.11 there are 1.6 million bytes.

    Args:
        length: bytes of a window, ``T``.
        data_dir: a folder of Python files to read instead; ``None``: the standard library's.
        val_size: number of validation windows.
        test_size: number of test windows.
        options: how windows are chosen, ordered and loaded; see `LoadingOptions`.

    Raises:
        InputError: a size that is not positive, or, from ``setup``, one that is larger than the text, a folder without
            documentation strings, or a file in it that is not Python.
    """

    val_size: int  # required, as the next: there are no separate sets
    test_size: int
    num_classes = 256

    def __init__(
        self,
        *,
        length: int = 64,
        data_dir: str | Path | None = None,
        val_size: int = 1000,
        test_size: int = 1000,
        **options: Unpack[LoadingOptions],
    ) -> None:
        super().__init__(val_size=val_size, test_size=test_size, views=1, views_per_load=1, partners=False, **options)
        if length < 1:
            raise InputError(f"length must be at least 1, got {length}")
        self.length = length
        self.input_shape = (length,)
        self.data_dir = Path(sysconfig.get_path("stdlib") if data_dir is None else data_dir)
        self._splits: dict[str, ByteWindows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split them; a second call does nothing."""
        if self._splits:
            return
        files = read_docstrings(self.data_dir)
        generator = torch.Generator().manual_seed(self.seed)
        undealt = [files[place] for place in torch.randperm(len(files), generator=generator).tolist()]
        test = self._deal(undealt, "test_size", self.test_size)
        val = self._deal(undealt, "val_size", self.val_size)
        train = self._windows(_BETWEEN.join(undealt))
        if not len(train):
            raise InputError(f"{self.data_dir}: val_size and test_size leave nothing to train on: lower them")
        if self.subset is not None and self.subset > len(train):
            raise InputError(f"subset={self.subset} is larger than the {len(train)} training windows that are left")
        order = torch.randperm(len(train), generator=generator)
        train.starts = train.starts[order[: self.subset]]
        self._splits = {"train": train, "val": val, "test": test}

    def dataset(self, split: str, *, augment: bool = False) -> ByteWindows:
        """One split, ``"train"``, ``"val"`` or ``"test"``; there is nothing to ``augment``."""
        self.setup()
        return self._splits[split]

    def _deal(self, undealt: list[bytes], name: str, size: int) -> ByteWindows:
        """Take files from the front until they make ``size`` windows."""
        text = b""
        while (len(text) - 1) // self.length < size:
            if not undealt:
                raise InputError(
                    f"{self.data_dir} has not enough text for {name}={size} windows of {self.length} bytes: lower it"
                )
            text += undealt.pop(0) + _BETWEEN
        windows = self._windows(text)
        windows.starts = windows.starts[:size]
        return windows

    def _windows(self, text: bytes) -> ByteWindows:
        # The last byte of a window is the target of its last input, and the first input of the next one.
        count = max(len(text) - 1, 0) // self.length
        # A copy, because PyTorch does not work on what cannot be written to.
        held = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        return ByteWindows(held, torch.arange(count) * self.length, length=self.length)


# Reading the library takes seconds, and a comparison makes a data module for every training.
@lru_cache(maxsize=2)
def read_docstrings(folder: Path) -> tuple[bytes, ...]:
    """The documentation strings of the Python files below a folder, file by file in the order of their paths.

    The folders ``test``, ``tests``, ``idlelib``, ``lib2to3``, ``turtledemo``, ``site-packages`` and ``dist-packages``
    are left out, and files without such strings. The answer is kept while the process lasts.

    Args:
        folder: of files that are read, and not run.

    Returns:
        Of each file its strings without their indentation, in the order of the file, empty lines between them, UTF-8.

    Raises:
        InputError: there are no such strings, or a file is not Python.
    """
    relative = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    texts = [_docstrings(folder / name) for name in relative if not _SKIPPED.intersection(name.split("/"))]
    found = tuple(text for text in texts if text)
    if not found:
        raise InputError(f"{folder} has no Python files with documentation strings: give data_dir, a folder of some")
    return found


def _docstrings(path: Path) -> bytes:
    with warnings.catch_warnings(), refusing(str(path), SyntaxError, ValueError):
        # About strings such as "\d", which are irrelevant here.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    documented = [node for node in ast.walk(tree) if isinstance(node, _Documented)]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))
    strings = [ast.get_docstring(node) for node in documented]
    return _BETWEEN.join(string.encode(errors="replace") for string in strings if string)
