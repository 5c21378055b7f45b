"""MATLAB's files before version 7.3: numbers, texts, cells and structs, and nothing else.

SciPy's reader ends the process on some damaged files; here every size is held against the bytes that are there. A file
is a header of 128 bytes and then elements: a type, a number of bytes, and these, filled up to a multiple of eight. An
array is an element of elements: flags with its class, its dimensions, its name, and what it holds, columns first.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import refusing

_HEADER, _VERSION = 128, 0x0100
_LARGEST = 2**31
# Types of elements, and classes of arrays. Small numbers of any class are kept in fewer bytes.
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_INTEGERS = {kind: name for kind, name in _NUMBERS.items() if not name.startswith("f")}
_TEXTS = _INTEGERS | {16: "u1", 17: "u2", 18: "u4"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800

_Elements = Iterator[tuple[int, memoryview]]


def read_mat(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Some variables of a file.

    Args:
        path: of the file.
        names: of the variables; those that are not there are left out.

    Returns:
        By name: numbers as an array of the shape that MATLAB shows; a text as a string, a matrix of several as a list;
        a cell as a list, column by column; a struct as a dict, an array of several as a list.

    Raises:
        InputError: the file is damaged, of another format, or a variable holds something else.
    """
    kinds = (OSError, ValueError, TypeError, OverflowError, struct.error, zlib.error, RecursionError)
    with refusing(f"{path} is damaged or no MATLAB file before 7.3, fetch it again", *kinds):
        content = memoryview(path.read_bytes())
        order = {b"IM": "<", b"MI": ">"}.get(bytes(content[_HEADER - 2 : _HEADER]))
        if order is None or struct.unpack_from(f"{order}H", content, _HEADER - 4)[0] != _VERSION:
            raise ValueError("it begins in another way")
        reader = _Reader(order)
        found = (reader.array(part, names) for part in reader.matrices(content[_HEADER:]))
        return {name: value for name, value in found if name in names}


class _Reader:
    """Reads elements of one order of bytes, ``"<"`` or ``">"``."""

    def __init__(self, order: str) -> None:
        self.order = order

    def elements(self, content: memoryview) -> _Elements:
        place = 0
        while place < len(content):
            kind, size = struct.unpack_from(f"{self.order}II", content, place)
            start, end = place + 8, place + 8 + size
            if kind >> 16:
                # Up to four bytes, in the place of their number.
                kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
                end = place + 8
            elif kind != _COMPRESSED:
                end += -size % 8
            if start + size > min(end, len(content)):
                raise ValueError(f"{size} bytes of {len(content) - start} that are left")
            yield kind, content[start : start + size]
            place = end

    def matrices(self, content: memoryview) -> Iterator[memoryview]:
        for kind, part in self.elements(content):
            if kind == _MATRIX:
                yield part
            elif kind == _COMPRESSED:
                unpacking = zlib.decompressobj()
                unpacked = unpacking.decompress(part, _LARGEST)
                if not unpacking.eof:
                    raise ValueError("what is compressed has no end")
                yield from self.matrices(memoryview(unpacked))

    def array(self, content: memoryview, names: Collection[str] | None = None) -> tuple[str, Any]:
        """Name and value; no value where the name is none of ``names``."""
        if not content:
            return "", np.zeros((0, 0))
        parts = self.elements(content)
        flags, *_ = self.integers(parts)
        shape = self.integers(parts)
        name = self.text(parts)
        if names is not None and name not in names:
            return name, None
        return name, self.value(flags, shape, parts)

    def value(self, flags: int, shape: list[int], parts: _Elements) -> Any:
        kind, count = flags & 0xFF, math.prod(shape)
        if kind == _CELL:
            return [self.inner(parts) for _ in range(count)]
        if kind == _STRUCT:
            (length,), fields = self.integers(parts), self.text(parts, strip=False)
            names = [fields[start : start + length].rstrip("\0") for start in range(0, len(fields), length)]
            if not names and count > 1:
                raise ValueError("structs without fields")
            structs = [{name: self.inner(parts) for name in names} for _ in range(count)]
            return structs[0] if count == 1 else structs
        if kind == _CHAR:
            codes = self.numbers(parts, _TEXTS).reshape(shape, order="F")
            lines = ["".join(map(chr, row)).rstrip() for row in codes.tolist()]
            return lines[0] if len(lines) == 1 else lines
        if kind not in _CLASSES or flags & _COMPLEX:
            raise ValueError(f"an array of class {kind}{' of complex numbers' if flags & _COMPLEX else ''}")
        with np.errstate(invalid="ignore"):
            values = self.numbers(parts).astype(_CLASSES[kind])
        return values.reshape(shape, order="F")

    def inner(self, parts: _Elements) -> Any:
        kind, content = self.next(parts)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where an array is due")
        return self.array(content)[1]

    def numbers(self, parts: _Elements, types: dict[int, str] = _NUMBERS) -> NDArray[Any]:
        kind, content = self.next(parts)
        if kind not in types:
            raise ValueError(f"an element of type {kind} where numbers are due")
        return np.frombuffer(content, dtype=self.order + types[kind])

    def integers(self, parts: _Elements) -> list[int]:
        return [int(number) for number in self.numbers(parts, _INTEGERS).tolist()]

    def text(self, parts: _Elements, *, strip: bool = True) -> str:
        text = bytes(self.next(parts)[1]).decode("latin-1")
        return text.rstrip("\0") if strip else text

    @staticmethod
    def next(parts: _Elements) -> tuple[int, memoryview]:
        found = next(parts, None)
        if found is None:
            raise ValueError("an array has no end")
        return found
