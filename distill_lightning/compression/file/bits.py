"""Dense packing of small integers, and prefix codes for them."""

from __future__ import annotations

import heapq
import zlib
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import InputError

Bytes = NDArray[np.uint8]

_BLOCK = 1024
_LONGEST = 48


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
    """Unpack the integers that `pack_bits` packed.

    Args:
        content: the bytes.
        bits: bits of each integer.
        number: number of integers.

    Raises:
        InputError: the number of bytes is wrong.
    """
    if len(content) != -(-number * bits // 8):
        raise InputError(f"{number} integers of {bits} bits are {-(-number * bits // 8)} bytes, got {len(content)}")
    raw = np.frombuffer(content, np.uint8)
    if bits == 8:
        return raw.copy()
    if not bits:
        return np.zeros(number, np.uint8)
    each = np.unpackbits(raw, count=number * bits, bitorder="little").reshape(number, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


def huffman_lengths(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Lengths of an optimal prefix code, in bits.

    Args:
        counts: how often each symbol occurs, ``(symbols,)``.

    Returns:
        ``(symbols,)``, 0 for symbols that do not occur; a single symbol has 1 bit.
    """
    lengths = np.zeros(len(counts), np.int64)
    used = [int(symbol) for symbol in np.flatnonzero(counts)]
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    # Ties are broken by number, so that the code only depends on the counts.
    numbers = count()
    heap = [(int(counts[symbol]), next(numbers), [symbol]) for symbol in used]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        below = first[2] + second[2]
        lengths[below] += 1
        heapq.heappush(heap, (first[0] + second[0], next(numbers), below))
    return lengths


def huffman_encode(symbols: Bytes) -> bytes:
    """Encode symbols with a canonical Huffman code.

    The bytes are: the number of compressed bytes of the code lengths (2 bytes), the compressed lengths, the number of
    bits of each block of 1024 symbols (2 bytes each), and the bits. Blocks can be decoded side by side.

    Args:
        symbols: ``(n,)``.
    """
    if not len(symbols):
        return b""
    lengths = huffman_lengths(np.bincount(symbols, minlength=int(symbols.max()) + 1))
    table = zlib.compress(lengths.astype(np.uint8).tobytes(), 9)
    size = lengths[symbols]
    ends = size.cumsum()
    begins = ends - size
    codes = _canonical(lengths)[symbols]
    stream = np.zeros(int(ends[-1]), np.uint8)
    for place in range(int(lengths.max())):
        longer = size > place
        stream[begins[longer] + place] = codes[longer] >> (size[longer] - 1 - place) & 1
    blocks = np.add.reduceat(size, np.arange(0, len(symbols), _BLOCK)).astype("<u2")
    return len(table).to_bytes(2, "little") + table + blocks.tobytes() + np.packbits(stream).tobytes()


def huffman_decode(content: bytes, number: int) -> Bytes:
    """Decode the symbols that `huffman_encode` encoded.

    Args:
        content: the bytes.
        number: number of symbols.

    Raises:
        InputError: the bytes are not a code of that many symbols.
    """
    if not number:
        return np.zeros(0, np.uint8)
    begin = 2 + int.from_bytes(content[:2], "little")
    blocks = -(-number // _BLOCK)
    try:
        lengths = np.frombuffer(zlib.decompress(content[2:begin]), np.uint8).astype(np.int64)
        sizes = np.frombuffer(content[begin : begin + 2 * blocks], "<u2").astype(np.int64)
    except (zlib.error, ValueError) as error:
        raise InputError(f"a Huffman code is damaged: {error}") from error
    stream = np.frombuffer(content[begin + 2 * blocks :], np.uint8)
    if len(sizes) != blocks or len(stream) != -(-int(sizes.sum()) // 8) or not 0 < int(lengths.max()) <= _LONGEST:
        raise InputError("a Huffman code is damaged: its bytes do not match its symbols")
    return _decoded(lengths, sizes, stream, number)


def _decoded(lengths: NDArray[np.int64], sizes: NDArray[np.int64], stream: Bytes, number: int) -> Bytes:
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    # Left-justified, the words of a canonical code are in order: the last one that is not above the stream's next
    # bits is the one with which they begin.
    words = _canonical(lengths)[order].astype(np.uint64) << (64 - lengths[order]).astype(np.uint64)
    padded = np.concatenate([stream, np.zeros(8, np.uint8)])
    places = sizes.cumsum() - sizes
    result = np.zeros((len(sizes), min(_BLOCK, number)), np.uint8)
    for step in range(result.shape[1]):
        window = np.zeros(len(places), np.uint64)
        for byte in range(8):
            window = window << np.uint64(8) | padded[np.minimum((places >> 3) + byte, len(padded) - 1)]
        found = np.searchsorted(words, window << (places & 7).astype(np.uint64), side="right") - 1
        symbols = order[np.maximum(found, 0)]
        result[:, step] = symbols
        places = places + lengths[symbols]
    return result.reshape(-1)[:number].copy()


def _canonical(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The words of a canonical code: counted upwards by length, then by symbol."""
    words = np.zeros(len(lengths), np.int64)
    word, before = 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda one: (lengths[one], one)):
        word <<= int(lengths[symbol]) - before
        words[symbol] = word
        before = int(lengths[symbol])
        word += 1
    return words
