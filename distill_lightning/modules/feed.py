"""FEED: feature-level ensemble distillation, teachers in parallel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.layers import (
    FeatureTap,
    Paraphraser,
    TransformFactory,
    TransformName,
    fingerprint,
    freeze,
    make_translator,
    resolve_layer,
)
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.feed_parts import (
    Reduction,
    check_channels,
    check_paraphrasers,
    feature_name,
    one_each,
    output_and_feature,
    paraphrased_shape,
    pooled,
    reduced_shape,
    refuse_negative,
    refuse_unknown,
    refuse_unused,
    resized,
    sites,
    stored_shapes,
    warn_of_many_parameters,
    width,
    zero_share,
)
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.networks import likely_input_shape
from distill_lightning.teachers import TeacherEnsemble, TeacherStore
from distill_lightning.teachers.origin import ensemble_if_any

_BETA = {"feed": 500.0, "hint": 1.0, "attention": 1000.0}
# The smallest norm that a feature is divided by.
_EPS = 1e-6


class FEEDModule(DistillationModule):
    r"""Parallel FEED: one trainable non-linear translator per teacher carries each teacher's feature map.

    .. math:: L = \mathrm{CE}(s, y) + \beta \sum_{m=1}^{M} w_m L_m, \qquad
        L_m = \frac{1}{N D_m} \sum_{i,d} \left| u(T_m(F_S))_{id} - u(F_m)_{id} \right|^p

    with the student's feature map ``F_S`` ``(N, C_S, H, W)``, teacher ``m``'s feature map ``F_m`` ``(N, C_m, H, W)``,
    the translator ``T_m`` from ``C_S`` to ``C_m`` channels, and ``u`` the division of a sample by its L2 norm over all
    ``D_m = C_m * H * W`` entries. All networks see the same images. The student and every translator learn together;
    the translators are no part of the student and cost nothing afterwards.

    Logged: ``train/ce``, ``train/feed`` (the sum over teachers with their ``w_m``, or mean, without ``beta``),
    ``train/feed_share`` (its part of the loss: near 0 or 1 means that ``beta`` is off), ``train/feed_teacher_<m>`` and
    ``train/zero_features``, the share of translated features so near zero that ``u`` cannot bring them to norm 1 (mean
    over teachers).

    ``feature_loss`` puts another ``L_m`` in its place, for comparisons under the same teachers; the logged names then
    begin with it. ``"hint"`` is FitNets' squared error between ``T_m(F_S)`` and ``F_m`` as they are
    (`functional.hint_distance`), ``"attention"`` that between attention maps of ``F_S`` and ``F_m`` without any
    translator (`functional.attention_distance`). ``"feed"`` with ``paraphrasers`` is Factor Transfer.

    Park, Kwak: *FEED: Feature-level Ensemble for Knowledge Distillation*, https://arxiv.org/abs/1909.10754 (ECAI 2020:
    *Feature-Level Ensemble Knowledge Distillation for Aggregating Knowledge from Multiple Networks*). The translator
    and the default ``beta`` are those of the same group's Factor Transfer, https://arxiv.org/abs/1802.04977.

    ::

        model:
          class_path: FEEDModule
          init_args:
            student: {class_path: SmallResNet, init_args: {width: 8}}
            teachers:
              - class_path: distill_lightning.Pretrained
                init_args: {network: {class_path: SmallResNet, init_args: {width: 16}}, checkpoint: teacher.ckpt}
            student_layer: stage3
            beta: 100

    Args:
        student: the network that learns.
        teachers: a network, several, or a `TeacherEnsemble`; its ``weights`` count for ``kd_weight`` alone.
        num_classes: ``K``.
        student_layer: dotted path (or glob) of the student's last feature map: after its last ReLU, before pooling.
        teacher_layers: the same for the teachers: one for all, or one each; ``None``: as the student's.
        beta: weight of the feature term; ``None``: 500 for ``"feed"``, 1 for ``"hint"``, 1000 for ``"attention"``.
            These belong to ``reduction="mean"``; for ``"sum"`` divide them by the number of entries that are summed.
            500 is Factor Transfer's for ``D = 4096``, and each ``L_m`` is about ``0.8 / sqrt(D_m)`` at the start. 1000
            is attention transfer's for maps of 8x8 and more; smaller maps need less. For ``"hint"`` it depends on the
            scale of the teachers' features; read ``train/hint_share``.
        feature_loss: ``L_m``: ``"feed"``, ``"hint"`` or ``"attention"``.
        norm_p: ``p``, of ``"feed"``.
        reduction: of each ``L_m``: ``"mean"`` over samples and entries, ``"sum"`` over entries and mean over samples.
        teacher_reduction: ``"sum"`` over teachers, or their ``"mean"``, which keeps ``beta`` independent of ``M``.
        teacher_weights: ``w_m``, used as given; ``None``: all 1.
        transform: the translators: ``"conv3"`` (three 3x3 convolutions, the paper's), ``"conv1x1"`` (one, with
            LeakyReLU), ``"linear"`` (one 1x1, nothing else), ``"none"``, or a function ``(C_S, C_m) -> module``.
            ``"attention"`` has none, whatever stands here.
        transform_batch_norm: BatchNorm in the ``conv3`` translators.
        share_transform: one translator for all teachers (an ablation; they must have equal channel counts).
        normalize: ``u``, of ``"feed"``: ``"sample"``, or per ``"channel"``, or ``"none"``.
        resize: where spatial sizes differ: ``"none"`` refuses, ``"student"`` brings the translated feature to the
            teacher's size and ``"teacher"`` the teacher's to the student's (average pooling down, bilinear up).
        target_size: rows and columns that each teacher's feature map, or code, and each translated feature are brought
            to before ``u`` by adaptive average pooling; ``None``: they stay. A store shrinks with it.
        target_channels: channels that each teacher's feature map is projected to, by one matrix for every run whose
            rows are orthonormal; translators then give as many. It keeps distances approximately, times
            ``sqrt(target_channels / C_m)``, and so the mean squared error (Johnson and Lindenstrauss); ``None``: all.
        paraphrasers: trained `Paraphraser` networks, one per teacher (`ParaphraserModule` trains them): the targets
            become their codes, as in Factor Transfer. Frozen.
        kd_weight: weight of an additional logit term (``train/kd``), `functional.softened_kl` to the ensemble.
        temperature: of that term.
        store: keeps the teachers' feature maps (or their paraphrasers' codes) and predictions, see `TeacherStore`; with
            a complete one ``teachers`` may be ``None``.
        input_shape: shape of one input, ``(C, H, W)``; without, the first convolution's channels at 32x32. One forward
            of zeros through every network finds the channel counts.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: a layer that does not exist or does not give one feature map, sizes that do not match, a network
            with another number of classes, an option out of range, or one that ``feature_loss`` does not use.
    """

    frozen = ("teachers", "paraphrasers")

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module] | None = None,
        *,
        num_classes: int,
        student_layer: str,
        teacher_layers: str | Sequence[str] | None = None,
        beta: float | None = None,
        feature_loss: Literal["feed", "hint", "attention"] = "feed",
        norm_p: float = 1,
        reduction: Literal["mean", "sum"] = "mean",
        teacher_reduction: Literal["sum", "mean"] = "sum",
        teacher_weights: Sequence[float] | None = None,
        transform: TransformName | TransformFactory = "conv3",
        transform_batch_norm: bool = False,
        share_transform: bool = False,
        normalize: Literal["sample", "channel", "none"] = "sample",
        resize: Literal["none", "student", "teacher"] = "none",
        target_size: int | None = None,
        target_channels: int | None = None,
        paraphrasers: Sequence[nn.Module] | nn.ModuleList | None = None,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
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
            input_shape=input_shape,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            metrics=metrics,
            compile=compile,
            channels_last=channels_last,
        )
        self.teachers, self.teacher_store = ensemble_if_any(teachers), store
        # Copies, so that those that were given can be trained on.
        self.paraphrasers = freeze(nn.ModuleList(copy.deepcopy(paraphraser) for paraphraser in paraphrasers or []))
        count = len(stored_shapes(store)) if self.teachers is None else len(self.teachers)
        layers = one_each(count, "teacher_layers", student_layer if teacher_layers is None else teacher_layers)
        self.teacher_weights = [float(weight) for weight in one_each(count, "teacher_weights", teacher_weights or 1.0)]
        if paraphrasers is not None:
            check_paraphrasers(paraphrasers, None if self.teachers is None else count)
        if not norm_p >= 1 or not temperature > 0:
            # Below 1 the gradient is infinite wherever a ReLU leaves both sides at zero.
            raise InputError(f"norm_p must be at least 1 and temperature positive, got {norm_p} and {temperature}")
        refuse_negative(beta=[beta or 0.0], kd_weight=[kd_weight], teacher_weights=self.teacher_weights)
        refuse_unknown(
            feature_loss=(feature_loss, ("feed", "hint", "attention")),
            reduction=(reduction, ("mean", "sum")),
            teacher_reduction=(teacher_reduction, ("sum", "mean")),
            normalize=(normalize, ("sample", "channel", "none")),
            resize=(resize, ("none", "student", "teacher")),
        )
        others, used = feature_loss != "feed", f"feature_loss={feature_loss!r}"
        refuse_unused(used, norm_p=others and norm_p != 1, normalize=others and normalize != "sample")
        projects = target_channels is not None
        refuse_unused("target_size", resize=target_size is not None and resize != "none")
        refuse_unused("paraphrasers", target_channels=projects and paraphrasers is not None)
        if feature_loss == "attention":
            refuse_unused(
                used,
                target_channels=projects,
                transform=transform not in ("conv3", "none"),
                transform_batch_norm=transform_batch_norm,
                share_transform=share_transform,
                paraphrasers=paraphrasers is not None,
            )
        self.feature_loss = feature_loss
        self.beta = _BETA[feature_loss] if beta is None else beta
        self.norm_p, self.kd_weight, self.temperature = norm_p, kd_weight, temperature
        self.reduction, self.teacher_reduction = reduction, teacher_reduction
        self.normalize, self.resize = normalize, resize
        self.target_size, self.target_channels = target_size, target_channels
        self.reductions = nn.ModuleList()

        self.student_tap = FeatureTap(student, resolve_layer(student, student_layer))
        self.teacher_taps = [] if self.teachers is None else self.teachers.tapped(layers)
        self._shape = input_shape or likely_input_shape(student)
        student_channels, teacher_channels = self._channels(self._shape, transform)
        self._student_channels = student_channels
        if share_transform and len(set(teacher_channels)) > 1:
            raise InputError(f"share_transform needs teachers of equal channel counts, got {teacher_channels}")
        self.translators = nn.ModuleList(
            make_translator(transform, student_channels, channels, batch_norm=transform_batch_norm)
            for channels in ([] if feature_loss == "attention" else teacher_channels[: 1 if share_transform else None])
        )
        warn_of_many_parameters(self.translators)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' cross entropy, the feature term, and what each teacher has in it."""
        logits, student_feature = output_and_feature(self.student_tap, batch.input)
        told = self.told(batch)
        targets = [told[feature_name(number)] for number in range(len(self.teacher_weights))]
        pairs = [self._pair(number, student_feature, target) for number, target in enumerate(targets)]
        distances = [self._distance(translated, target) for translated, target in pairs]
        weighted = torch.stack(
            [weight * distance for weight, distance in zip(self.teacher_weights, distances, strict=True)]
        )
        name = self.feature_loss
        feature_term = weighted.mean() if self.teacher_reduction == "mean" else weighted.sum()
        terms = {"ce": F.cross_entropy(logits, batch.target), name: feature_term}
        if self.kd_weight:
            probs = told["probabilities"]
            terms["kd"] = functional.softened_kl(logits, probs, temperature=self.temperature, from_logits=False)
        if name == "feed" and self.normalize == "sample":
            self.observe("zero_features", torch.stack([zero_share(pair[0], _EPS) for pair in pairs]).mean())
        return terms | {f"{name}_teacher_{number}": distance.detach() for number, distance in enumerate(distances)}

    @torch.no_grad()
    def ask(self, batch: Batch) -> dict[str, Tensor]:
        """Each teacher's reduced feature map, or its paraphraser's code; with ``kd_weight`` also their prediction."""
        ensemble = cast("TeacherEnsemble", self.teachers)
        runs = [partial(output_and_feature, tap) for tap in self.teacher_taps]
        logits, features = zip(*ensemble.each(batch.input, runs), strict=True)
        if self.paraphrasers:
            features = tuple(self._paraphraser(number).encoder(feature) for number, feature in enumerate(features))
        answers = {feature_name(m): self.reductions[m](feature) for m, feature in enumerate(features)}
        if self.kd_weight:
            answers["probabilities"] = ensemble.combined(torch.stack(logits), temperature=self.temperature)
        return answers

    def question(self) -> dict[str, Any]:
        """The reduced sizes, the layers, what the paraphrasers weigh and, with ``kd_weight``, the temperature."""
        asked: dict[str, Any] = {"target_size": self.target_size, "target_channels": self.target_channels}
        asked |= {"temperature": self.temperature} if self.kd_weight else {}
        if self.teachers is not None:
            asked["layers"] = [tap.layers[0] for tap in self.teacher_taps]
            asked["paraphrasers"] = fingerprint(self.paraphrasers)
        return asked

    def weights(self) -> dict[str, float]:
        """One, ``beta`` and ``kd_weight``; the single teachers' distances are only logged."""
        name = self.feature_loss
        kd = {"kd": self.kd_weight} if self.kd_weight else {}
        return {
            "ce": 1.0,
            name: self.beta,
            **kd,
            **{f"{name}_teacher_{m}": 0.0 for m in range(len(self.teacher_weights))},
        }

    def after_compression(self) -> None:
        """See whether the translators can read the student's feature as it is now; `CompressionCallback` calls this.

        Raises:
            InputError: its channels have left.
        """
        check_channels(self.student_tap, self._shape, self._student_channels if len(self.translators) else None)

    def _pair(self, number: int, student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared for teacher ``number``: the translated feature and its target, in one size."""
        translated = student_feature
        if self.translators:
            translated = self.translators[number if len(self.translators) > 1 else 0](student_feature)
        translated = pooled(translated, self.target_size)
        if sites(translated.shape) != sites(teacher_feature.shape):
            self._refuse_or_resize(number, student_feature.shape, teacher_feature.shape)
            if self.resize == "student":
                translated = resized(translated, teacher_feature.shape[2:])
            else:
                teacher_feature = resized(teacher_feature, translated.shape[2:])
        return translated, teacher_feature

    def _distance(self, translated: Tensor, target: Tensor) -> Tensor:
        """``L_m``."""
        if self.feature_loss == "hint":
            return functional.hint_distance(translated, target, reduction=self.reduction)
        if self.feature_loss == "attention":
            return functional.attention_distance(translated, target, reduction=self.reduction)
        return functional.factor_distance(
            translated, target, p=self.norm_p, reduction=self.reduction, normalize=self.normalize, eps=_EPS
        )

    def _channels(
        self, input_shape: Sequence[int], transform: TransformName | TransformFactory
    ) -> tuple[int, list[int]]:
        """One dry forward through every network: the student's channels, and what each translator must give."""
        output, features = self.student_tap.shapes(input_shape)
        student = tuple(features[self.student_tap.layers[0]])
        self.check_output("student", self.student_tap.network, output)
        self._refuse_vectors("student", student, transform)
        student = reduced_shape("student", student, self.target_size, None)
        channels = []
        for number, target in enumerate(self._target_shapes(input_shape, transform)):
            if sites(student) != sites(target):
                self._refuse_or_resize(number, student, target)
            channels.append(width(target))
        return width(student), channels

    def _target_shapes(
        self, input_shape: Sequence[int], transform: TransformName | TransformFactory
    ) -> list[tuple[int, ...]]:
        """Of what each translator's output is compared with, for one sample."""
        if self.teachers is None:
            return stored_shapes(self.teacher_store, self.target_size, self.target_channels)
        shapes = []
        for number, tap in enumerate(self.teacher_taps):
            output, features = tap.shapes(input_shape)
            shape = tuple(features[tap.layers[0]])
            self.check_output(f"teacher {number}", tap.network, output)
            self._refuse_vectors(f"teacher {number}", shape, transform)
            if self.paraphrasers:
                shape = paraphrased_shape(number, self._paraphraser(number), tap.layers[0], shape)
            shapes.append(reduced_shape(f"teacher {number}", shape, self.target_size, self.target_channels))
            self.reductions.append(Reduction(width(shape), size=self.target_size, channels=self.target_channels))
        return shapes

    def _paraphraser(self, number: int) -> Paraphraser:
        return cast("Paraphraser", self.paraphrasers[number])

    def _refuse_vectors(self, who: str, shape: Sequence[int], transform: TransformName | TransformFactory) -> None:
        """A feature that is no map passes only where the user's own module, or nothing, works on it."""
        own = not isinstance(transform, str) or transform == "none"
        fixed = self.feature_loss == "attention" or len(self.paraphrasers) > 0
        if len(shape) != 4 and (fixed or not own):
            way_out = "" if fixed else ", or give a function (C_S, C_T) -> module as transform"
            raise InputError(
                f"FEED: the {who}'s feature has shape {tuple(shape)}, not (N, C, H, W): "
                f"tap a convolutional layer{way_out}"
            )

    def _refuse_or_resize(self, number: int, student: Sequence[int], teacher: Sequence[int]) -> None:
        if self.resize == "none" or len(student) != 4 or len(teacher) != 4:
            layer = repr(self.teacher_taps[number].layers[0]) if self.teacher_taps else "feature in the store"
            raise InputError(
                f"FEED: the student's {self.student_tap.layers[0]!r} gives {tuple(student[1:])} and teacher {number}'s "
                f"{layer} gives {tuple(teacher[1:])}: tap layers of the same spatial "
                "size, or set resize='student' or 'teacher'"
            )
