"""What modules that translate have in common, whatever they are trained by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.data.transforms import LabelSmoothing
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.parts.search import Search
from distill_lightning.modules.parts.translating import Decode, Translating
from distill_lightning.teachers.layer_errors import explained


class Translates(DistillationModule):
    """What modules have in common whose student translates; methods stand beside it in a module's bases.

    A batch's input is a dict of ``input_ids`` and ``attention_mask`` ``(N, S)`` and ``decoder_input_ids`` ``(N, T)``,
    its target the ids ``(N, T)``. Without ``decoder_input_ids`` the decoder reads the target one place later, behind
    the data's ``bos_id`` or else the student's ``config.decoder_start_token_id``, so that what transformers'
    ``DataCollatorForSeq2Seq`` collates is understood. Neither targets of ``pad_id`` nor of -100 count; where the
    sentences' end has that id, too, the first one in a row does. Whatever the logits there are, neither the loss nor
    its gradient in the logits depends on them.

    Translations begin with what ``decoder_input_ids`` begin with, or where a batch has none, with the ids above; they
    end with the ``eos_id`` of the data module or its tokenizer, or else the student's. A training, and every
    evaluation, begin by comparing the data's ``pad_id``, number of ids and longest sentence with the module's and the
    student's, and the ``digest`` of its ``tokenizer``, if it has one, with that of the training, which a checkpoint
    holds. Where a batch is looked at, padding that ``attention_mask`` does not leave out is refused, too.

    Validation and test log ``nll`` (nats per token), ``perplexity``, ``accuracy`` and ``ece`` of the tokens that count,
    each after the true ones before it; and ``bleu`` and ``chrf`` of the translations, 0 to 100, as one corpus, whatever
    the number of processes and batches. `signatures` say how the latter two were computed, and are told at the end.
    What a step returns has, where it translates, the texts ``"sources"``, ``"references"`` and ``"translations"`` for
    callbacks.
    """

    per_position = True
    translating: Translating

    def prepare_to_translate(
        self, pad_id: int, label_smoothing: float, beam: Search, bleu_every: int, decode: Decode | None
    ) -> None:
        """Take the options that the modules share, once the base class has been initialised."""
        if not isinstance(pad_id, int) or not 0 <= pad_id < self.output.num_classes:
            raise InputError(
                f"{type(self).__name__}: pad_id must be an id below num_classes={self.num_classes}, got {pad_id}: give "
                "the tokenizer's"
            )
        if not 0 <= label_smoothing < 1:
            raise InputError(f"{type(self).__name__}: label_smoothing must be in [0, 1), got {label_smoothing}")
        if label_smoothing:
            self.transforms = (*self.transforms, LabelSmoothing(label_smoothing))
        self.pad_id = pad_id
        self.translating = Translating(beam, bleu_every, decode)

    @property
    def signatures(self) -> dict[str, str]:
        """How sacrebleu has computed the last scores, by the scores' names; empty before there are any."""
        return self.translating.signatures

    def read_batch(self, batch: Any) -> Batch:
        """The batch with padding that does not count, and what the decoder reads."""
        return self.translating.read(self, batch)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The student's output for its inputs, or for a batch with targets.

        Raises:
            InputError: the batch has neither targets nor ``decoder_input_ids``.
        """
        if not named and len(inputs) == 1 and not isinstance(inputs[0], Tensor):
            batch = self.read_batch(inputs[0])
            if "decoder_input_ids" not in batch.input:
                raise InputError(
                    f"{type(self).__name__}: the batch has neither targets nor decoder_input_ids, and logits are those "
                    "of given translations: call translate(batch)"
                )
        return super().forward(*inputs, **named)

    def respond(self, batch: Batch) -> Tensor:
        """The student's logits for a batch; those of padding get no gradient, even where they are not finite."""
        logits, counted = super().respond(batch), batch.counted
        if counted is not None and counted.ndim > 1 and logits.requires_grad:
            hook: Any = logits.register_hook
            hook(lambda gradient: gradient.masked_fill(~counted[..., None], 0))
        return logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the ids, as at the labels."""
        self.translating.look(self, batch, batch_idx, "train")
        super().on_train_batch_start(batch, batch_idx)

    def on_predict_start(self) -> None:
        """See whether the data fit."""
        self.translating.predict_starts(self)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the metrics and translate it, in the epochs that are due."""
        return self._evaluate(super().validation_step, batch, batch_idx, dataloader_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to the metrics and translate it."""
        return self._evaluate(super().test_step, batch, batch_idx, dataloader_idx, "test")

    def _evaluate(self, step: Any, batch: Any, number: int, loader: int, stage: str) -> dict[str, Any]:
        batch = self.read_batch(batch)
        self.translating.look(self, batch, number, stage)
        found: dict[str, Any] = step(batch, number, loader)
        return found | self.translating.add(self, batch, number, stage, dataloader_idx=loader)

    def on_validation_epoch_end(self) -> None:
        """Score the translations."""
        self.translating.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Score the translations, and tell how."""
        self.translating.log(self, "test")

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Token ids ``(N, T')`` of the translations of a batch; `texts` makes texts of them.

        Targets, if there are some, are not looked at: one that is -100 throughout has a translation, too.
        """
        return explained(
            self,
            lambda one: self.translating.translate(self, one, f"prediction batch {batch_idx}"),
            Batch.of(batch),
            f"prediction batch {batch_idx}",
        )

    def texts(self, ids: Tensor) -> list[str]:
        """The texts of token ids ``(N, T)``, by ``decode`` or the data module's method of that name.

        Each is cut before the first ``eos_id`` of the data.

        Raises:
            InputError: there is neither.
        """
        return self.translating.texts(self, ids)

    def translate(self, batch: Any) -> list[str]:
        """The translations of a batch, without those of sentences that only fill it up.

        Args:
            batch: of any data module, on the module's device; its target may be missing.

        Raises:
            InputError: the student cannot translate, or nobody knows how to decode its ids.
        """
        return self.texts(self.translating.translate(self, batch))
