"""Extracurricular Learning: teacher and student output distributions, matched beyond the training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.choices import Choice
from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import MixupSampler, join
from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import positive
from distill_lightning.layers.batch_norm import kept_statistics
from distill_lightning.layers.call import call
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.extra_inputs import ExtraInputs
from distill_lightning.outputs import Output, output_of
from distill_lightning.teachers import Given, Softened, Teachers


class Match(Choice):
    """What of the teachers' distribution the student is to match."""

    def student_output(self, output: Output) -> Output:
        """What the student's output means then."""
        return output

    def divergence_rows(self, output: Output, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence of each sample, ``(N + M,)``."""
        return output.divergence_rows(student, teacher, temperature=temperature)


@dataclass(frozen=True)
class MatchDistribution(Match):
    """All of it, as the paper does."""


@dataclass(frozen=True)
class MatchPoint(Match):
    """To compare with: the most probable class, by cross entropy, or the mean alone, by the squared error.

    Args:
        variance: of a regression: the student's, by twice of which the squared error is divided and which its metrics
            use, 1 unless it is given; the student may then give means alone, ``(N, d)``.

    Raises:
        InputError: ``variance`` is not positive, or is given for a classification.
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        if self.variance is not None:
            positive("MatchPoint: variance", self.variance)

    def student_output(self, output: Output) -> Output:
        """A Gaussian has this variance."""
        return output.as_point(self.variance)

    def divergence_rows(self, output: Output, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence of each sample, ``(N + M,)``."""
        return output.point_divergence_rows(student, teacher)


class ExtracurricularModule(DistillationModule):
    r"""Extracurricular Learning (XCL): the teacher's output distribution, matched on more than the training inputs.

    .. math:: L = \frac{1}{N + M} \sum_{i=1}^{N + M} \mathrm{KL}\big(q_T(\cdot \mid x_i) \,\|\, q_S(\cdot \mid x_i)\big)
        + w \, \frac{1}{N} \sum_{i=1}^{N} -\log q_S(y_i \mid x_i)

    over the ``N`` training inputs of a batch and ``M = extra_ratio * N`` inputs that the samplers make. Teacher and
    student are asked about the same tensor; no sample is dropped for being uncertain. In classification ``q`` is
    ``softmax(z / T)`` and the divergence is summed over the classes, times ``T ** 2``; in regression ``q`` is the
    diagonal Gaussian of the network's means and log-variances, see `functional.gaussian_kl`. Several teachers are
    collapsed to one distribution: the mean of the probabilities, or the mixture's mean and variance. The labels count
    for the term with ``w`` alone.

    Logged: ``train/kl`` (with ``w``, ``train/label``), ``train/kl_real`` and ``train/kl_<sampler>``,
    ``train/uncertainty_real`` and ``train/uncertainty_<sampler>`` (the teacher's entropy in nats, or total variance),
    ``train/agreement`` in classification, ``train/student_deviation`` and ``train/teacher_deviation`` in regression.

    Pouransari, Javaheripi, Sharma, Tuzel: *Extracurricular Learning: Knowledge Transfer Beyond Empirical Distribution*,
    https://arxiv.org/abs/2007.00051

    ::

        model:
          class_path: ExtracurricularModule
          init_args:
            student: {class_path: SmallResNet, init_args: {num_classes: 10, width: 8}}
            teachers:
              - class_path: distill_lightning.Pretrained
                init_args:
                  network: {class_path: SmallResNet, init_args: {num_classes: 10, width: 16}}
                  checkpoint: teacher.safetensors
            samplers: [{class_path: MixupSampler, init_args: {alpha: 1.0}}]

    Args:
        student: the network that learns.
        teachers: a network, several, a `TeacherEnsemble` with weights or another rule, or a `TeacherStore`, which keeps
            what they say about training and additional inputs. With a store an additional input must be a function of a
            sample's index and view: give the data module ``partners``, and each sampler as many rows as the batch has.
        num_classes: ``K`` of a classification: networks give logits ``(N, K)``.
        num_targets: ``d`` of a regression: networks give means and log-variances ``(N, 2 d)``. ``output: Gaussian``
            sets the log-variances' bounds, and the ``teacher_variance`` of teachers that give means alone.
        samplers: what makes the additional inputs, see `distill_lightning.data.samplers`, or `UnlabelledSampler`, which
            takes real ones; ``None``: `MixupSampler`. With nothing but `EmpiricalSampler` there are none, and this is
            standard knowledge distillation.
        sampler_weights: shares of the samplers in the additional inputs, divided by their sum; ``None``: equal.
        extra_ratio: ``M / N``.
        temperature: ``T``, in classification, of a whole distribution.
        kl_weight: weight of the divergence, 1 in the paper.
        label_weight: ``w``; 0 never looks at the labels, which may then be missing. Only training inputs have labels.
        match: `MatchDistribution`, or, to compare with, `MatchPoint`.
        bn_mode: ``"joint"``: one forward, so the student's BatchNorm sees all inputs together; ``"separate"``: the
            additional inputs in a forward of their own, which leaves the running statistics alone.
        seed: of the samplers' draws, which depend on it and on each sample's index and view alone. Which rows Mixup and
            CutMix mix depends on the batch, too, unless the data module gives partners (`Batch.partner`).
        options: see `TrainingOptions`.

    Raises:
        InputError: an option is unknown, out of range or would do nothing, a network does not fit, or a deterministic
            teacher of a regression has no ``teacher_variance``.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Given = None,
        *,
        num_classes: int | None = None,
        num_targets: int | None = None,
        samplers: Sequence[nn.Module] | None = None,
        sampler_weights: Sequence[float] | None = None,
        extra_ratio: float = 1.0,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        label_weight: float = 0.0,
        match: Match = MatchDistribution(),
        bn_mode: Literal["joint", "separate"] = "joint",
        seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        means = options.get("output") or (
            output_of(type(self).__name__, num_classes, num_targets) if num_classes or num_targets else None
        )
        options["output"] = None if means is None else match.student_output(means)
        super().__init__(student, num_classes=num_classes, num_targets=num_targets, **options)
        for name, value in (("kl_weight", kl_weight), ("label_weight", label_weight)):
            check_finite(name, value)
        if not min(kl_weight, label_weight) >= 0 or not kl_weight + label_weight > 0:
            raise InputError(
                f"kl_weight and label_weight cannot be negative, nor both 0: {kl_weight} and {label_weight}"
            )
        if not self.output.has_temperature or isinstance(match, MatchPoint):
            self.refuse_unused("temperature", temperature, f"with {type(self.output).__name__} and {match}")
        if bn_mode not in ("joint", "separate"):
            raise InputError(f"bn_mode must be one of joint, separate, got {bn_mode!r}")
        self.temperature, self.match, self.bn_mode = temperature, match, bn_mode
        self.kl_weight, self.label_weight = kl_weight, label_weight
        given = [MixupSampler()] if samplers is None else samplers
        self.samplers = ExtraInputs(given, weights=sampler_weights, ratio=extra_ratio, seed=seed)
        if not self.samplers.ratio:
            self.refuse_unused("sampler_weights", sampler_weights, "without additional inputs")
        self.teachers = Teachers(teachers, ask=[Softened(temperature)], about=self.samplers)

    @property
    def reads_labels(self) -> bool:
        """Whether the labels have a weight."""
        return self.label_weight > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The divergence from the teachers over all inputs and, with ``label_weight``, the labels' likelihood."""
        inputs = self.teachers.inputs(batch)
        output, teacher = self._student_output(inputs), self.teachers.distribution(batch)
        divergences = self.match.divergence_rows(self.output, output, teacher, self.temperature)
        counted = self._counted(batch, len(divergences))
        self._observe(inputs, output.detach(), teacher, divergences.detach(), counted)
        terms = {"kl": functional.counted_mean(divergences, counted)}
        if self.label_weight:
            if batch.target is None:
                raise InputError(f"label_weight={self.label_weight} needs labels, and the batch has none: set it to 0")
            terms["label"] = self.output.label_loss(output[: batch.size], batch)
        return terms

    def weights(self) -> dict[str, float]:
        """``kl_weight`` and ``label_weight``."""
        return {"kl": self.kl_weight, **({"label": self.label_weight} if self.label_weight else {})}

    @staticmethod
    def _counted(batch: Batch, rows: int) -> Tensor | None:
        """Which inputs count: all additional ones, and the batch's own that do."""
        if batch.counted is None:
            return None
        return torch.cat([batch.counted, batch.counted.new_ones(rows - batch.size)])

    def _student_output(self, inputs: dict[str, Any]) -> Tensor:
        real, extra = inputs[""], [values for name, values in inputs.items() if name]
        if not extra or self.bn_mode == "joint":
            return call(self.student, join([real, *extra]) if extra else real)
        with kept_statistics(self.student):
            outside = call(self.student, join(extra))
        return torch.cat([call(self.student, real), outside])

    def _observe(
        self, inputs: dict[str, Any], output: Tensor, teacher: Tensor, divergences: Tensor, counted: Tensor | None
    ) -> None:
        counts = self.samplers.counts(inputs)
        ends = list(accumulate(counts.values(), initial=0))
        uncertainty = self.output.uncertainty(teacher)
        for name, start, end in zip(counts, ends, ends[1:], strict=False):
            counting = None if counted is None else counted[start:end]
            self.observe(f"kl_{name}", functional.counted_mean(divergences[start:end], counting))
            self.observe(f"uncertainty_{name}", functional.counted_mean(uncertainty[start:end], counting))
        for name, value in self.output.comparison(output, teacher, counted).items():
            self.observe(name, value)
