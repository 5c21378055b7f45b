"""Quantized tensors: integer codes, with a scale and a zero point for every group of entries.

Shapes: a tensor is treated as ``R`` rows of ``L`` entries with ``G`` groups in each row. Per tensor there is one row
with one group, per channel one row for each channel, and per group of ``n`` each row is cut into groups of ``n``, the
last of which may be shorter. Scales and zero points are ``(R, G)``.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide

Kind = Literal["symmetric", "affine", "pow2", "dorefa", "binary", "binaryconnect", "ternary", "ttq"]

UNIFORM: tuple[Kind, ...] = ("symmetric", "affine", "pow2")
"""Kinds with equally wide levels, of any number of bits."""
FIXED_BITS = {"binary": 1, "binaryconnect": 1, "ternary": 2, "ttq": 2}
"""The kinds with a fixed number of bits."""
WHOLE_TENSOR = ("dorefa", "binaryconnect", "ttq")
"""Kinds with one scale for the whole tensor."""
WITHOUT_ZERO = ("binary", "binaryconnect", "dorefa")
"""Kinds without a level at zero."""
_GROUP = re.compile(r"group:([1-9]\d*)")


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized, in plain values.

    Args:
        bits: bits of a code: 2 to 8; 1 for the binary kinds, 2 for the ternary ones.
        kind: ``"symmetric"`` (levels on both sides of zero, as many on each: ``-2 ** (bits - 1)`` is never used),
            ``"affine"`` (codes from 0, with a zero point), ``"pow2"`` (symmetric, every scale a power of two),
            ``"dorefa"``, ``"binary"`` (BWN), ``"binaryconnect"``, ``"ternary"`` (TWN), ``"ttq"``.
        per: what has its own scale: ``"tensor"``, ``"channel"`` or ``"group:n"``.
        axis: axis of the channels: 0, or 1 for transposed convolutions.
        groups: groups of channels, of which axis 1 holds the channels of one, and axis 0 the inputs of all: those of a
            grouped transposed convolution.

    Raises:
        InputError: a value is invalid, or ``per`` is given although the kind has one scale for the whole tensor.
    """

    bits: int = 8
    kind: Kind = "symmetric"
    per: str = "channel"
    axis: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, get_args(Kind))
        fixed = FIXED_BITS.get(self.kind)
        if fixed is not None and self.bits != fixed:
            raise InputError(f"kind={self.kind!r} has codes of {fixed} bit: give bits={fixed}, not {self.bits}")
        if fixed is None and self.bits not in range(2, 9):
            raise InputError(f"bits must be 2 to 8, got {self.bits}: for 1 bit use kind='binary'")
        if self.per not in ("tensor", "channel") and not _GROUP.fullmatch(self.per):
            raise InputError(f"per must be 'tensor', 'channel' or 'group:n' such as 'group:32', got {self.per!r}")
        if self.kind in WHOLE_TENSOR and self.per != "tensor":
            raise InputError(f"kind={self.kind!r} has one scale for a whole tensor: give per='tensor'")
        if self.axis not in (0, 1):
            raise InputError(f"axis must be 0 or 1, got {self.axis}")
        if self.groups < 1 or (self.groups > 1 and self.axis == 0):
            raise InputError(
                f"groups={self.groups} is for axis=1, and at least 1: along axis 0 lie the channels of all"
            )

    @property
    def group(self) -> int | None:
        """Number of entries in a group; ``None`` if rows are not cut."""
        match = _GROUP.fullmatch(self.per)
        return int(match[1]) if match else None

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -self.highest if self.kind in ("symmetric", "pow2", "ternary", "ttq") else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        if self.kind in ("symmetric", "pow2", "ternary", "ttq"):
            return int(2 ** (self.bits - 1) - 1)
        return int(2**self.bits - 1)

    def describe(self) -> dict[str, Any]:
        """The arguments from which this scheme can be made again."""
        return asdict(self)


