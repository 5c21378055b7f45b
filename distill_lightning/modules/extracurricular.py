"""Extracurricular Learning: teacher and student output distributions, matched beyond the training set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.data.samplers import EmpiricalSampler, Inputs, MixupSampler, count_rows, join, take
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import dry_forward, fingerprint
from distill_lightning.layers.batch_norm import kept_statistics
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.extra_inputs import extra_inputs, storable_names
from distill_lightning.modules.extracurricular_options import check_choices, check_unused, frozen_samplers, per_target
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.modules.regression import check_bounds
from distill_lightning.teachers import TeacherEnsemble, TeacherStore
from distill_lightning.teachers.origin import ensemble_if_any

# Keeps the samplers' random numbers apart from those that crop and flip the images of the same views.
_STREAM = 0x45435543


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
            task: classification
            samplers: [{class_path: MixupSampler, init_args: {alpha: 1.0}}]

    Args:
        student: the network that learns.
        teachers: a network, several, or a `TeacherEnsemble` with weights or another rule.
        task: ``"classification"``: networks give logits ``(N, K)``; ``"regression"``: means and log-variances
            ``(N, 2 d)``.
        num_classes: ``K`` of a classification.
        num_targets: ``d`` of a regression.
        samplers: what makes the additional inputs, see `distill_lightning.data.samplers`; ``None``: `MixupSampler`. With
            nothing but `EmpiricalSampler` there are none, and this is standard knowledge distillation.
        sampler_weights: shares of the samplers in the additional inputs, divided by their sum; ``None``: equal.
        extra_ratio: ``M / N``.
        temperature: ``T``, in classification.
        kl_weight: weight of the divergence, 1 in the paper.
        label_weight: ``w``; 0 never looks at the labels, which may then be missing. Only training inputs have labels.
        match: ``"distribution"``; or, to compare with, ``"point"``: the teacher's most probable class, or its mean
            alone with the squared error over twice ``point_variance``.
        point_variance: the student's variance with ``match="point"`` in regression; its metrics use it.
        sample_selection: ``"all"``; or, to compare with, the ``"certain"`` or the ``"uncertain"`` samples alone, by the
            teacher's entropy or total variance.
        quantile: share of the samples that such a selection keeps, rounded up.
        kl_direction: ``"forward"``, the teacher first; or, to compare with, ``"reverse"``.
        bn_mode: ``"joint"``: one forward, so the student's BatchNorm sees all inputs together; ``"separate"``: the
            additional inputs in a forward of their own, which leaves the running statistics alone.
        teacher_variance: of the teachers that give means only, ``(N, d)``; one number or one per target. Those that
            give log-variances, too, are taken at their word.
        log_var_bounds: that log-variances are clamped to.
        seed: of the samplers' draws, which depend on it and on each sample's index and view alone. Which rows Mixup and
            CutMix mix depends on the batch, too, unless the data module gives partners (`Batch.partner`).
        store: keeps what the teachers say about training and additional inputs, see `TeacherStore`; with a complete one
            ``teachers`` may be ``None``. An additional input must be a function of a sample's index and view: give the
            data module ``partners``, and each sampler as many rows as the batch has.
        input_shape: shape of one input, ``(C, H, W)``, to check the networks with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: an option is unknown, out of range or does not go with the others, a network does not fit, or a
            deterministic teacher of a regression has no ``teacher_variance``.
    """

    frozen = ("teachers", "samplers")

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module] | None = None,
        *,
        task: Literal["classification", "regression"] = "classification",
        num_classes: int | None = None,
        num_targets: int | None = None,
        samplers: Sequence[nn.Module] | None = None,
        sampler_weights: Sequence[float] | None = None,
        extra_ratio: float = 1.0,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        label_weight: float = 0.0,
        match: Literal["distribution", "point"] = "distribution",
        point_variance: float = 1.0,
        sample_selection: Literal["all", "certain", "uncertain"] = "all",
        quantile: float = 0.5,
        kl_direction: Literal["forward", "reverse"] = "forward",
        bn_mode: Literal["joint", "separate"] = "joint",
        teacher_variance: float | Sequence[float] | None = None,
        log_var_bounds: tuple[float, float] = functional.LOG_VAR_BOUNDS,
        seed: int = 0,
        store: TeacherStore | None = None,
        input_shape: Sequence[int] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        metrics: MetricCollection | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            student,
            num_classes=num_classes,
            num_targets=num_targets,
            input_shape=input_shape,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            metrics=metrics,
            compile=compile,
            channels_last=channels_last,
        )
        options: dict[str, Any] = {"task": task, "match": match, "sample_selection": sample_selection}
        check_choices(options | {"kl_direction": kl_direction, "bn_mode": bn_mode})
        if (task == "classification") != (num_classes is not None):
            needed = "num_classes" if task == "classification" else "num_targets"
            raise InputError(f"task={task!r} needs {needed}, and not the other")
        if not temperature > 0 or not point_variance > 0:
            raise InputError(f"temperature and point_variance must be positive, got {temperature} and {point_variance}")
        if not min(extra_ratio, kl_weight, label_weight) >= 0 or not kl_weight + label_weight > 0:
            given = f"{extra_ratio}, {kl_weight} and {label_weight}"
            raise InputError(f"extra_ratio, kl_weight and label_weight cannot be negative, nor both weights 0: {given}")
        if not 0 < quantile <= 1:
            raise InputError(f"quantile is a share in (0, 1], got {quantile}")
        check_bounds(log_var_bounds)
        others = {"temperature": temperature, "point_variance": point_variance, "teacher_variance": teacher_variance}
        check_unused(ExtracurricularModule, options | others | {"kl_direction": kl_direction})
        self.task, self.temperature = task, temperature
        self.kl_weight, self.label_weight = kl_weight, label_weight
        self.match, self.point_variance = match, point_variance
        self.sample_selection, self.quantile = sample_selection, quantile
        self.kl_direction, self.bn_mode = kl_direction, bn_mode
        self.log_var_bounds, self.seed = log_var_bounds, seed
        self.teacher_variance = per_target(teacher_variance, num_targets)
        self.samplers = frozen_samplers([MixupSampler()] if samplers is None else samplers, sampler_weights)
        # A training input once more would say nothing new.
        empirical = all(isinstance(sampler, EmpiricalSampler) for sampler in self.samplers)
        self.extra_ratio = 0.0 if empirical else extra_ratio
        self.sampler_shares = functional.member_shares(sampler_weights, len(self.samplers)) if self.samplers else []
        self.teachers, self.teacher_store = ensemble_if_any(teachers), store
        if task == "regression" and self.teachers is not None and self.teachers.combine != "probabilities":
            raise InputError("a regression's teachers are collapsed to one Gaussian: combine has no meaning there")
        if input_shape is not None:
            self.check_output("student", student, dry_forward(student, input_shape).shape)
            for number, network in enumerate(self.teachers or ()):
                self._check_teacher(number, network, dry_forward(network, input_shape).shape)

    # The distributions

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The divergence from the teachers over all inputs and, with ``label_weight``, the labels' likelihood."""
        extras = self._extra_inputs(batch)
        every: Any = join([batch.input, *extras.values()]) if extras else batch.input
        output = self._student_output(batch.input, every)
        if self.teacher_store is None:
            teacher = self._teacher_output(every)
        else:
            told = self.told(batch)
            teacher = torch.cat([told[name] for name in self._answer_names(batch, extras)])
        divergences = self._divergences(output, teacher)
        uncertainty = self._uncertainty(teacher)
        self._observe(output.detach(), teacher, divergences.detach(), uncertainty, extras)
        terms = {"kl": self._selected(divergences, uncertainty).mean()}
        if self.label_weight:
            terms["label"] = self._label_nll(output[: batch.size], batch.target)
        return terms

    def weights(self) -> dict[str, float]:
        """``kl_weight`` and ``label_weight``."""
        return {"kl": self.kl_weight, **({"label": self.label_weight} if self.label_weight else {})}

    def ask(self, batch: Batch) -> dict[str, Tensor]:
        """The teachers' distribution for every training input, and for what each sampler makes of it."""
        extras = self._extra_inputs(batch)
        names = self._answer_names(batch, extras)
        answers = self._teacher_output(join([batch.input, *extras.values()]))
        return dict(zip(names, torch.split(answers, batch.size), strict=True))

    def question(self) -> dict[str, Any]:
        """What the distributions and the additional inputs depend on."""
        asked: dict[str, Any] = {"samplers": f"{fingerprint(self.samplers)} {self.samplers} {self.sampler_shares}"}
        asked |= {"seed": self.seed, "extra_ratio": self.extra_ratio, "temperature": self.temperature}
        return {**asked, "teacher_variance": self.teacher_variance, "log_var_bounds": self.log_var_bounds}

    def _answer_names(self, batch: Batch, extras: dict[str, Inputs]) -> list[str]:
        """What the answers about the training inputs, and then about each ``N`` additional ones, are called."""
        kind = "probabilities" if self.task == "classification" else "gaussian"
        return [kind, *(f"{kind}_{name}" for name in storable_names(self.samplers, batch, extras))]

    def _teacher_output(self, inputs: Any) -> Tensor:
        """Softened probabilities ``(N, K)``, or the collapsed Gaussian's parameters ``(N, 2 d)``; without a graph."""
        outputs, ensemble = self._teacher_outputs(inputs), cast("TeacherEnsemble", self.teachers)
        if self.task == "classification":
            return ensemble.combined(torch.stack(outputs), temperature=self.temperature)
        with torch.no_grad():
            means, variances = zip(*(self._teacher_gaussian(output) for output in outputs), strict=True)
            mean, variance = functional.collapse_mixture(
                torch.stack(means), torch.stack(variances), weights=ensemble.weights
            )
            return functional.join_gaussian(mean, variance.log())

    def _teacher_outputs(self, inputs: Any) -> list[Tensor]:
        """What every teacher gives, which of a regression's teachers need not be of one width."""
        ensemble = cast("TeacherEnsemble", self.teachers)
        outputs: list[Tensor] = ensemble.each(inputs)
        for number, (network, output) in enumerate(zip(ensemble, outputs, strict=True)):
            self._check_teacher(number, network, output.shape)
        return outputs

    def _teacher_gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """One teacher's means and variances; ``teacher_variance`` stands for those that it does not give."""
        if output.shape[1] != self.num_targets or self.teacher_variance is None:
            mean, log_var = functional.split_gaussian(output, bounds=self.log_var_bounds)
            return mean, log_var.exp()
        # Python numbers written into a tensor of the right device: nothing has to be copied to it.
        columns = [torch.full_like(output[:, 0], value, dtype=torch.float32) for value in self.teacher_variance]
        return wide(output), torch.stack(columns, dim=1)

    def _divergences(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Of every sample, ``(N + M,)``."""
        if self.task == "classification":
            if self.match == "point":
                return F.cross_entropy(wide(output), teacher.argmax(dim=1), reduction="none")
            return functional.softened_kl_rows(
                output, teacher, temperature=self.temperature, from_logits=False, direction=self.kl_direction
            )
        teacher_mean, teacher_log_var = teacher.chunk(2, dim=1)
        if self.match == "point":
            mean = wide(output[:, : teacher_mean.shape[1]])
            return (mean - teacher_mean).square().sum(dim=1) / (2 * self.point_variance)
        student_gaussian = functional.split_gaussian(output, bounds=self.log_var_bounds)
        if self.kl_direction == "reverse":
            return functional.gaussian_kl_rows(*student_gaussian, teacher_mean, teacher_log_var)
        return functional.gaussian_kl_rows(teacher_mean, teacher_log_var, *student_gaussian)

    def _uncertainty(self, teacher: Tensor) -> Tensor:
        """The teacher's entropy in nats, or its total variance, ``(N + M,)``."""
        if self.task == "classification":
            entropy: Tensor = torch.special.entr(teacher).sum(dim=1)
            return entropy
        return teacher.chunk(2, dim=1)[1].exp().sum(dim=1)

    def _selected(self, divergences: Tensor, uncertainty: Tensor) -> Tensor:
        if self.sample_selection == "all":
            return divergences
        kept = math.ceil(self.quantile * len(divergences))
        rows = uncertainty.topk(kept, largest=self.sample_selection == "uncertain").indices
        return divergences[rows]

    def _label_nll(self, output: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            raise InputError(f"label_weight={self.label_weight} needs labels, and the batch has none: set it to 0")
        if self.task == "classification":
            return F.cross_entropy(wide(output), target)
        mean, log_var = self.evaluated(output).chunk(2, dim=1)
        return functional.gaussian_nll(mean, log_var, target)

    # The inputs

    def _extra_inputs(self, batch: Batch) -> dict[str, Inputs]:
        """What each sampler made of the batch, by name."""
        total = round(self.extra_ratio * batch.size)
        return extra_inputs(self.samplers, self.sampler_shares, total, batch, partial(self._draws, batch))

    def _draws(self, batch: Batch, rows: Tensor, copies: Tensor) -> Draws:
        if batch.index is None:
            # Data without indices: the place in the epoch stands for the sample.
            place = 0
            if self._trainer is not None:
                place = self.trainer.fit_loop.epoch_loop.batch_idx * self.trainer.world_size + self.trainer.global_rank
            index = torch.arange(batch.size, device=self.device) + place * 2**24
        else:
            index = batch.index
        # A store of data without views has one of each sample.
        epoch = self.current_epoch if self.teacher_store is None else 0
        view = torch.full_like(index, epoch) if batch.view is None else batch.view
        return Draws(self.seed + _STREAM, index[rows], view[rows], copy=copies)

    def _student_output(self, real: Inputs, every: Inputs) -> Tensor:
        if self.bn_mode == "joint" or real is every:
            output: Tensor = self.student(every)
            return output
        count = count_rows(real)
        with kept_statistics(self.student):
            extra = self.student(take(every, torch.arange(count, count_rows(every), device=self.device)))
        return torch.cat([self.student(real), extra])

    # What is looked at

    def _observe(
        self, output: Tensor, teacher: Tensor, divergences: Tensor, uncertainty: Tensor, extras: dict[str, Inputs]
    ) -> None:
        counts = {name: count_rows(inputs) for name, inputs in extras.items()}
        counts = {"real": len(output) - sum(counts.values()), **counts}
        sizes = list(counts.values())
        for name, kl, spread in zip(
            counts, torch.split(divergences, sizes), torch.split(uncertainty, sizes), strict=True
        ):
            self.observe(f"kl_{name}", kl.mean())
            self.observe(f"uncertainty_{name}", spread.mean())
        if self.task == "classification":
            self.observe("agreement", (output.argmax(dim=1) == teacher.argmax(dim=1)).float().mean())
        else:
            for name, gaussian in (("student", self.evaluated(output)), ("teacher", teacher)):
                self.observe(f"{name}_deviation", gaussian.chunk(2, dim=1)[1].div(2).exp().mean())

    def evaluated(self, output: Tensor) -> Tensor:
        """Logits ``(N, K)``, or means and log-variances ``(N, 2 d)`` as the metrics read them."""
        if self.num_targets is None:
            return output
        if self.match == "point":
            mean = wide(output[:, : self.num_targets])
            return functional.join_gaussian(mean, torch.full_like(mean, math.log(self.point_variance)))
        return functional.join_gaussian(*functional.split_gaussian(output, bounds=self.log_var_bounds))

    def teacher_prediction(self, batch: Batch) -> Tensor | None:
        """The ensemble's log-probabilities, or the collapsed Gaussian's parameters."""
        if self.task == "classification" or self.teachers is None:
            return super().teacher_prediction(batch)
        return self._teacher_output(batch.input)

    def teacher_predictions(self, batch: Batch) -> list[Tensor]:
        """Each teacher's logits, or its Gaussian's parameters."""
        if self.task == "classification" or self.teachers is None:
            return super().teacher_predictions(batch)
        gaussians = (self._teacher_gaussian(output) for output in self._teacher_outputs(batch.input))
        return [functional.join_gaussian(mean, variance.log()) for mean, variance in gaussians]

    def check_output(self, who: str, network: nn.Module, shape: Sequence[int]) -> None:
        """As in the base; a regression matched at points needs no log-variances."""
        means_only = self.num_targets is not None and tuple(shape[1:]) == (self.num_targets,)
        if not (means_only and getattr(self, "match", "point") == "point"):
            super().check_output(who, network, shape)

    def _check_teacher(self, number: int, network: nn.Module, shape: Sequence[int]) -> None:
        who, means_only = f"teacher {number}", tuple(shape[1:]) == (self.num_targets,)
        if means_only and self.teacher_variance is None:
            found = f"{who} ({type(network).__name__}) has an output of shape {tuple(shape)}, means alone"
            raise InputError(f"{found}: give their teacher_variance, or end it in a GaussianHead")
        if not means_only:
            super().check_output(who, network, shape)

    def _fingerprint(self) -> dict[str, str]:
        # Samplers without weights differ in kind and options.
        known = super()._fingerprint()
        return known | {"samplers": f"{known['samplers']} {self.samplers}"}
