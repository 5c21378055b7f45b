"""What a method asks its teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.functional.common import positive, wide
from distill_lightning.layers import Paraphraser, fingerprint
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.outputs import Output
from distill_lightning.teachers.ensemble import EnsembleRule

_FEATURE = "feature_"


class TeacherOutputs(NamedTuple):
    """What the teachers gave for a batch, each of them run once.

    Attributes:
        outputs: of each teacher, ``(N, ...)``.
        features: the tapped feature of each teacher, where features are asked for.
        rule: how predictions become one.
        output: what an output means.
    """

    outputs: Sequence[Tensor]
    features: Sequence[Tensor]
    rule: EnsembleRule
    output: Output


class Question(ABC):
    """One thing that is asked about every training batch; declared when a `Teachers` is made.

    A question is answered in tensors ``(N, ...)`` that are functions of each sample's input alone, so that a
    `TeacherStore` can keep them.
    """

    needs_features = False

    @abstractmethod
    def answers(self, given: TeacherOutputs) -> dict[str, Tensor]:
        """The answers, ``(N, ...)`` each, by name."""

    def describe(self) -> dict[str, Any]:
        """Plain values of everything that the answers depend on beside the teachers."""
        return {}

    def networks(self) -> list[nn.Module]:
        """Frozen networks of the question's own."""
        return []


class Softened(Question):
    """The ensemble's one distribution at a temperature: `Teachers.distribution`, `Teachers.probabilities`.

    Args:
        temperature: ``T``, which a regression has none of.

    Raises:
        InputError: ``temperature`` is not positive and finite.

    Example:
        >>> from torch import nn
        >>> from distill_lightning import Softened, Teachers
        >>> Teachers(nn.Linear(4, 3), ask=[Softened(temperature=4.0)]).questions[0].describe()
        {'temperature': 4.0}
    """

    def __init__(self, temperature: float = 1.0) -> None:
        positive("temperature", temperature)
        self.temperature = temperature

    def answers(self, given: TeacherOutputs) -> dict[str, Tensor]:
        """The collapsed ensemble."""
        distribution = given.output.collapse(
            given.outputs, weights=given.rule.weights, combine=given.rule.combine, temperature=self.temperature
        )
        return {given.output.name: distribution}

    def describe(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}


class Logits(Question):
    """Every teacher's output: `Teachers.logits`."""

    def answers(self, given: TeacherOutputs) -> dict[str, Tensor]:
        """``(N, M, ...)``."""
        return {"logits": torch.stack(list(given.outputs), dim=1)}

    def describe(self) -> dict[str, Any]:
        """That they are asked for."""
        return {"logits": True}


class MeanLogits(Question):
    """The weighted mean of the teachers' outputs, whatever the rule: `Teachers.mean_logits`."""

    def answers(self, given: TeacherOutputs) -> dict[str, Tensor]:
        """``(N, K)``."""
        return {"mean_logits": functional.weighted_mean(wide(torch.stack(list(given.outputs))), given.rule.weights)}

    def describe(self) -> dict[str, Any]:
        """That they are asked for."""
        return {"mean_logits": True}


class Features(Question):
    """An inner feature of every teacher: `Teachers.features`.

    Args:
        layers: dotted path (or glob) of the tapped layer: one for all teachers, or one each.
        paraphrasers: trained `Paraphraser` networks, one per teacher, whose codes are then the features.
        channels: where the tapped layers have their channels, ``"first"`` or ``"last"``: one for all teachers, or one
            each; ``None``: as their own operations tell when `Teachers.shapes` is asked. Features come as
            ``(N, C, H, W)``, or ``(N, L, C)``.
        size: rows and columns that each feature map is brought to by adaptive average pooling; ``None``: it stays.

    Raises:
        InputError: one of ``paraphrasers`` is not a `Paraphraser`.

    Example:
        >>> from distill_lightning import Features
        >>> question = Features("layer?.conv", size=4)
        >>> question.layer_of_each(2)
        ['layer?.conv', 'layer?.conv']
        >>> question.shape_of(0, (1, 16, 8, 8))
        (1, 16, 4, 4)
    """

    needs_features = True
    OF_NETWORKS = ("layers", "channels", "paraphrasers")
    """What `describe` tells of the teachers and their paraphrasers, which a store without networks knows itself."""

    def __init__(
        self,
        layers: str | Sequence[str],
        *,
        channels: Channels | Sequence[Channels | None] | None = None,
        paraphrasers: Sequence[nn.Module] = (),
        size: int | None = None,
    ) -> None:
        if not all(isinstance(one, Paraphraser) for one in paraphrasers):
            raise InputError("paraphrasers must be layers.Paraphraser networks, trained beforehand")
        self.layers: list[str] | str = layers if isinstance(layers, str) else list(layers)
        self.paraphrasers: list[Paraphraser] = [one for one in paraphrasers if isinstance(one, Paraphraser)]
        self.channels = channels if channels is None or isinstance(channels, str) else list(channels)
        self.size = size

    def answers(self, given: TeacherOutputs) -> dict[str, Tensor]:
        """``feature_<m>``, ``(N, C_m, H, W)`` each."""
        features = list(given.features)
        if self.paraphrasers:
            features = [one.encoder(feature) for one, feature in zip(self.paraphrasers, features, strict=True)]
        return {f"{_FEATURE}{number}": self.reduced(feature) for number, feature in enumerate(features)}

    def layer_of_each(self, count: int) -> list[str]:
        """The tapped layer of each of so many teachers.

        Raises:
            InputError: there are as many layers as some other number of teachers.
        """
        each = [self.layers] * count if isinstance(self.layers, str) else self.layers
        if len(each) != count:
            names = f"a name, or a list of {count} names; got {list(each)}"
            raise InputError(f"{len(each)} layers for {count} teachers: give one for all, or one each ({names})")
        return each

    def reduced(self, feature: Tensor) -> Tensor:
        """A feature map at the wanted size."""
        return feature if self.size is None else nn.functional.adaptive_avg_pool2d(feature, (self.size, self.size))

    def shape_of(self, number: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the answer about a teacher whose tapped feature map has the given one.

        Raises:
            InputError: the teacher's paraphraser reads another number of channels, or there is none for it.
        """
        if self.paraphrasers:
            if number >= len(self.paraphrasers) or self.paraphrasers[number].channels != shape[1]:
                raise InputError(
                    f"paraphraser {number} does not read the {shape[1]} channels of teacher {number}'s feature: give "
                    "one paraphraser for each teacher, which was trained on that layer"
                )
            shape = (shape[0], self.paraphrasers[number].factors, *shape[2:])
        return tuple(shape) if self.size is None else (*shape[:2], self.size, self.size)

    def describe(self) -> dict[str, Any]:
        """Size, layers, their channels and paraphrasers."""
        return {
            "feature_size": self.size,
            "layers": self.layers,
            "channels": self.channels,
            "paraphrasers": fingerprint(nn.ModuleList(self.paraphrasers)),
        }

    def networks(self) -> list[nn.Module]:
        """The paraphrasers."""
        return list(self.paraphrasers)


def feature_names(names: Iterable[str]) -> list[str]:
    """Those of the names that `Features` has given to its answers, in the teachers' order."""
    return sorted((name for name in names if name.startswith(_FEATURE)), key=lambda name: (len(name), name))


@torch.no_grad()
def answered(questions: Iterable[Question], given: TeacherOutputs) -> dict[str, Tensor]:
    """The answers to several questions, by name."""
    return {name: rows for question in questions for name, rows in question.answers(given).items()}
