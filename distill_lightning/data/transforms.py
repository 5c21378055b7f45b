"""What is done to a training batch before its loss: samples are mixed, squares cut out, labels smoothed.

Whatever a transform draws for a row is a function of ``(seed, index, view)`` alone, as the views are. With partners
from the data module (``partners=True``) so is the whole transformed row, whatever the other rows, the order of the
batch or the number of processes. Without partners the rows of a batch are mixed with one another, so that a row depends
on which rows its batch has, but not on their order.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_lightning.choices import Choice
from distill_lightning.data.batch import IGNORED, Batch, Mixture, spread
from distill_lightning.data.mixing import beta_quantiles, beta_shares, cutmix_inputs, cutout_inputs, mixup_inputs
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.functional.self_distillation import hard_targets


class BatchTransform(Choice):
    """Makes one training batch of another; a subclass is a frozen dataclass of its options.

    Transforms are applied one after the other, on the device. They change no tensor in place and never wait for the
    device.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from distill_lightning import Batch
        >>> from distill_lightning.data.transforms import BatchTransform
        >>> @dataclass(frozen=True)
        ... class Brighter(BatchTransform):
        ...     by: float
        ...
        ...     def __call__(self, batch, *, num_classes):
        ...         return batch.replace(input=batch.input + self.by)
        >>> Brighter(0.5)(Batch(torch.zeros(2, 1)), num_classes=3).input.tolist()
        [[0.5], [0.5]]
    """

    changes_inputs: ClassVar[bool] = True
    """Whether the inputs are others afterwards; where not, what a teacher says about them stays true."""
    needs_classes: ClassVar[bool] = True
    """Whether the targets must be classes or distributions; where not, a regression's batches will do, too."""

    @abstractmethod
    def __call__(self, batch: Batch, *, num_classes: int) -> Batch:
        """The transformed batch.

        Args:
            batch: on any device.
            num_classes: ``K``; 0 of a regression.
        """