class Codes(NamedTuple):
    """A quantized tensor, see `dequantize`.

    Attributes:
        values: the codes, in the tensor's shape: uint8 where none is negative, else int8.
        scales: ``(R, G)``; of kind ``"ttq"`` ``(2, 1)``: those of the positive and of the negative codes.
        zero_points: ``(R, G)``, the code of zero, in the scales' type. In binary kinds and DoReFa it lies between two
            codes, because they have no zero.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor


def to_rows(tensor: Tensor, scheme: Scheme) -> Tensor:
    """Reshape a tensor to rows ``(R, L)``.

    Raises:
        InputError: the scheme is per channel or group, but the tensor has only one dimension.
    """
    if scheme.per == "tensor":
        return tensor.reshape(1, -1)
    if tensor.ndim < 2:
        raise InputError(f"per={scheme.per!r} needs channels, got shape {tuple(tensor.shape)}: give per='tensor'")
    if scheme.axis == 0:
        return tensor.flatten(1)
    # (groups, inputs of one, channels of one, ...) to (groups, channels of one, inputs of one, ...)
    grouped = tensor.reshape(scheme.groups, len(tensor) // scheme.groups, *tensor.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def from_rows(rows: Tensor, shape: torch.Size, scheme: Scheme) -> Tensor:
    """The inverse of `to_rows`: reshape ``(R, L)`` to the tensor's shape."""
    if scheme.per == "tensor":
        return rows.reshape(shape)
    if scheme.axis == 0:
        return rows.reshape(shape).contiguous()
    inputs, channels, *kernel = shape
    grouped = rows.reshape(scheme.groups, channels, inputs // scheme.groups, *kernel)
    return grouped.transpose(1, 2).reshape(shape).contiguous()


def cut_groups(rows: Tensor, scheme: Scheme) -> list[Tensor]:
    """The groups of ``(R, L)``, stacked by their length: ``(R * full groups, n)`` and, if any, ``(R, rest)``."""
    size = scheme.group
    if size is None or size >= rows.shape[1]:
        return [rows]
    whole = rows.shape[1] // size * size
    return [rows[:, :whole].reshape(-1, size), *([rows[:, whole:]] if whole < rows.shape[1] else [])]


def over_entries(per_group: Tensor, length: int, scheme: Scheme) -> Tensor:
    """Repeat ``(R, G)`` over the entries of the groups, so that it broadcasts with ``(R, L)``."""
    size = scheme.group
    return per_group if size is None else per_group.repeat_interleave(size, dim=1)[:, :length]


def grid(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The scale and zero point of a range, which is first widened to include zero.

    Args:
        low: smallest values, any shape.
        high: largest values, the same shape.
        scheme: ``"symmetric"``, ``"affine"`` or ``"pow2"``, whose scale is rounded up, so nothing is clipped.

    Returns:
        Scale and zero point, two tensors of that shape. An empty range has scale 1.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    reach = high - low if scheme.kind == "affine" else torch.maximum(-low, high)
    scale = reach / (scheme.highest - (scheme.lowest if scheme.kind == "affine" else 0))
    if scheme.kind == "pow2":
        mantissa, exponent = torch.frexp(scale)
        # A power of two has mantissa 0.5, and is not rounded up.
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    scale = torch.where(reach > 0, scale.clamp_min(torch.finfo(scale.dtype).tiny), 1)
    if scheme.kind != "affine":
        return scale, torch.zeros_like(scale)
    return scale, (scheme.lowest - low / scale).round().clamp(scheme.lowest, scheme.highest)


class _FakeQuantize(torch.autograd.Function):
    """Rounding to a grid, with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        steps = (rows / scale).round()
        ctx.save_for_backward((steps >= low) & (steps <= high))
        # Plus zero: -0.0 after rounding has the same code as 0.0.
        return (steps.clamp(low, high) + 0.0) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def fake_quantize(tensor: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    r"""Round a tensor to a grid, in its own type.

    .. math:: s \cdot \big( \mathrm{clip}(\lfloor x / s \rceil + z, q_{min}, q_{max}) - z \big)

    The gradient is straight-through: 1 where the rounded value is a level, 0 where it was clipped.

    Args:
        tensor: a tensor of any shape.
        scale: ``(R, G)``.
        zero_point: ``(R, G)``, integers.
        scheme: a uniform scheme.
    """
    rows = to_rows(wide(tensor), scheme)
    scale = over_entries(scale, rows.shape[1], scheme)
    zero_point = over_entries(zero_point, rows.shape[1], scheme)
    levels: Tensor = _FakeQuantize.apply(rows, scale, scheme.lowest - zero_point, scheme.highest - zero_point)
    return from_rows(levels, tensor.shape, scheme).to(tensor.dtype)


def quantize(tensor: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Codes:
    """The codes of a tensor on a given grid; `dequantize` of them equals `fake_quantize`, bit for bit.

    Args:
        tensor: a tensor of any shape.
        scale: ``(R, G)``.
        zero_point: ``(R, G)``, integers.
        scheme: a uniform scheme.
    """
    rows = to_rows(wide(tensor.detach()), scheme)
    steps = (rows / over_entries(scale, rows.shape[1], scheme)).round()
    values = (steps + over_entries(zero_point, rows.shape[1], scheme)).clamp(scheme.lowest, scheme.highest)
    return Codes(as_codes(from_rows(values, tensor.shape, scheme), scheme), scale.detach(), zero_point.detach())


def as_codes(values: Tensor, scheme: Scheme) -> Tensor:
    """Convert integers to the type of this scheme's codes."""
    return values.to(torch.int8 if scheme.lowest < 0 else torch.uint8)


def dequantize(codes: Codes, scheme: Scheme, *, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that codes represent, ``(code - zero point) * scale``.

    Args:
        codes: codes of the scheme.
        scheme: the scheme with which they were made.
        dtype: type of the result; ``None`` for that of the scales.
    """
    rows = to_rows(codes.values.to(codes.scales.dtype), scheme)
    if scheme.kind == "ttq":
        scale = torch.where(rows > 0, codes.scales[0], codes.scales[1])
        return from_rows(rows * scale, codes.values.shape, scheme).to(dtype or codes.scales.dtype)
    length = rows.shape[1]
    levels = (rows - over_entries(codes.zero_points, length, scheme)) * over_entries(codes.scales, length, scheme)
    return from_rows(levels, codes.values.shape, scheme).to(dtype or codes.scales.dtype)
