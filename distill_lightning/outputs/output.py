"""What an output of a network means."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning.choices import Choice
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError


class Output(Choice):
    """The distribution of the target that a network's output stands for; modules, stores and metrics ask it.

    An *output* is what a network gives; a *distribution* is what it means, in the numbers that a store can keep:
    `Categorical`: logits and probabilities ``(N, K)``; `Gaussian`: means and log-variances ``(N, 2 d)``, and the same
    within their bounds. What has no meaning for an output, a divergence of `Boxes` for example, it refuses.

    Attributes:
        name: of distributions, among a store's answers.
        label_term: what the labels' likelihood is called in logs.
        has_temperature: whether a temperature softens distributions.
        watched: the metric of a validation that tells whether a training gets on.

    Example:
        >>> from distill_lightning import Categorical, Gaussian
        >>> from distill_lightning.outputs import Output
        >>> isinstance(Categorical(10), Output), isinstance(Gaussian(3), Output)
        (True, True)
        >>> list(Categorical(10).teacher_metrics()), list(Gaussian(3).teacher_metrics())
        (['agreement', 'teacher_kl'], ['teacher_kl'])
    """

    name: ClassVar[str]
    label_term: ClassVar[str]
    has_temperature: ClassVar[bool]
    watched: ClassVar[str] = "nll"

    @abstractmethod
    def check(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """Look at the shape of a student's output.

        Args:
            who: what the message begins with.
            network: that gave it.
            shape: of the output.
            per_position: whether an output for each position, ``(N, T, ...)``, will do, too.

        Raises:
            InputError: it does not fit.
        """

    def needs_layout(self, shape: Sequence[int]) -> str:
        """What must be said about an output of this shape, which can be read in more than one way; else nothing."""
        return ""

    def laid_out(self, output: Tensor) -> Tensor:
        """A network's output with the numbers of each position in its last dimension, where all else seeks them.

        Args:
            output: as the network gives it.
        """
        return output

    def check_teacher(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """Look at the shape of a teacher's output; arguments and errors as `check`."""
        self.check(who, network, shape, per_position=per_position)

    def check_rule(self, combine: str) -> None:
        """Look at how an ensemble combines its members' outputs, see `TeacherEnsemble`.

        Raises:
            InputError: that has no meaning for this distribution.
        """

    def describe_answers(self) -> dict[str, Any]:
        """Plain values, by name, of everything here that the teachers' distributions depend on."""
        return {}

    def check_values(self, who: str, output: Tensor) -> None:
        """Look at the numbers of an output, which is waited for.

        Args:
            who: what the message begins with.
            output: of a network.

        Raises:
            InputError: they seem to be of another kind, probabilities in the place of logits for example.
        """

    def broken(self, output: Tensor) -> Tensor:
        """A boolean mask of the samples ``(N,)`` or positions ``(N, T)`` whose output holds nan or infinity."""
        return ~output.isfinite().all(dim=-1)

    def check_target(
        self, who: str, target: Tensor | None, *, per_position: bool = False, is_evaluated: bool = False
    ) -> None:
        """Look at kind and shape of a batch's targets, not at their values.

        Args:
            who: what the message begins with.
            target: of the batch.
            per_position: as of `check`.
            is_evaluated: whether metrics are to read them, and not a loss.

        Raises:
            InputError: they are of a kind that the method does not take.
        """

    def as_target(self, target: Tensor) -> Tensor:
        """Targets in the type of numbers that losses and metrics need."""
        return target

    def target_rule(self, target: Tensor) -> str:
        """What targets of this kind must be, in words."""
        raise self._has_none("rule for targets")

    def wrong_targets(self, target: Tensor) -> Tensor:
        """A boolean mask of the targets that cannot be right.

        It has one entry for each class index, or one for each row where a target is a row of numbers.
        """
        raise self._has_none("targets in a tensor")

    def as_point(self, variance: float | None) -> Output:
        """The output of a student trained on the teacher's point prediction alone.

        Args:
            variance: that its distribution has then; ``None``: the output's own way.

        Raises:
            InputError: such a distribution has no variance.
        """
        if variance is not None:
            raise InputError(f"{type(self).__name__} has no variance: leave {variance} out")
        return self

    def select(self, output: Tensor, target: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of output and target, or of two outputs, that count, positions as samples of their own."""
        raise self._has_none("rows")

    def counted(self, output: Tensor, batch: Batch) -> Tensor | None:
        """What counts of an output, bool, of the shape that its losses have; ``None``: everything."""
        raise self._has_none("rows")

    def label_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Negative log-likelihood of the labels in nats, mean over what counts."""
        raise self._has_none("likelihood of labels")

    def divergence_rows(self, output: Tensor, distribution: Tensor, *, temperature: float = 1.0) -> Tensor:
        """:math:`KL(q || p)` of each sample or position, ``q`` a distribution at ``temperature``, ``p`` the output."""
        raise self._has_none("divergence")

    def divergence(self, output: Tensor, distribution: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """The mean of `divergence_rows` over what counts."""
        raise self._has_none("divergence")

    def point_divergence_rows(self, output: Tensor, distribution: Tensor) -> Tensor:
        """As `divergence_rows`, to what is most probable in the distribution alone."""
        raise self._has_none("divergence")

    def collapse(
        self,
        outputs: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        combine: str = "probabilities",
        temperature: float = 1.0,
    ) -> Tensor:
        """One distribution of several outputs, see `TeacherEnsemble`; without a graph if they have none."""
        raise self._has_none("mean of several")

    def uncertainty(self, distribution: Tensor) -> Tensor:
        """Entropy in nats, or total variance, of each sample ``(N,)``."""
        raise self._has_none("uncertainty")

    def prediction(self, output: Tensor) -> Tensor:
        """An output in the form that metrics read."""
        raise self._has_none("rows")

    def teacher_prediction(self, output: Tensor) -> Tensor:
        """A teacher's output in the form that metrics read."""
        return self.prediction(output)

    def as_prediction(self, distribution: Tensor) -> Tensor:
        """A distribution in the form that metrics read."""
        raise self._has_none("distribution")

    def comparison(self, output: Tensor, distribution: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """Scalars by name that tell how a student's output and its teachers' distribution compare in training.

        Args:
            output: of the student.
            distribution: of its teachers.
            counted: which samples count, bool ``(N,)``; ``None``: all.
        """
        raise self._has_none("divergence")

    def _has_none(self, what: str) -> InputError:
        return InputError(f"{type(self).__name__} has no {what}: take a module that is made for such outputs")

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """What a student is judged by."""

    def teacher_metrics(self) -> MetricCollection:
        """How close a student is to its teachers; nothing unless an output can tell."""
        return MetricCollection({})


def check_is_tensor(who: str, target: object) -> None:
    """Look at whether a batch's targets are a tensor.

    Args:
        who: what the message begins with.
        target: of the batch.

    Raises:
        InputError: they are not.
    """
    if not isinstance(target, Tensor):
        raise InputError(
            f"{who}: the targets are of the type {type(target).__name__}: let the data module give a tensor, "
            "torch.tensor(target) of numbers"
        )
