"""Machine translation: plain training, and Self-KD with a soft target for each target token."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.alpha import AlphaSchedule
from distill_lightning.modules.parts.past import Past, PastModel, StoredPast
from distill_lightning.modules.parts.search import BeamSearch, Search
from distill_lightning.modules.parts.translating import Decode
from distill_lightning.modules.self_kd import SelfKDModule
from distill_lightning.modules.translates import Translates
from distill_lightning.outputs import Tokens


def _with_tokens(num_classes: int, options: TrainingOptions) -> TrainingOptions:
    """Options in which the output is one of tokens, unless it is given."""
    return options if options.get("output") is not None else {**options, "output": Tokens(num_classes)}


class TranslationModule(Translates):
    r"""Plain training of a translator: the mean cross entropy over the target tokens that count, ``train/ce``.

    .. math:: L = -\frac{1}{\sum_{ij} m_{ij}} \sum_{ij} m_{ij} \sum_{k=1}^{K} q_{ijk} \log \mathrm{softmax}(z_{ij})_k,
        \qquad q_{ij} = (1 - \epsilon) \, y_{ij} + \epsilon / K

    with logits ``z`` ``(N, T, K)``, the one-hot tokens ``y`` and ``m``, 1 where they count. Several processes weigh
    their means by their tokens, so that it is the mean over all of them.

    ::

        model:
          class_path: TranslationModule
          init_args:
            student: {class_path: translation_transformer, init_args: {num_classes: 8000, width: 256}}
            num_classes: 8000
            pad_id: 0
            label_smoothing: 0.1

    Args:
        student: the network that learns; maps the inputs of `Translates` to logits ``(N, T, K)``, and ``generate``\ s
            translations as networks of the transformers library do.
        num_classes: ``K``, the number of token ids.
        pad_id: what sources and targets are filled up with.
        label_smoothing: :math:`\epsilon` in ``[0, 1)``.
        beam: how translations are found: `BeamSearch`, or `NoSearch`, with which neither BLEU nor chrF are computed.
        bleu_every: epochs from one validation that translates to the next, which takes longer than all else in it; the
            last of ``max_epochs`` does, too. 0: only a test translates. A callback that monitors ``val/bleu`` needs the
            same number: ``ModelCheckpoint(monitor="val/bleu", mode="max", every_n_epochs=...)``.
        decode: from a sequence of token ids to a text without special tokens; ``None``: the data module's method of
            that name.
        options: see `TrainingOptions`.

    Raises:
        InputError: an option is out of range; in training: the student does not fit, a sentence is longer than it has
            positions for, or translations are asked for and it has no ``generate``, or nobody knows how to decode.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        pad_id: int,
        label_smoothing: float = 0.0,
        beam: Search = BeamSearch(),
        bleu_every: int = 1,
        decode: Decode | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, **_with_tokens(num_classes, options))
        self.prepare_to_translate(pad_id, label_smoothing, beam, bleu_every, decode)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The tokens' negative log-likelihood, mean over those that count."""
        return {"ce": self.output.label_loss(self.respond(batch), batch)}

    def weights(self) -> dict[str, float]:
        """One."""
        return {"ce": 1.0}


class SelfKDTranslationModule(Translates, SelfKDModule):
    r"""Self-KD of a translator: each target token is refined by what the network itself said of it before.

    .. math:: L = -\frac{1}{\sum_{ij} m_{ij}} \sum_{ij} m_{ij} \sum_{k=1}^{K} q_{ijk} \log \mathrm{softmax}(z_{ij})_k,
        \qquad q_{ij} = (1 - \alpha_t) \left[ (1 - \epsilon) \, y_{ij} + \epsilon / K \right]
        + \alpha_t \, p_{t-1}(\cdot \mid x_i, y_{i, <j})

    with logits ``z`` ``(N, T, K)``, the one-hot tokens ``y``, ``m``, 1 where they count, and the past network's
    prediction :math:`p_{t-1}` for the same source and the same true tokens before. All else is as in `SelfKDModule`.
    Tokens have no fixed rows in which predictions could be kept: ``past`` is a network. The paper reports translation
    and does not tell how; that each token has a soft target, and that the past network is in eval mode, is this
    package's reading.

    Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    https://arxiv.org/abs/2006.12000

    ::

        model:
          class_path: SelfKDTranslationModule
          init_args:
            student: {class_path: translation_transformer, init_args: {num_classes: 8000, width: 256}}
            num_classes: 8000
            pad_id: 0
            alpha_T: 0.5

    Args:
        student: see `TranslationModule`.
        num_classes: ``K``, the number of token ids.
        pad_id: see `TranslationModule`.
        alpha_T: see `SelfKDModule`; 0 is `TranslationModule`, bit for bit.
        alpha_schedule: see `SelfKDModule`.
        alpha_unit: see `SelfKDModule`.
        total_epochs: see `SelfKDModule`.
        past: `PastModel` or `MovingAverage`.
        past_temperature: see `SelfKDModule`.
        label_smoothing: :math:`\epsilon` in ``[0, 1)``.
        beam: see `TranslationModule`.
        bleu_every: see `TranslationModule`.
        decode: see `TranslationModule`.
        options: see `TrainingOptions`.

    Raises:
        InputError: as `TranslationModule` and `SelfKDModule`, or ``past`` is `StoredPast`.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        pad_id: int,
        alpha_T: float = 0.8,  # noqa: N803  # the paper's name
        alpha_schedule: AlphaSchedule = "linear",
        alpha_unit: Literal["epoch", "step"] = "epoch",
        total_epochs: int | None = None,
        past: Past = PastModel(),
        past_temperature: float = 1.0,
        label_smoothing: float = 0.0,
        beam: Search = BeamSearch(),
        bleu_every: int = 1,
        decode: Decode | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        if isinstance(past, StoredPast):
            raise InputError(
                "SelfKDTranslationModule: StoredPast keeps one row for each sample, and tokens have none: use "
                "past=PastModel() or past=MovingAverage()"
            )
        super().__init__(
            student,
            num_classes=num_classes,
            alpha_T=alpha_T,
            alpha_schedule=alpha_schedule,
            alpha_unit=alpha_unit,
            total_epochs=total_epochs,
            past=past,
            past_temperature=past_temperature,
            **_with_tokens(num_classes, options),
        )
        self.prepare_to_translate(pad_id, label_smoothing, beam, bleu_every, decode)