class _Mixing(BatchTransform):
    """Mixes each row with a second sample; a subclass defines `blend` and ``_stream``."""

    alpha: float
    probability: float
    seed: int
    # Keeps the draws apart from those of other transforms and of the views.
    _stream: ClassVar[int]

    def __post_init__(self) -> None:
        """Check the options."""
        name = type(self).__name__
        if not 0 < self.alpha < math.inf:
            raise InputError(f"{name}: alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.probability <= 1:
            raise InputError(f"{name}: probability must be in [0, 1], got {self.probability}")

    @abstractmethod
    def blend(self, first: Any, second: Any, share: Tensor, centre: Tensor) -> tuple[Any, Tensor]:
        """Mixed inputs, and the share of ``first`` that is really in them.

        Args:
            first: inputs of the rows.
            second: inputs of what is mixed in.
            share: the part of the first that is wanted, ``(N,)``.
            centre: a place in each image, in parts of height and width, ``(N, 2)``.
        """

    def __call__(self, batch: Batch, *, num_classes: int) -> Batch:
        """The mixed batch: its targets are mixed distributions, its ``mixture`` tells how.

        Raises:
            InputError: the inputs or the targets cannot be mixed, or the batch is mixed already and has no partners.
        """
        name, old = type(self).__name__, batch.mixture
        if old is not None and batch.partner is None:
            raise InputError(f"{name}: these rows are mixed already: give the data module partners=True to mix others")
        draws = batch.draws(self.seed + self._stream)
        chosen, level, *centre = draws.uniform(4).unbind(dim=1)
        first = _distributions(name, batch.target, num_classes)
        other = _next_rows(batch.replace(target=first), draws) if batch.partner is None else batch.partner
        second = _distributions(name, other.target, num_classes)
        stays = (chosen >= self.probability) | ~_mixable(batch, first) | ~_mixable(other, second)
        if old is not None:
            stays = stays | (old.share < 1)
        share = torch.where(stays, 1.0, beta_shares(_quantiles(self.alpha, level.device), level))
        inputs, share = self.blend(batch.input, other.input, share, torch.stack(centre, dim=1).float())
        mixture = Mixture(share, first, second, other.index)
        if old is not None:
            mixture = _joined(old, mixture)
        kept = mixture.share[:, None]
        return batch.replace(input=inputs, target=kept * mixture.first + (1 - kept) * mixture.second, mixture=mixture)


@dataclass(frozen=True)
class Mixup(_Mixing):
    r"""Mixup: inputs become :math:`\lambda x_1 + (1 - \lambda) x_2`, targets :math:`\lambda y_1 + (1 - \lambda) y_2`.

    What is mixed in is the row's partner, or another row of the batch if there are no partners. A row stays as it is,
    bit for bit, if it is not drawn, if it or its partner does not count, or if an earlier transform has mixed it; its
    share is then 1. So ``[Mixup(probability=0.5), CutMix(probability=1.0)]`` does one or the other.

    Args:
        alpha: of the distribution :math:`\mathrm{Beta}(\alpha, \alpha)` that the shares are drawn from; 1 is uniform.
        probability: of each row to be mixed.
        seed: of the draws.

    Raises:
        InputError: an option is out of range; or, when called, the inputs are not floating-point numbers, the
            targets neither classes nor distributions, or the batch is mixed already and has no partners.

    Zhang, Cisse, Dauphin, Lopez-Paz: *mixup: Beyond Empirical Risk Minimization*, https://arxiv.org/abs/1710.09412

    Example:
        >>> import torch
        >>> from distill_lightning import Batch, Mixup
        >>> batch = Batch(torch.eye(4), torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.zeros(4, dtype=torch.int64))
        >>> mixed = Mixup(alpha=0.2)(batch, num_classes=3)
        >>> mixed.target.shape, mixed.mixture.share.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    alpha: float = 1.0
    probability: float = 1.0
    seed: int = 0
    _stream: ClassVar[int] = 0x4D495855

    def blend(self, first: Any, second: Any, share: Tensor, centre: Tensor) -> tuple[Any, Tensor]:
        """Linear interpolation of every tensor of the inputs."""
        return mixup_inputs(first, second, share), share


@dataclass(frozen=True)
class CutMix(_Mixing):
    r"""CutMix: a rectangle of each image is that of a second one; the target is mixed by the shares of the pixels.

    Partners and untouched rows are chosen as in `Mixup`. Inputs that are not images are mixed linearly.

    Args:
        alpha: of the distribution :math:`\mathrm{Beta}(\alpha, \alpha)` that the shares are drawn from; 1 is uniform.
        probability: of each row to be mixed; the paper has 0.5 for CIFAR and 1 for ImageNet.
        seed: of the draws.

    Raises:
        InputError: an option is out of range; or, when called, none of the inputs is an image, the targets are
            neither classes nor distributions, or the batch is mixed already and has no partners.

    Yun et al.: *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features*,
    https://arxiv.org/abs/1905.04899

    Example:
        >>> import torch
        >>> from distill_lightning import Batch, CutMix
        >>> view = torch.zeros(4, dtype=torch.int64)
        >>> batch = Batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), torch.arange(4), view)
        >>> CutMix()(batch, num_classes=3).target.shape
        torch.Size([4, 3])
    """

    alpha: float = 1.0
    probability: float = 0.5
    seed: int = 0
    _stream: ClassVar[int] = 0x43555458

    def blend(self, first: Any, second: Any, share: Tensor, centre: Tensor) -> tuple[Any, Tensor]:
        """One rectangle of the second image in the first."""
        return cutmix_inputs(first, second, share, centre)


@dataclass(frozen=True)
class Cutout(BatchTransform):
    """Cutout: a square of each image is set to zero, the mean of normalised pixels; targets stay as they are.

    So the targets may be those of a regression. The images of partners lose a square, too, each by its own draws:
    before `Mixup` both samples are cut, after it the mixed image is.

    Args:
        size: pixels of the square's side; parts outside the image are cut off.
        seed: of the draws.

    Raises:
        InputError: ``size`` is not positive; or, when called, none of the inputs is an image.

    DeVries, Taylor: *Improved Regularization of Convolutional Neural Networks with Cutout*,
    https://arxiv.org/abs/1708.04552

    Example:
        >>> import torch
        >>> from distill_lightning import Batch, Cutout
        >>> batch = Batch(torch.ones(1, 1, 8, 8), torch.tensor([0]), torch.tensor([0]), torch.tensor([4]))
        >>> int((Cutout(size=2)(batch, num_classes=3).input == 0).sum())
        4
    """

    needs_classes: ClassVar[bool] = False

    size: int
    seed: int = 0
    _stream: ClassVar[int] = 0x4355544F

    def __post_init__(self) -> None:
        """Refuse a square without pixels."""
        if self.size < 1:
            raise InputError(f"Cutout: size must be at least 1 pixel, got {self.size}")

    def __call__(self, batch: Batch, *, num_classes: int) -> Batch:
        """The batch with a square less in each image.

        Raises:
            InputError: none of the inputs is an image.
        """
        return _with_partner(self._cut, batch)

    def _cut(self, batch: Batch) -> Batch:
        centre = batch.draws(self.seed + self._stream).uniform(2)
        return batch.replace(input=cutout_inputs(batch.input, self.size, centre))


@dataclass(frozen=True)
class LabelSmoothing(BatchTransform):
    r"""Label smoothing: targets become :math:`(1 - \epsilon) \, y + \epsilon / K`.

    Class indices become such distributions; distributions, and what a batch was mixed of, are smoothed. It does not
    matter whether samples are mixed before or afterwards. The target of a sample that is -100 becomes zeros.

    Args:
        epsilon: :math:`\epsilon` in ``[0, 1)``.

    Raises:
        InputError: ``epsilon`` is out of range; or, when called, the targets are neither classes nor distributions.

    Szegedy et al.: *Rethinking the Inception Architecture for Computer Vision*, https://arxiv.org/abs/1512.00567

    Example:
        >>> import torch
        >>> from distill_lightning import Batch, LabelSmoothing
        >>> batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]))
        >>> LabelSmoothing(0.5)(batch, num_classes=2).target
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    changes_inputs: ClassVar[bool] = False

    epsilon: float

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.epsilon < 1:
            raise InputError(f"LabelSmoothing: epsilon must be in [0, 1), got {self.epsilon}")

    def __call__(self, batch: Batch, *, num_classes: int) -> Batch:
        """The batch with smoothed targets.

        Raises:
            InputError: the targets are neither classes nor distributions.
        """
        return _with_partner(partial(self._smoothed, num_classes=num_classes), batch)

    def _smoothed(self, batch: Batch, *, num_classes: int) -> Batch:
        smooth = partial(
            _distributions, "LabelSmoothing", num_classes=num_classes, smoothing=self.epsilon, positions=True
        )
        mixture = batch.mixture
        if mixture is not None:
            mixture = mixture._replace(first=smooth(mixture.first), second=smooth(mixture.second))
        return batch.replace(target=smooth(batch.target), mixture=mixture)


