"""Packing a tensor into bytes, and unpacking it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_lightning.compression.access.computed import Stored
from distill_lightning.compression.file.bits import Bytes, pack_bits, unpack_bits
from distill_lightning.compression.values.codebook import distinct_values
from distill_lightning.compression.values.hashed import hash_places, hashed_weight
from distill_lightning.compression.values.scheme import Codes, Scheme, dequantize
from distill_lightning.errors import InputError, check_one_of

Coding = Literal["plain", "deflate", "huffman"]
# Without the header and checksum of zlib: the file has its own.
_RAW = -15
# The most values that a codebook has.
_CODEBOOK = 256

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip


def inflate(content: bytes, largest: int, *, wbits: int = zlib.MAX_WBITS) -> bytes:
    """Bytes that zlib has deflated, if they are not more than expected: a few may stand for a thousand times as many.

    Args:
        content: the deflated bytes.
        largest: how many there may be.
        wbits: as in ``zlib.decompress``.

    Raises:
        InputError: there are more.
        zlib.error: the bytes are damaged.
    """
    reader = zlib.decompressobj(wbits)
    plain = reader.decompress(content, largest + 1)
    if len(plain) > largest:
        raise InputError(f"{len(content):,} deflated bytes stand for more than {largest:,}")
    if not reader.eof:
        raise zlib.error("the deflated bytes are not complete")
    return plain


@dataclass(frozen=True)
class Part:
    """A part of a packed tensor's bytes.

    Attributes:
        content: the bytes.
        number: how many numbers these hold.
        bits: bits of each number.
        coding: how the bytes are coded; ``"huffman"`` (zlib's, without a search for repetitions) codes the numbers if
            8 is not a multiple of their bits, and otherwise the bytes.
    """

    content: bytes
    number: int
    bits: int
    coding: Coding = "plain"

    @property
    def nbytes(self) -> int:
        """How many bytes there are without their coding."""
        return -(-self.number * self.bits // 8)

    def plain(self) -> bytes:
        """The bytes without their coding."""
        if self.coding == "deflate":
            return inflate(self.content, self.nbytes)
        if self.coding == "huffman":
            symbols = np.frombuffer(inflate(self.content, self._symbols(), wbits=_RAW), np.uint8)
            return pack_bits(symbols, self._symbol_bits())
        return self.content

    def encoded(self, coding: Coding) -> Part:
        """The same part in another coding, if that makes it smaller."""
        check_one_of("coding", coding, ("deflate", "huffman"))
        content = self.plain()
        if coding == "deflate":
            coded = zlib.compress(content, 9)
        else:
            coder = zlib.compressobj(9, wbits=_RAW, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
            symbols = unpack_bits(content, self._symbol_bits(), self._symbols())
            coded = coder.compress(symbols.tobytes()) + coder.flush()
        better = len(coded) < len(content)
        return replace(self, content=coded if better else content, coding=coding if better else "plain")

    def integers(self) -> Bytes:
        """The numbers, if they have up to 8 bits."""
        return unpack_bits(self.plain(), self.bits, self.number)

    def _symbol_bits(self) -> int:
        return self.bits if 0 < self.bits < 8 and 8 % self.bits else 8

    def _symbols(self) -> int:
        return -(-self.number * self.bits // self._symbol_bits())


@dataclass(frozen=True)
class Packed:
    """A tensor's bytes and their meaning.

    Attributes:
        codec: ``"dense"``, ``"codes"``, ``"codebook"``, ``"hashed"``, ``"bitmask"`` or ``"csr"``.
        shape: shape of the tensor.
        dtype: type of the tensor, by PyTorch's name for it.
        options: further values that the codec needs, in plain types.
        parts: its bytes by name.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, without what a file needs to tell them apart."""
        return sum(len(part.content) for part in self.parts.values())


def pack_dense(tensor: Tensor) -> Packed:
    """Pack a tensor as it is.

    Raises:
        InputError: its type cannot be stored.
    """
    return Packed("dense", tuple(tensor.shape), _name_of(tensor.dtype), {}, {"values": _raw(tensor)})


def pack_codes(codes: Codes, scheme: Scheme, *, dtype: torch.dtype | None = None, sparse: bool = False) -> Packed:
    """Pack a quantized tensor: its codes with the bits that they have, and the scales in their own type.

    Args:
        codes: codes of the scheme.
        scheme: the scheme with which they were made.
        dtype: type of the unpacked tensor; ``None`` for that of the scales.
        sparse: whether to leave out the codes of zeros, and to store a bit for each entry instead.

    Raises:
        InputError: ``sparse`` is set, but rows have different codes of zero.
    """
    first = float(codes.zero_points.flatten()[0])
    values = codes.values.short() - scheme.lowest
    parts = {"scales": _raw(codes.scales)}
    if sparse:
        if not has_one_zero(codes):
            raise InputError("rows with different codes of zero cannot be stored as sparse: leave sparse out")
        present = codes.values != first
        parts["mask"] = _small(present, 1)
        values = values[present]
    parts["codes"] = _small(values, scheme.bits)
    options: dict[str, Any] = {
        "scheme": scheme.describe(),
        "scales": [_name_of(codes.scales.dtype), *codes.scales.shape],
    }
    if bool((codes.zero_points == first).all()):
        options["zero_point"] = first
    else:
        parts["zero_points"] = _small(codes.zero_points, scheme.bits)
    return Packed("codes", tuple(codes.values.shape), _name_of(dtype or codes.scales.dtype), options, parts)


def has_one_zero(codes: Codes) -> bool:
    """Whether zero has the same code in all rows."""
    first = codes.zero_points.flatten()[0]
    return bool((codes.zero_points == first).all()) and float(first).is_integer()


def pack_codebook(indices: Tensor, centroids: Tensor) -> Packed:
    """Pack a tensor of few values: ``ceil(n * ceil(log2(k)) / 8)`` bytes of indices, and the ``k`` values.

    Args:
        indices: the index of each entry's value, any shape.
        centroids: the values ``(k,)``, at most 256.

    Raises:
        InputError: there are more than 256 values.
    """
    bits = max(len(centroids) - 1, 0).bit_length()
    parts = {"indices": _small(indices, bits), "centroids": _raw(centroids)}
    return Packed("codebook", tuple(indices.shape), _name_of(centroids.dtype), {}, parts)


def pack_shared(tensor: Tensor) -> Packed:
    """Pack a tensor by its different values, like `pack_codebook`.

    Raises:
        InputError: it has more than 256 different values.
    """
    centroids, indices = distinct_values(tensor.detach())
    if len(centroids) > 256:
        raise InputError(
            f"a codebook has at most 256 values, but this tensor has {len(centroids)}: share its values first"
        )
    return pack_codebook(indices, centroids)


def pack_hashed(values: Tensor, shape: Sequence[int], seed: int) -> Packed:
    """Pack a tensor whose entries share values by a hash of their places: only the values, see `Hashed`.

    Args:
        values: ``(k,)``.
        shape: shape of the tensor.
        seed: seed of the hash.

    Raises:
        InputError: the values are not one-dimensional or empty, or the seed is out of range.
    """
    if values.ndim != 1:
        raise InputError(f"the values of a hashed tensor have one dimension, got shape {tuple(values.shape)}")
    hash_places(0, len(values), seed)
    return Packed("hashed", tuple(shape), _name_of(values.dtype), {"seed": seed}, {"values": _raw(values)})


def pack_bitmask(tensor: Tensor, values: Packed | None = None) -> Packed:
    """Pack a tensor with zeros: a bit per entry, and the non-zero entries. A negative zero comes back as zero.

    Args:
        tensor: a tensor of any shape.
        values: the non-zero entries in their order, ``(nnz,)``, already packed; ``None`` to store them as they are.

    Raises:
        InputError: the number of ``values`` is wrong.
    """
    present = tensor.detach() != 0
    return _sparse("bitmask", tensor, values, {"mask": _small(present, 1)})


def pack_csr(tensor: Tensor, values: Packed | None = None) -> Packed:
    """Pack a tensor with zeros: the non-zero entries, their columns, and the beginning of each row (first dimension).

    Both kinds of indices have the smallest sufficient type, of 1, 2 or 4 bytes.

    Args:
        tensor: a tensor of any shape; the dimensions after the first are columns.
        values: see `pack_bitmask`.

    Raises:
        InputError: see `pack_bitmask`.
    """
    rows = (tensor.detach() != 0).reshape(max(_rows_of(tensor.shape), 1), -1).cpu().numpy()
    begins = np.concatenate([[0], rows.sum(axis=1).cumsum()])
    columns = np.nonzero(rows)[1]
    parts = {"rows": _unsigned(begins, int(begins[-1])), "columns": _unsigned(columns, rows.shape[1])}
    return _sparse("csr", tensor, values, parts)


def pack_stored(stored: Stored) -> list[Packed]:
    """Pack what a computed weight says of itself (`ComputedWeight.stored`), in every form that there is for it."""
    if stored.codec == "codebook":
        return [pack_codebook(**stored.content)]
    if stored.codec == "hashed":
        return [pack_hashed(**stored.content)]
    ways = (False, True) if has_one_zero(stored.content["codes"]) else (False,)
    return [pack_codes(**stored.content, sparse=sparse) for sparse in ways]


def encode(packed: Packed, coding: Coding) -> Packed:
    """Deflate or Huffman-code those parts of a packed tensor that become smaller.

    Args:
        packed: the packed tensor, which is left as it is.
        coding: ``"deflate"`` or ``"huffman"``.

    Raises:
        InputError: the coding is unknown.
    """
    return replace(packed, parts={name: part.encoded(coding) for name, part in packed.parts.items()})


def unpacked_bytes(packed: Packed) -> int:
    """How many bytes a tensor takes once it is unpacked, or its parts without their coding, if these are more.

    Raises:
        InputError: there are sizes that no tensor has, or more numbers than the tensor can need.
    """
    sizes = [*packed.shape, *(size for part in packed.parts.values() for size in (part.number, part.bits))]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise InputError("a packed tensor's sizes are no numbers of entries")
    entries = math.prod(packed.shape)
    # A codebook may be larger than a tiny tensor, and compressed rows begin at a place each.
    most = entries + sum(packed.shape) + _CODEBOOK
    if any(part.number > most or part.bits > 64 for part in packed.parts.values()):
        raise InputError(f"a packed tensor of shape {packed.shape} has more numbers than it has entries")
    return max(entries * dtype_named(packed.dtype).itemsize, sum(part.nbytes for part in packed.parts.values()))


def unpack(packed: Packed) -> Tensor:
    """Unpack a tensor, which owns its memory.

    Raises:
        InputError: the codec is unknown, or the parts are not those of such a tensor.
    """
    dtype = dtype_named(packed.dtype)
    if packed.codec == "dense":
        return _from_raw(packed.parts["values"], packed.shape, dtype)
    if packed.codec == "codes":
        return dequantize(*unpack_codes(packed), dtype=dtype)
    if packed.codec == "codebook":
        part = packed.parts["centroids"]
        indices = _from_small(packed.parts["indices"], packed.shape)
        return _from_raw(part, (part.number,), dtype)[indices.long()]
    if packed.codec == "hashed":
        part = packed.parts["values"]
        places = hash_places(math.prod(packed.shape), part.number, packed.options["seed"])
        return hashed_weight(_from_raw(part, (part.number,), dtype), places, packed.shape)
    if packed.codec in ("bitmask", "csr"):
        present = _places(packed)
        if packed.options["number"] != int(present.sum()):
            raise InputError(f"a packed tensor has {packed.options['number']} values for {int(present.sum())} places")
        tensor = torch.zeros(packed.shape, dtype=dtype)
        values = unpack(_nested(packed))
        tensor[present] = values
        return tensor
    raise InputError(f"packed by the unknown codec {packed.codec!r}: a newer version of this package reads it")


def unpack_codes(packed: Packed) -> tuple[Codes, Scheme]:
    """The integer codes of a tensor that `pack_codes` packed, and their scheme."""
    if packed.codec != "codes":
        raise InputError(f"a tensor packed as {packed.codec!r} has no codes")
    scheme = Scheme(**packed.options["scheme"])
    name, *shape = packed.options["scales"]
    scales = _from_raw(packed.parts["scales"], tuple(shape), dtype_named(name))
    if "zero_point" in packed.options:
        zero_points = torch.full_like(scales, packed.options["zero_point"])
    else:
        zero_points = _from_small(packed.parts["zero_points"], tuple(shape)).to(scales.dtype)
    part = packed.parts["codes"]
    if "mask" in packed.parts:
        present = _from_small(packed.parts["mask"], packed.shape).bool()
        values = torch.full(packed.shape, int(packed.options["zero_point"]), dtype=torch.int16)
        values[present] = _from_small(part, (int(present.sum()),)).short() + scheme.lowest
    else:
        values = _from_small(part, packed.shape).short() + scheme.lowest
    return Codes(values.to(torch.int8 if scheme.lowest < 0 else torch.uint8), scales, zero_points), scheme


def dtype_named(name: str) -> torch.dtype:
    """PyTorch's type with a name.

    Raises:
        InputError: there is no such type, or it cannot be stored.
    """
    if name not in _DTYPES:
        raise InputError(f"numbers of type {name!r} cannot be stored: convert to one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    dtype_named(name)
    return name


def _raw(tensor: Tensor) -> Part:
    """A tensor's own bytes, in little endian as on every machine that PyTorch runs on."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    return Part(content, len(flat), 8 * flat.element_size())


def _from_raw(part: Part, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    content = part.plain()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise InputError(f"a packed tensor of shape {shape} and type {dtype} has {len(content)} bytes")
    if not content:
        return torch.empty(shape, dtype=dtype)
    # A new bytearray, to which nothing else refers.
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def _small(values: Tensor, bits: int) -> Part:
    flat: NDArray[Any] = values.detach().cpu().reshape(-1).to(torch.int32).numpy()
    return Part(pack_bits(flat, bits), len(flat), bits)


def _from_small(part: Part, shape: tuple[int, ...]) -> Tensor:
    if part.number != math.prod(shape):
        raise InputError(f"a packed tensor of shape {shape} has {part.number} integers")
    return torch.from_numpy(part.integers()).reshape(shape)


def _unsigned(values: NDArray[Any], largest: int) -> Part:
    kind = np.dtype(next(kind for kind in ("<u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(kind).max))
    return Part(values.astype(kind).tobytes(), len(values), 8 * kind.itemsize)


def _from_unsigned(part: Part) -> NDArray[np.int64]:
    values = np.frombuffer(part.plain(), f"<u{part.bits // 8}").astype(np.int64)
    if len(values) != part.number:
        raise InputError(f"{part.number} packed indices were announced, but there are {len(values)}")
    return values


def _sparse(codec: str, tensor: Tensor, values: Packed | None, parts: dict[str, Part]) -> Packed:
    entries = tensor.detach().reshape(-1)
    number = int((entries != 0).sum())
    values = pack_dense(entries[entries != 0]) if values is None else values
    if values.shape != (number,):
        raise InputError(f"{number} entries are not zero, but the packed values have shape {values.shape}")
    options = {"codec": values.codec, "dtype": values.dtype, "options": values.options}
    inner = {f"values.{name}": part for name, part in values.parts.items()}
    return Packed(codec, tuple(tensor.shape), values.dtype, {"values": options, "number": number}, {**parts, **inner})


def _nested(packed: Packed) -> Packed:
    told: Mapping[str, Any] = packed.options["values"]
    prefix = "values."
    parts = {name.removeprefix(prefix): part for name, part in packed.parts.items() if name.startswith(prefix)}
    return Packed(told["codec"], (packed.options["number"],), told["dtype"], told["options"], parts)


def _places(packed: Packed) -> Tensor:
    """Which entries of a sparse tensor are stored, bool in its shape."""
    if packed.codec == "bitmask":
        return _from_small(packed.parts["mask"], packed.shape).bool()
    begins, columns = _from_unsigned(packed.parts["rows"]), _from_unsigned(packed.parts["columns"])
    rows = max(_rows_of(packed.shape), 1)
    width = math.prod(packed.shape) // rows
    sizes = np.diff(begins)
    if len(sizes) != rows or bool((sizes < 0).any()) or sizes.sum() != len(columns) or bool((columns >= width).any()):
        raise InputError("the indices of a packed sparse tensor do not fit its shape")
    present = np.zeros((rows, width), np.bool_)
    present[np.repeat(np.arange(rows), sizes), columns] = True
    return torch.from_numpy(present).reshape(packed.shape)


def _rows_of(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1
