"""Dense packing of small integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import InputError

Bytes = NDArray[np.uint8]


def pack_bits(values: NDArray[Any], bits: int) -> bytes:
    """Pack integers without gaps, lowest bit first.

    Args:
        values: ``(n,)``, each from 0 to ``2 ** bits - 1``.
        bits: bits of each integer, 0 to 8; with 0 every value is 0 and nothing is written.

    Returns:
        ``ceil(n * bits / 8)`` bytes, the last of which is filled with zero bits.

    Raises:
        InputError: a value does not fit, or the number of bits is out of range.
    """
    if bits not in range(9):
        raise InputError(f"packed integers have 0 to 8 bits, got {bits}")
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise InputError(f"integers from {values.min()} to {values.max()} do not fit into {bits} bits")
    narrow = values.astype(np.uint8)
    if bits == 8:
        return narrow.tobytes()
    if not bits:
        return b""
    each = np.unpackbits(narrow[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each, axis=None, bitorder="little").tobytes()


def unpack_bits(content: bytes, bits: int, number: int) -> Bytes:
    """Unpack the integers that `pack_bits` packed."""
    if len(content) != -(-number * bits // 8):
        raise InputError(f"{number} integers of {bits} bits are {-(-number * bits // 8)} bytes, got {len(content)}")
    raw = np.frombuffer(content, np.uint8)
    if bits == 8:
        return raw.copy()
    if not bits:
        return np.zeros(number, np.uint8)
    each = np.unpackbits(raw, count=number * bits, bitorder="little").reshape(number, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]
