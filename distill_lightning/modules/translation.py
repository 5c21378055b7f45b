"""Machine translation: plain training, and Self-KD with a soft target for each target token."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.data.transforms import LabelSmoothing
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.alpha import AlphaSchedule
from distill_lightning.modules.parts.past import Past, PastModel, StoredPast
from distill_lightning.modules.parts.search import BeamSearch, Search
from distill_lightning.modules.parts.translating import Decode, Translating
from distill_lightning.modules.self_kd import SelfKDModule
from distill_lightning.outputs import Tokens
from distill_lightning.teachers.layer_errors import explained


class Translates(DistillationModule):
    """What modules have in common whose student translates; methods stand beside it in a module's bases.

    A batch's input is a dict of ``input_ids`` and ``attention_mask`` ``(N, S)`` and ``decoder_input_ids`` ``(N, T)``,
    its target the ids ``(N, T)``. Without ``decoder_input_ids`` the decoder reads the target one place later, behind
    the ``config.decoder_start_token_id`` of the student, so that what transformers' ``DataCollatorForSeq2Seq`` collates
    is understood. Neither targets of ``pad_id`` nor of -100 count.

    Validation and test log ``nll`` (nats per token), ``perplexity``, ``accuracy`` and ``ece`` of the tokens that count,
    each after the true ones before it; and ``bleu`` and ``chrf`` of the translations, 0 to 100, as one corpus, whatever
    the number of processes and batches. `signatures` say how the latter two were computed, and are told at the end.
    What a step returns has, where it translates, the texts ``"translations"`` and ``"references"`` for callbacks.
    """

    per_position = True
    translating: Translating

    def begins_to_translate(
        self, pad_id: int, label_smoothing: float, beam: Search, bleu_every: int, decode: Decode | None
    ) -> None:
        """Take the options that the modules share, once the base class has been initialised."""
        if not 0 <= pad_id < self.output.num_classes:
            raise InputError(
                f"{type(self).__name__}: pad_id must be an id below num_classes={self.num_classes}, got {pad_id}: give "
                "the tokenizer's"
            )
        if not 0 <= label_smoothing < 1:
            raise InputError(f"{type(self).__name__}: label_smoothing must be in [0, 1), got {label_smoothing}")
        if label_smoothing:
            self.transforms = (*self.transforms, LabelSmoothing(label_smoothing))
        self.pad_id = pad_id
        self.translating = Translating(pad_id, beam, bleu_every, decode)

    @property
    def signatures(self) -> dict[str, str]:
        """How sacrebleu has computed the last scores, by the scores' names; empty before there are any."""
        return self.translating.signatures

    def read_batch(self, batch: Any) -> Batch:
        """The batch with padding that does not count, and what the decoder reads."""
        return self.translating.read(self, batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the metrics and translate it, in the epochs that are due."""
        return self._evaluate(super().validation_step, batch, batch_idx, dataloader_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the metrics and translate it."""
        return self._evaluate(super().test_step, batch, batch_idx, dataloader_idx, "test")

    def _evaluate(self, step: Any, batch: Any, number: int, loader: int, stage: str) -> dict[str, Any]:
        batch = self.read_batch(batch)
        found: dict[str, Any] = step(batch, number, loader)
        return found | self.translating.add(self, batch, number, stage, dataloader_idx=loader)

    def on_validation_epoch_end(self) -> None:
        """Score the translations."""
        self.translating.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Score the translations, and tell how."""
        self.translating.log(self, "test")

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Token ids ``(N, T')`` of the translations of the sentences that count; `texts` makes texts of them."""
        return explained(
            self,
            lambda one: self.translating.translate(self, one),
            self.read_batch(batch),
            f"prediction batch {batch_idx}",
        )

    def texts(self, ids: Tensor) -> list[str]:
        """The texts of token ids ``(N, T)``, by ``decode`` or the data module's method of that name.

        Raises:
            InputError: there is neither.
        """
        return self.translating.texts(self, ids)

    def translate(self, batch: Any) -> list[str]:
        """The translations of the sentences of a batch that count.

        Args:
            batch: of any data module, on the module's device; its target may be missing.

        Raises:
            InputError: the student cannot translate, or nobody knows how to decode its ids.
        """
        return self.texts(self.translating.translate(self, self.read_batch(batch)))


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
        bleu_every: epochs from one validation that translates to the next, which takes longer than all else in it; 0:
            only a test translates.
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
        self.begins_to_translate(pad_id, label_smoothing, beam, bleu_every, decode)

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
        self.begins_to_translate(pad_id, label_smoothing, beam, bleu_every, decode)
