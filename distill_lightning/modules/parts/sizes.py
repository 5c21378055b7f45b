"""Features of different shapes: their grids, their channels, and how their sizes are brought together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from distill_lightning.choices import Choice
from distill_lightning.errors import InputError


def grid_of(shape: Sequence[int]) -> tuple[int, ...]:
    """All after the channels of ``(N, C, H, W)``, length of ``(N, L, C)``; a feature ``(N, C)`` has neither.

    Args:
        shape: of a feature.

    Example:
        >>> from distill_lightning.modules.parts.sizes import grid_of
        >>> grid_of((8, 64, 7, 5)), grid_of((8, 196, 64)), grid_of((8, 64))
        ((7, 5), (196,), ())
    """
    return tuple(shape[2:] if len(shape) > 3 else shape[1:-1])


def channels_of(shape: Sequence[int]) -> int:
    """Channels of a feature: the second dimension of ``(N, C, H, W)``, the last of ``(N, C)`` or ``(N, L, C)``.

    Args:
        shape: of the feature.

    Example:
        >>> from distill_lightning.modules.parts.sizes import channels_of
        >>> channels_of((8, 64, 7, 5)), channels_of((8, 196, 64)), channels_of((8, 64))
        (64, 64, 64)
    """
    return shape[1] if len(shape) > 3 else shape[-1]


def resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """A feature map at another size: averages where it is smaller, else bilinear.

    Args:
        feature: ``(N, C, H, W)``.
        size: rows and columns of the result.

    Example:
        >>> import torch
        >>> from distill_lightning.modules.parts.sizes import resized
        >>> feature = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> resized(feature, (1, 2))
        tensor([[[[2., 3.]]]])
    """
    rows, columns = size
    if rows <= feature.shape[2] and columns <= feature.shape[3]:
        return F.adaptive_avg_pool2d(feature, (rows, columns))
    return F.interpolate(feature, size=(rows, columns), mode="bilinear", align_corners=False)


class Sizes(Choice):
    """At which rows and columns a translated student feature and a teacher's are compared."""

    pooled: int | None = None
    """Rows and columns that every teacher's feature is pooled to before it is kept or compared."""

    @abstractmethod
    def __call__(self, translated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both at one size."""

    def check(self, student: Sequence[int], teacher: Sequence[int], where: str) -> None:
        """Look whether two features, of these shapes, can be brought to one size.

        Args:
            student: of the student's feature, ``(N, C, H, W)``.
            teacher: of the teacher's.
            where: whose they are, for the message.

        Raises:
            InputError: they cannot.
        """
        if grid_of(student) != grid_of(teacher) and (len(student) != 4 or len(teacher) != 4):
            raise _mismatch(where)


@dataclass(frozen=True)
class EqualSizes(Sizes):
    """The sizes must be equal.

    Example:
        >>> import torch
        >>> from distill_lightning import EqualSizes
        >>> student, teacher = EqualSizes()(torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4))
        >>> student.shape == teacher.shape
        True
    """

    def __call__(self, translated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are.

        Raises:
            InputError: the sizes differ.
        """
        self.check(translated.shape, target.shape, f"features {tuple(translated.shape)} and {tuple(target.shape)}")
        return translated, target

    def check(self, student: Sequence[int], teacher: Sequence[int], where: str) -> None:
        """Refuse different sizes."""
        if grid_of(student) != grid_of(teacher):
            raise _mismatch(where)


@dataclass(frozen=True)
class TeacherSize(Sizes):
    """The teacher's: the translated feature is averaged down to it, or interpolated up.

    Example:
        >>> import torch
        >>> from distill_lightning import TeacherSize
        >>> student, teacher = TeacherSize()(torch.zeros(2, 8, 8, 8), torch.zeros(2, 8, 4, 4))
        >>> student.shape, teacher.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 8, 4, 4]))
    """

    def __call__(self, translated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The translated feature at the target's size."""
        if grid_of(translated.shape) == grid_of(target.shape):
            return translated, target
        return resized(translated, target.shape[2:]), target


@dataclass(frozen=True)
class StudentSize(Sizes):
    """The student's: the teacher's feature is averaged down to it, or interpolated up.

    Example:
        >>> import torch
        >>> from distill_lightning import StudentSize
        >>> student, teacher = StudentSize()(torch.zeros(2, 8, 8, 8), torch.zeros(2, 8, 4, 4))
        >>> student.shape, teacher.shape
        (torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8]))
    """

    def __call__(self, translated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The target at the translated feature's size."""
        if grid_of(translated.shape) == grid_of(target.shape):
            return translated, target
        return translated, resized(target, translated.shape[2:])


@dataclass(frozen=True)
class PooledSize(Sizes):
    """A smaller one, to which both are brought by adaptive average pooling; a store shrinks with it.

    Args:
        pooled: rows and columns.

    Raises:
        InputError: the size is not positive; from `check`: it is larger than a feature map.

    Example:
        >>> import torch
        >>> from distill_lightning import PooledSize
        >>> student, teacher = PooledSize(2)(torch.zeros(2, 8, 8, 8), torch.zeros(2, 8, 2, 2))
        >>> student.shape, teacher.shape
        (torch.Size([2, 8, 2, 2]), torch.Size([2, 8, 2, 2]))
    """

    pooled: int = 1

    def __post_init__(self) -> None:
        """Check the size."""
        if self.pooled < 1:
            raise InputError(f"PooledSize: pooled must be at least 1, got {self.pooled}")

    def __call__(self, translated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both pooled; the target has been before."""
        return F.adaptive_avg_pool2d(translated, (self.pooled, self.pooled)), target

    def check(self, student: Sequence[int], teacher: Sequence[int], where: str) -> None:
        """Refuse a feature that is not a map, or is smaller than the size."""
        for who, shape in (("student's", student), ("teacher's", teacher)):
            if len(shape) != 4 or min(shape[2:]) < self.pooled:
                raise InputError(
                    f"{where}: PooledSize({self.pooled}) needs feature maps at least as large, and the {who} is "
                    f"{tuple(shape[1:])}: lower it, or tap another layer"
                )


def _mismatch(where: str) -> InputError:
    return InputError(f"{where}: tap layers of the same spatial size, or set sizes: TeacherSize or StudentSize")
