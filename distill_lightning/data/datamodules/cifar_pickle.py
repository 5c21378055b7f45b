"""Reading CIFAR's pickled files without running anything that they might ask for."""

from __future__ import annotations

import _codecs
import pickle
import re
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import InputError, refusing

_AGAIN = ": get the python version again from https://www.cs.toronto.edu/~kriz/cifar.html"

_WHOLE = re.compile("[iu][1248]")

# What pickle's machine runs into in a damaged file, whose instructions may be anything.
_FAILURES = (
    *(pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError),
    *(OverflowError, MemoryError, RecursionError, ImportError, struct.error),
)


class _Dtype:
    """Stands for `numpy.dtype`: keeps what a file says of one, without making it."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stands for `numpy.ndarray` and the function that rebuilds one: keeps its parts, without making it."""

    __slots__ = ("axes", "parts")

    def __init__(self, *empty: Any) -> None:
        self.parts: Any = None
        self.axes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.parts = state

    def made(self) -> NDArray[Any]:
        """The array, a view of its bytes.

        Raises:
            TypeError: it is not of whole numbers, or its parts are not what they should be.
            ValueError: they do not fit together.
        """
        _, shape, dtype, by_column, content = self.parts
        code, order = (text.decode() if isinstance(text, bytes) else text for text in (dtype.code, dtype.order))
        if not _WHOLE.fullmatch(code):
            raise TypeError(f"they are of the type {code!r}")
        flat = np.frombuffer(content, np.dtype(code).newbyteorder(cast("Any", order)))
        array = flat.reshape(shape, order="F" if by_column else "C")
        return array if self.axes is None else array.transpose(self.axes)


class _ArrayOfBytes(_Array):
    """Stands for the function that makes an array of its bytes, in files of protocol 5.

    Raises:
        ValueError: they are neither by row nor by column, nor by row with the axes exchanged afterwards.
    """

    __slots__ = ()

    def __init__(self, content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> None:
        super().__init__()
        if order not in ("C", "F") and (order != "K" or axes is None):
            raise ValueError(f"an array is in the order {order!r}")
        self.parts = (1, shape, dtype, order == "F", content)
        self.axes = axes if order == "K" else None


# All that an array, or bytes written by Python 3 for Python 2, are made of. numpy moved its own in version 2.
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _ArrayOfBytes,
    ("numpy._core.numeric", "_frombuffer"): _ArrayOfBytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _codecs.encode,
}


class _Reader(pickle._Unpickler):  # noqa: SLF001
    """Finds nothing but what is in ``_KNOWN``; no other function can so be called.

    It is pickle's reader in Python, because the one in C keeps room for as many objects as a damaged file says.

    Args:
        path: of the file, for the message.
        file: that is read.
    """

    def __init__(self, path: Path, file: Any) -> None:
        # Python 2's text, which the official files hold, is bytes.
        super().__init__(file, encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global."""
        if (module, name) not in _KNOWN:
            raise InputError(
                f"{self.path} asks for {module}.{name}, which CIFAR's files do not need; it is not run{_AGAIN}"
            )
        return _KNOWN[module, name]


def read_pickle(path: Path) -> dict[str, Any]:
    """Read one of CIFAR's pickled dicts, of numbers, text, lists and NumPy's arrays; nothing in it is run.

    The official files, which Python 2 wrote, are read like copies that were written again, by any version of Python
    and NumPy, in any protocol up to 5.

    Args:
        path: the file.

    Returns:
        The dict, its keys as text, its arrays not yet made; `whole_numbers` makes them.

    Raises:
        InputError: the file asks for anything that these are not made of, is damaged, or holds no dict.
    """
    with refusing(str(path), OSError), path.open("rb") as file, refusing(f"{path} is damaged{_AGAIN}", *_FAILURES):
        content = _Reader(path, file).load()
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}, not a dict{_AGAIN}")
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def whole_numbers(path: Path, content: dict[str, Any], name: str) -> NDArray[Any]:
    """An array, or lists, of whole numbers in what `read_pickle` gave.

    Args:
        path: the file, for the message.
        content: the dict.
        name: the key.

    Raises:
        InputError: there is none, or it holds something else.
    """
    with refusing(f"{path} has no whole numbers as {name!r}{_AGAIN}", *_FAILURES):
        value = content[name]
        numbers = value.made() if isinstance(value, _Array) else np.asarray(value)
        if numbers.dtype.kind not in "iu":
            raise TypeError(f"they are of the type {numbers.dtype}")
        return numbers
