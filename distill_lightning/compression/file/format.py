"""The file format of packed tensors.

It begins with ``DLPK``, the version of the format and the header's length, four bytes each. The header is deflated
JSON: the writer's own header, and the codec, shape, type and parts of every tensor. Then follow the parts, in the
header's order, each at a multiple of 8 bytes, and finally the CRC-32 of everything before. Numbers are little-endian.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import distill_lightning
from distill_lightning.compression.file.packed import Packed, Part, inflate, unpack, unpacked_bytes
from distill_lightning.errors import InputError
from distill_lightning.storage.files import CHECKSUM_BYTES, checksum_fits, with_checksum, write_whole

FORMAT = 2
_MAGIC = b"DLPK"
_FIXED = 12
_ALIGNED = 8
# Of a file of any size, and for each of its bytes: what may be unpacked without being asked for.
_SMALL = 2**28
_RATIO = 10_000
# Some hundred thousand tensors.
_LARGEST_HEADER = 2**26


def write_packed(path: Path | str, tensors: Mapping[str, Packed], header: Mapping[str, Any]) -> int:
    """Write packed tensors to a file, whole or not at all.

    The header has plain values: str, int, finite float, bool, ``None``, and lists and dicts of these. Returns the
    file's bytes.
    """
    path = Path(path)
    _check_plain(header, "header")
    told = {
        name: [packed.codec, list(packed.shape), packed.dtype, packed.options, [
            [part_name, len(part.content), part.number, part.bits, part.coding]
            for part_name, part in packed.parts.items()
        ]]
        for name, packed in tensors.items()
    }  # fmt: skip
    text = json.dumps({"header": header, "tensors": told}, separators=(",", ":"), allow_nan=False)
    write_whole(path, with_checksum(_pieces(zlib.compress(text.encode(), 9), tensors)))
    return path.stat().st_size


def _pieces(header: bytes, tensors: Mapping[str, Packed]) -> Iterator[bytes]:
    yield _MAGIC + FORMAT.to_bytes(4, "little") + len(header).to_bytes(4, "little")
    contents = [header, *(part.content for packed in tensors.values() for part in packed.parts.values())]
    place = _FIXED
    for content in contents:
        padding = bytes(-place % _ALIGNED)
        yield padding + content
        place += len(padding) + len(content)


def read_packed(path: Path | str, *, limit: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file, unpacked; each tensor owns its memory.

    Args:
        path: path of the file.
        limit: largest number of bytes of all unpacked tensors; ``None``: 10,000 for each of the file, at least 256 MiB.

    Raises:
        InputError: the file does not exist, is damaged, is of another kind, or its tensors are larger than the limit.
    """
    header, packed = read_parts(path)
    with _reading(Path(path)):
        largest = max(_SMALL, _RATIO * Path(path).stat().st_size) if limit is None else limit
        wanted = sum(map(unpacked_bytes, packed.values()))
        if wanted > largest:
            raise InputError(
                f"{path} says that its tensors take {wanted:,} bytes, more than {largest:,}: if it is to be trusted, "
                f"give limit={wanted}"
            )
        return header, {name: unpack(one) for name, one in packed.items()}


def read_parts(path: Path | str) -> tuple[dict[str, Any], dict[str, Packed]]:
    """Read the header and the tensors of a file, still packed."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the path of a packed network")
    content = path.read_bytes()
    if content[: len(_MAGIC)] != _MAGIC:
        raise InputError(f"{path} is not a file of packed tensors: give one that write_packed wrote")
    version, length = (int.from_bytes(content[place : place + 4], "little") for place in (4, 8))
    if len(content) >= _FIXED and version != FORMAT:
        raise InputError(
            f"{path} has format {version}, but distill_lightning {distill_lightning.__version__} reads {FORMAT}: "
            "compress the network again, or read the file with the version that wrote it"
        )
    if len(content) < _FIXED + CHECKSUM_BYTES or not checksum_fits(content):
        raise InputError(f"{path} is damaged or incomplete: write it again, or copy it again")
    with _reading(path):
        start = _FIXED + -_FIXED % _ALIGNED
        told = json.loads(inflate(content[start : start + length], _LARGEST_HEADER))
        place, tensors = start + length, {}
        for name, (codec, shape, dtype, options, parts) in told["tensors"].items():
            found = {}
            for part_name, size, number, bits, coding in parts:
                place += -place % _ALIGNED
                found[part_name] = Part(content[place : place + size], number, bits, coding)
                place += size
            tensors[name] = Packed(codec, tuple(shape), dtype, options, found)
        if place + CHECKSUM_BYTES != len(content):
            raise InputError(f"{path} is damaged: its parts do not fill it")
        return told["header"], tensors


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in errors about its content; its checksum may fit although something else wrote it."""
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path} is damaged: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, zlib.error) as error:
        raise InputError(
            f"{path} is damaged: its header and its content do not fit ({type(error).__name__})"
        ) from error


def _check_plain(value: Any, place: str) -> None:
    """Refuse values that JSON would change."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InputError(f"{place} has the key {key!r}: keys must be text")
            _check_plain(inner, f"{place}[{key!r}]")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_plain(inner, f"{place}[{number}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise InputError(f"{place} is a {type(value).__name__}: give str, int, float, bool, None, list or dict")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{place} is {value}, which JSON cannot store: give a finite number")
