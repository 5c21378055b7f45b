"""Measurements of what compression saves: bytes of files that can be read again.

Multiply-accumulates are counted in `macs`, time is measured in `latency`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_lightning.compression.access.calibration import inputs_of
from distill_lightning.compression.access.outputs import largest_difference
from distill_lightning.errors import InputError


class FileSize(NamedTuple):
    """A file that reproduces its network.

    Attributes:
        size: bytes of the file.
        deflated: its bytes after zlib's strongest compression.
        difference: the largest absolute difference of any output after reading it again; 0: bit-equal.
    """

    size: int
    deflated: int
    difference: float


def measure_file(
    path: Path,
    *,
    write: Callable[[Path], object],
    read: Callable[[Path], Callable[..., Any]],
    expected: Any,
    example_inputs: Any,
    tolerance: float = 0.0,
) -> FileSize:
    """Write a file, read it back, and measure it only if what was read gives the expected outputs.

    Args:
        path: where the file is written; not a folder.
        write: a function that writes the file.
        read: a function that makes a callable of the file (such as a network in eval mode), which shares nothing with
            what was written.
        expected: the outputs for ``example_inputs``: a tensor, or tuples, lists and dicts of tensors.
        example_inputs: a tensor, or a tuple of arguments.
        tolerance: the largest difference that counts as equal; 0 for formats that keep every bit.

    Returns:
        The file's size.

    Raises:
        InputError: nothing was written, or the outputs differ by more than the tolerance.
    """
    write(path)
    if not path.is_file():
        raise InputError(f"{path}: write() left no file there: write to the path that it is given")
    with torch.inference_mode():
        outputs = read(path)(*inputs_of(example_inputs))
    difference = _difference(path, outputs, expected)
    if difference > tolerance:
        raise InputError(
            f"{path} does not reproduce the network: outputs differ by up to {difference:.3g} after reading it again, "
            f"more than the tolerance {tolerance:.3g}"
        )
    content = path.read_bytes()
    return FileSize(len(content), len(zlib.compress(content, 9)), difference)


def _difference(path: Path, found: Any, expected: Any) -> float:
    """The largest absolute difference of any number in two structures."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            shape = getattr(found, "shape", type(found).__name__)
            raise InputError(f"{path} gives {shape} after reading it again, where {tuple(expected.shape)} is expected")
        return largest_difference(found, expected)
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and found.keys() == expected.keys():
        pairs = [(found[key], expected[key]) for key in expected]
    elif isinstance(expected, (tuple, list)) and isinstance(found, (tuple, list)) and len(found) == len(expected):
        pairs = list(zip(found, expected, strict=True))
    else:
        raise InputError(f"{path}: outputs must be tensors, or tuples, lists or dicts of them, alike before and after")
    return max((_difference(path, *pair) for pair in pairs), default=0.0)