def _with_partner(change: Callable[[Batch], Batch], batch: Batch) -> Batch:
    """The batch and its partner, both changed alike."""
    changed = change(batch)
    return changed if batch.partner is None else changed.replace(partner=change(batch.partner))


@lru_cache(maxsize=16)
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    """The table of `beta_quantiles` on a device, to which it is copied once."""
    return beta_quantiles(alpha).to(device)


def _next_rows(batch: Batch, draws: Draws) -> Batch:
    """For each row another one of the batch: the next in a drawn order, the first after the last.

    Every row is taken once, none by itself unless it is the only one, whatever order the batch is in.
    """
    order = draws.order()
    rows = torch.empty_like(order).scatter_(0, order, order.roll(-1))
    return batch.map(lambda values: values[rows]).replace(key=None)


def _distributions(
    name: str, target: Any, num_classes: int, *, smoothing: float = 0.0, positions: bool = False
) -> Tensor:
    """Targets as distributions ``(..., K)``, smoothed; those of -100 as zeros, which stay zeros when smoothed.

    Args:
        name: of who asks.
        target: class indices ``(N,)`` or distributions ``(N, K)``.
        num_classes: ``K``.
        smoothing: the part of each that is spread over all classes.
        positions: whether there may be one for each position, ``(N, T)`` or ``(N, T, K)``.

    Raises:
        InputError: they are neither classes nor distributions.
    """
    if isinstance(target, Tensor) and not target.is_floating_point() and (target.ndim == 1 or positions):
        classes = target.long()
        ignored = classes == IGNORED
        rows = hard_targets(classes.masked_fill(ignored, 0), num_classes, label_smoothing=smoothing)
        return rows.masked_fill(ignored[..., None], 0)
    fits = isinstance(target, Tensor) and (target.ndim == 2 or positions) and target.shape[-1:] == (num_classes,)
    if fits and target.is_floating_point():
        rows = wide(target)
        return (1 - smoothing) * rows + smoothing / num_classes * rows.sum(dim=-1, keepdim=True)
    got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    raise InputError(
        f"{name} needs classes (N,) or distributions (N, {num_classes}) as targets, got {got}: leave it out for others"
    )


def _mixable(batch: Batch, distributions: Tensor) -> Tensor:
    """Which rows can be mixed, ``(N,)``: those that count."""
    known = distributions.any(dim=1)
    return known if batch.counted is None else known & batch.counted


def _joined(old: Mixture, new: Mixture) -> Mixture:
    """Of rows that were mixed before how they were then, of the others how they are now."""
    before = old.share < 1

    def join(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(spread(before, one), one, other)

    index = None if old.index is None or new.index is None else join(old.index, new.index)
    return Mixture(join(old.share, new.share), join(old.first, new.first), join(old.second, new.second), index)
