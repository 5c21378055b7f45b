"""How a student's feature is made comparable, and compared with a teacher's, as in FEED and in other papers."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.choices import Choice
from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import wide
from distill_lightning.layers import Translator
from distill_lightning.outputs import Output
from distill_lightning.teachers import Softened

# The smallest norm that a feature is divided by.
_EPS = 1e-6
_SLOPE = 0.1
_MANY_PARAMETERS = 50_000_000


class Translation(Choice):
    """The trainable map from the student's feature to a teacher's, thrown away after training.

    Attributes:
        shared: whether one translator serves all teachers, an ablation; they must have equal channel counts.
        maps_only: whether it takes feature maps ``(N, C, H, W)`` alone.
    """

    shared: bool
    maps_only: ClassVar[bool] = True

    @abstractmethod
    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """A fresh translator from ``C_S`` to ``C_T`` channels."""


@dataclass(frozen=True)
class Conv3Translator(Translation):
    """Three 3x3 convolutions, the paper's: see `layers.Translator`.

    Args:
        batch_norm: a BatchNorm between each convolution and its activation.
        shared: whether one translator serves all teachers.
    """

    batch_norm: bool = False
    shared: bool = False

    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """A `layers.Translator`."""
        return Translator(student_channels, teacher_channels, batch_norm=self.batch_norm)


@dataclass(frozen=True)
class Conv1x1Translator(Translation):
    """One 1x1 convolution with LeakyReLU(0.1).

    Args:
        shared: whether one translator serves all teachers.
    """

    shared: bool = False

    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """A convolution and its activation."""
        return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1), nn.LeakyReLU(_SLOPE))


@dataclass(frozen=True)
class LinearTranslator(Translation):
    """One 1x1 convolution and nothing else, FEED's ablation of the non-linearity.

    Args:
        shared: whether one translator serves all teachers.
    """

    shared: bool = False

    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """A convolution."""
        return nn.Conv2d(student_channels, teacher_channels, 1)


@dataclass(frozen=True)
class NoTranslator(Translation):
    """None: features are compared as they are, of whatever shape."""

    maps_only = False
    shared = False

    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """The identity.

        Raises:
            InputError: the numbers of channels differ.
        """
        if student_channels != teacher_channels:
            raise InputError(
                f"NoTranslator compares features as they are, but they have {student_channels} and {teacher_channels} "
                "channels: choose another translator"
            )
        return nn.Identity()


@dataclass(frozen=True)
class FunctionTranslator(Translation):
    """Any modules, for features of whatever shape.

    Args:
        function: makes one from ``C_S`` and ``C_T``.
        shared: whether one translator serves all teachers.
    """

    function: Callable[[int, int], nn.Module]
    shared: bool = False
    maps_only = False

    def make(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """What the function makes."""
        return self.function(student_channels, teacher_channels)


class Distance(Choice):
    """:math:`L_m` of `FEEDModule`: how a translated student feature and a teacher's are compared.

    Attributes:
        name: of the term in logs.
        beta: the weight that belongs to the mean over all entries.
        translator: what makes the student's feature comparable; ``None``: nothing is needed.
    """

    name: ClassVar[str]
    beta: ClassVar[float]
    translator: Translation | None

    @abstractmethod
    def __call__(self, translated: Tensor, target: Tensor) -> Tensor:
        """The distance of features of one shape but for channels: a mean over samples, 0 for two zero features."""

    def over_counted(self, translated: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """The distance over the samples that count, a scalar.

        Args:
            translated: ``(N, ...)``.
            target: ``(N, ...)``.
            counted: which samples count, bool ``(N,)``; ``None``: all.
        """
        if counted is None:
            return self(translated, target)
        # Two zero features add nothing to the mean, which is then one over fewer samples; no step waits for the device.
        pair = [functional.zero_uncounted(feature, counted) for feature in (translated, target)]
        return self(*pair) * (len(counted) / counted.sum().clamp_min(1))

    def observed(self, translated: Sequence[Tensor], counted: Tensor | None = None) -> dict[str, Tensor]:
        """Scalars to be logged besides, by name, over the samples that count."""
        return {}


@dataclass(frozen=True)
class FactorDistance(Distance):
    """FEED's, and Factor Transfer's: features divided by their norms, see `functional.factor_distance`.

    Args:
        p: of the norm.
        normalize: the features' norms: per ``"sample"``, per ``"channel"``, or ``"none"``.
        reduction: ``"mean"`` over samples and entries, ``"sum"`` over entries and mean over samples.
        translator: makes the student's feature comparable.

    Raises:
        InputError: ``p`` is below 1, or a name is unknown.
    """

    p: float = 1
    normalize: Literal["sample", "channel", "none"] = "sample"
    reduction: Literal["mean", "sum"] = "mean"
    translator: Translation = Conv3Translator()

    name = "feed"
    beta = 500.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_finite("FactorDistance: p", self.p)
        if not self.p >= 1:
            # Below 1 the gradient is infinite wherever a ReLU leaves both sides at zero.
            raise InputError(f"FactorDistance: p must be at least 1, got {self.p}")
        self.check_known(normalize=("sample", "channel", "none"), reduction=("mean", "sum"))

    def __call__(self, translated: Tensor, target: Tensor) -> Tensor:
        """See `functional.factor_distance`."""
        if self.normalize == "channel" and translated.ndim == 3:
            # Features with one dimension of places have their channels last.
            translated, target = translated.transpose(1, 2), target.transpose(1, 2)
        return functional.factor_distance(
            translated, target, p=self.p, reduction=self.reduction, normalize=self.normalize, eps=_EPS
        )

    def observed(self, translated: Sequence[Tensor], counted: Tensor | None = None) -> dict[str, Tensor]:
        """``zero_features``: the share of features so near zero that they cannot be brought to norm 1."""
        if self.normalize != "sample":
            return {}
        return {"zero_features": torch.stack([_zero_share(feature, counted) for feature in translated]).mean()}


@dataclass(frozen=True)
class HintDistance(Distance):
    """FitNets' squared error between features as they are, see `functional.hint_distance`.

    Its ``beta`` depends on the scale of the teachers' features; read ``train/hint_share``.

    Args:
        reduction: see `FactorDistance`.
        translator: makes the student's feature comparable.

    Raises:
        InputError: a name is unknown.
    """

    reduction: Literal["mean", "sum"] = "mean"
    translator: Translation = Conv3Translator()

    name = "hint"
    beta = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_known(reduction=("mean", "sum"))

    def __call__(self, translated: Tensor, target: Tensor) -> Tensor:
        """See `functional.hint_distance`."""
        return functional.hint_distance(translated, target, reduction=self.reduction)


@dataclass(frozen=True)
class AttentionDistance(Distance):
    """The squared error between attention maps, which needs no translator, see `functional.attention_distance`.

    Its ``beta`` is attention transfer's for maps of 8x8 and more; smaller maps need less.

    Args:
        reduction: see `FactorDistance`.

    Raises:
        InputError: a name is unknown.
    """

    reduction: Literal["mean", "sum"] = "mean"

    name = "attention"
    beta = 1000.0
    translator = None

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_known(reduction=("mean", "sum"))

    def __call__(self, translated: Tensor, target: Tensor) -> Tensor:
        """See `functional.attention_distance`."""
        return functional.attention_distance(translated, target, reduction=self.reduction)


@dataclass(frozen=True)
class LogitTerm(Choice):
    """Hinton's term beside the feature term, logged as ``train/kd``.

    Args:
        weight: of `functional.softened_kl` to the ensemble's prediction.
        temperature: ``T``.

    Raises:
        InputError: the weight is negative, or the temperature not positive.
    """

    weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_finite("LogitTerm: weight", self.weight)
        check_finite("LogitTerm: temperature", self.temperature)
        if not self.weight >= 0 or not self.temperature > 0:
            raise InputError(f"LogitTerm: weight must be 0 or more and temperature positive, got {self}")

    def question(self, output: Output) -> Softened:
        """What the teachers are asked.

        Raises:
            InputError: a temperature is given for an output that has none.
        """
        if not output.has_temperature and self.temperature != LogitTerm.temperature:
            raise InputError(f"LogitTerm: {type(output).__name__} has no temperature: leave {self.temperature} out")
        return Softened(self.temperature)


def make_translators(distance: Distance, source: int, targets: Sequence[int]) -> nn.ModuleList:
    """Fresh translators from the student's channels, one for each teacher's, or one for all.

    Raises:
        InputError: one for all, and the teachers' channel counts differ.
    """
    translation = distance.translator
    if translation is None:
        return nn.ModuleList()
    if translation.shared and len(set(targets)) > 1:
        raise InputError(f"FEED: a shared translator needs teachers of equal channel counts, got {list(targets)}")
    chosen = targets[:1] if translation.shared else targets
    translators = nn.ModuleList(translation.make(source, target) for target in chosen)
    parameters = sum(parameter.numel() for parameter in translators.parameters())
    if parameters > _MANY_PARAMETERS:
        warnings.warn(
            f"FEED's translators have {parameters:,} parameters: translator=Conv1x1Translator() has far fewer",
            stacklevel=3,
        )
    return translators


def _zero_share(feature: Tensor, counted: Tensor | None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(wide(feature.detach()).flatten(1), dim=1)
    return functional.counted_mean((norms < _EPS).float(), counted)
