"""FEED: feature-level ensemble distillation, teachers in parallel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, check_finite
from distill_lightning.layers import FeatureTap, resolve_layer
from distill_lightning.layers.call import outputs_of
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.distances import Distance, FactorDistance, LogitTerm, make_translators
from distill_lightning.modules.parts.sizes import EqualSizes, Sizes, channels_of
from distill_lightning.networks import likely_input_shape
from distill_lightning.teachers import Features, Given, Teachers


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

    With ``output: Gaussian`` in place of ``num_classes`` the labels' term is the Gaussian's negative log-likelihood,
    ``train/nll``, and ``logit_term`` the divergence from the teachers' Gaussian.

    ``distance`` puts another ``L_m`` in its place, for comparisons under the same teachers; the logged names then begin
    with its name. `FactorDistance` with ``paraphrasers`` is Factor Transfer.

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
        teachers: a network, several, a `TeacherEnsemble`, whose ``weights`` count for ``logit_term`` alone, or a
            `TeacherStore`, which keeps the feature maps (or their paraphrasers' codes) and predictions.
        num_classes: ``K``.
        student_layer: dotted path (or glob) of the student's last feature map: after its last ReLU, before pooling.
        teacher_layers: the same for the teachers: one for all, or one each; ``None``: as the student's.
        channels: where those layers have their channels, ``"first"``, ``(N, C, H, W)``, or ``"last"``,
            ``(N, H, W, C)``: one for all networks, or one each, the student's and then the teachers'; ``None``: as the
            network's own operations tell, see `layers.FeatureTap`.
        beta: weight of the feature term; ``None``: the distance's own, 500 for `FactorDistance`, 1 for `HintDistance`,
            1000 for `AttentionDistance`. These belong to a mean over entries; for ``reduction="sum"`` divide them by
            the number of entries. 500 is Factor Transfer's for ``D = 4096``, and each ``L_m`` is about
            ``0.8 / sqrt(D_m)`` at the start.
        distance: ``L_m``, with its translators.
        sizes: at which rows and columns features of different sizes are compared; `EqualSizes` refuses them.
        teacher_reduction: ``"sum"`` over teachers, or their ``"mean"``, which keeps ``beta`` independent of ``M``.
        teacher_weights: ``w_m``, used as given; ``None``: all 1.
        paraphrasers: trained `Paraphraser` networks, one per teacher (`ParaphraserModule` trains them): the targets
            become their codes, as in Factor Transfer. Frozen.
        logit_term: an additional term; ``None``: there is none. Its temperature is a classifier's.
        options: see `TrainingOptions`. Without an ``input_shape`` the channel counts are found at 32x32.

    Raises:
        InputError: a layer that does not exist or does not give one feature map, channels that may be in any of its
            dimensions, a feature without a graph (see `layers.FeatureTap`), sizes that do not match, a network
            with another number of classes, or an option out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Given = None,
        *,
        num_classes: int | None = None,
        student_layer: str,
        teacher_layers: str | Sequence[str] | None = None,
        channels: Channels | Sequence[Channels | None] | None = None,
        beta: float | None = None,
        distance: Distance = FactorDistance(),
        sizes: Sizes = EqualSizes(),
        teacher_reduction: Literal["sum", "mean"] = "sum",
        teacher_weights: Sequence[float] | None = None,
        paraphrasers: Sequence[nn.Module] | nn.ModuleList | None = None,
        logit_term: LogitTerm | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, **options)
        if teachers is None:
            raise InputError("FEED: there are no teachers: give networks, or a complete TeacherStore")
        self.distance, self.sizes, self.logit_term = distance, sizes, logit_term
        self.beta = distance.beta if beta is None else beta
        self.teacher_reduction = teacher_reduction
        if paraphrasers and distance.translator is None:
            raise InputError(f"FEED: {type(distance).__name__} does not use paraphrasers: leave them out")
        own, others = (channels, channels) if channels is None or isinstance(channels, str) else _split(channels)
        features = Features(
            student_layer if teacher_layers is None else teacher_layers,
            channels=others,
            # Copies, so that those that were given can be trained on.
            paraphrasers=copy.deepcopy(list(paraphrasers or ())),
            size=sizes.pooled,
        )
        kd = [] if logit_term is None else [logit_term.question(self.output)]
        self.teachers = Teachers(teachers, ask=[features, *kd])
        self.student_tap = FeatureTap(student, resolve_layer(student, student_layer), channels=own)
        self.probed_shape = self.input_shape or likely_input_shape(student)
        source, targets = self._shapes(features)
        self.teacher_weights = [1.0] * len(targets) if teacher_weights is None else [float(w) for w in teacher_weights]
        if len(self.teacher_weights) != len(targets):
            raise InputError(f"FEED: {len(self.teacher_weights)} teacher_weights for {len(targets)} teachers: one each")
        check_finite("FEED: beta", self.beta)
        check_finite("FEED: teacher_weights", *self.teacher_weights)
        if not min(self.beta, *self.teacher_weights) >= 0:
            raise InputError(f"FEED: beta and teacher_weights cannot be negative: {self.beta}, {self.teacher_weights}")
        if teacher_reduction not in ("sum", "mean"):
            raise InputError(f"FEED: teacher_reduction must be sum or mean, got {teacher_reduction!r}")
        self.translators = make_translators(distance, channels_of(source), [channels_of(target) for target in targets])
        self._channels = channels_of(source) if len(self.translators) else None

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' cross entropy, the feature term, and what each teacher has in it."""
        logits, feature = self._logits_and_feature(batch)
        targets = self.teachers.features(batch)
        counted = self.output.counted(logits, batch)
        pairs = [self.sizes(self._translated(m, feature), target) for m, target in enumerate(targets)]
        distances = [self.distance.over_counted(translated, target, counted) for translated, target in pairs]
        weighted = torch.stack([w * distance for w, distance in zip(self.teacher_weights, distances, strict=True)])
        name = self.distance.name
        terms = {
            self.output.label_term: self.output.label_loss(logits, batch),
            name: weighted.mean() if self.teacher_reduction == "mean" else weighted.sum(),
        }
        if self.logit_term is not None:
            teacher = self.teachers.distribution(batch)
            terms["kd"] = self.output.divergence(logits, teacher, batch, temperature=self.logit_term.temperature)
        for observed, value in self.distance.observed([translated for translated, _ in pairs], counted).items():
            self.observe(observed, value)
        return terms | {f"{name}_teacher_{m}": distance.detach() for m, distance in enumerate(distances)}

    def weights(self) -> dict[str, float]:
        """One, ``beta`` and the logit term's weight; the single teachers' distances are only logged."""
        name = self.distance.name
        kd = {} if self.logit_term is None else {"kd": self.logit_term.weight}
        single = {f"{name}_teacher_{m}": 0.0 for m in range(len(self.teacher_weights))}
        return {self.output.label_term: 1.0, name: self.beta, **kd, **single}

    def after_compression(self) -> None:
        """See whether the translators can read the student's feature as it is now; `CompressionCallback` calls this.

        Raises:
            InputError: its channels have left.
        """
        layer = self.student_tap.layers[0]
        now = channels_of(self.student_tap.shapes(self.probed_shape)[1][layer])
        if self._channels is not None and now != self._channels:
            raise InputError(
                f"FEED: the student's {layer!r} gives {now} channels, and the translators read {self._channels}: give "
                f"the step that prunes them exclude=..., naming the layer that {layer!r} ends with"
            )

    def _logits_and_feature(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, features = outputs_of(self.student_tap, batch.input)
        return logits, features[self.student_tap.layers[0]]

    def _translated(self, number: int, feature: Tensor) -> Tensor:
        if not self.translators:
            return feature
        translated: Tensor = self.translators[number % len(self.translators)](feature)
        return translated

    def _shapes(self, asked: Features) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """One dry forward of every network: shapes of the student's feature, and of what it is compared with."""
        output, features = self.student_tap.shapes(self.probed_shape)
        self.check_output("student", self.student, output)
        source = tuple(features[self.student_tap.layers[0]])
        maps_only = self.distance.translator is None or self.distance.translator.maps_only or asked.paraphrasers
        if asked.paraphrasers and len(asked.paraphrasers) != len(self.teachers):
            raise InputError(
                f"FEED: {len(asked.paraphrasers)} paraphrasers for {len(self.teachers)} teachers: give one each; a "
                "store alone holds their codes"
            )
        targets = []
        for number, shape in enumerate(self.teachers.shapes(self.probed_shape)):
            for who, found in (("student", source), (f"teacher {number}", shape)):
                if len(found) != 4 and maps_only:
                    raise InputError(
                        f"FEED: the {who}'s feature has shape {found}, not (N, C, H, W): tap a convolutional layer, or "
                        "give the distance translator=FunctionTranslator(...)"
                    )
            layer = self.teachers.taps[number].layers[0] if self.teachers.taps else "feature in the store"
            self.sizes.check(
                source,
                shape,
                f"FEED: the student's {self.student_tap.layers[0]!r} gives {source[1:]} and teacher {number}'s "
                f"{layer!r} gives {tuple(shape[1:])}",
            )
            targets.append(asked.shape_of(number, shape) if self.teachers.taps else shape)
        return source, targets


def _split(channels: Sequence[Channels | None]) -> tuple[Channels | None, Sequence[Channels | None]]:
    if not channels:
        raise InputError("FEED: channels is empty: name the student's and then the teachers', or leave it out")
    return channels[0], channels[1:]
