"""What modules that translate share: how they read a batch, and how their translations are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from distill_lightning.data.batch import IGNORED, Batch, spread
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode
from distill_lightning.lightning_internals import repeated_rows
from distill_lightning.modules.parts.guard import named
from distill_lightning.modules.parts.search import NoSearch, Search, positions_of
from distill_lightning.networks.libraries import package
from distill_lightning.outputs.metrics import corpus_scores
from distill_lightning.part import Part
from distill_lightning.processes import gathered

Decode = Callable[[Sequence[int]], str]


class Translating(Part):
    """Reads batches of sentence pairs, translates those of an evaluation, and scores the translations.

    The texts of an evaluation are kept until its end, when those of all processes are scored as one corpus.

    Args:
        pad_id: what sources and targets are filled up with.
        search: how a translation is found.
        bleu_every: epochs from one validation with translations to the next; 0: there are none in a validation.
        decode: from token ids to a text; ``None``: that of the data module.

    Raises:
        InputError: a number is negative.
    """

    def __init__(self, pad_id: int, search: Search, bleu_every: int, decode: Decode | None) -> None:
        for name, value in (("pad_id", pad_id), ("bleu_every", bleu_every)):
            if value < 0:
                raise InputError(f"{name} cannot be negative, got {value}")
        self.pad_id, self.search, self.bleu_every, self.decode = pad_id, search, bleu_every, decode
        self.signatures: dict[str, str] = {}
        # Translation and reference, by the number of the data loader.
        self._pairs: dict[int, list[tuple[str, str]]] = {}

    # Batches

    def read(self, module: Any, given: Any) -> Batch:
        """A batch whose padding does not count, and with what the decoder reads.

        Raises:
            InputError: it does not hold sentences, one is too long, or it cannot be known what the decoder begins with.
        """
        batch = Batch.of(given)
        who, target = type(module).__name__, batch.target
        if not isinstance(batch.input, Mapping) or "input_ids" not in batch.input:
            raise InputError(
                f"{who}: the input of a batch must be a dict with input_ids, attention_mask and decoder_input_ids, got "
                f"{type(batch.input).__name__}: use a data module of sentence pairs, TranslationDataModule for example"
            )
        if isinstance(target, Tensor) and not target.is_floating_point():
            tokens = (target != self.pad_id) & (target != IGNORED)
            counted = tokens if batch.counted is None else tokens & spread(batch.counted, tokens)
            batch = batch.replace(counted=counted, is_checked=True)
            if "decoder_input_ids" not in batch.input:
                first = self._first(who, module.student)
                batch = batch.replace(input={**batch.input, "decoder_input_ids": self._shifted(target, first)})
        self._check_lengths(module, batch)
        return batch

    def _shifted(self, target: Tensor, first: int) -> Tensor:
        """What the decoder reads: the target one place later."""
        begin = torch.full_like(target[:, :1], first)
        return torch.cat([begin, target[:, :-1].masked_fill(target[:, :-1] == IGNORED, self.pad_id)], dim=1)

    @staticmethod
    def _first(who: str, student: Any) -> int:
        first = getattr(getattr(student, "config", None), "decoder_start_token_id", None)
        if first is None:
            raise InputError(
                f"{who}: the batch has no decoder_input_ids, and the student ({type(student).__name__}) no "
                "config.decoder_start_token_id to begin them with: let the data module give them"
            )
        return int(first)

    def _check_lengths(self, module: Any, batch: Batch) -> None:
        positions = positions_of(module.student)
        for side, name in (("source", "input_ids"), ("target", "decoder_input_ids")):
            ids = batch.input.get(name)
            if positions is None or ids is None or ids.shape[1] <= positions:
                continue
            counts = batch.input.get("attention_mask") if name == "input_ids" else batch.counted
            tokens = torch.ones_like(ids) if counts is None else counts
            lengths = tokens.sum(dim=1)
            row = int(lengths.argmax())
            raise InputError(
                f"{type(module).__name__}: the {side} of sample {named(batch, [row])} has {int(lengths[row])} tokens "
                f"(filled up to {ids.shape[1]}), and the student ({type(module.student).__name__}) positions for "
                f"{positions}: leave it out, or build the network with max_length={ids.shape[1]} or more"
            )

    # Translations

    @torch.no_grad()
    def translate(self, module: Any, batch: Batch) -> Tensor:
        """Token ids of the translations of the sentences that count, ``(N, T')``."""
        self.search.check(type(module).__name__, module.student)
        with eval_mode(module.student):
            ids = self.search(module.student, batch.input)
        rows = sentences(batch)
        return ids if rows is None else ids[rows]

    def texts(self, module: Any, ids: Tensor) -> list[str]:
        """The texts of token ids ``(N, T)``.

        Raises:
            InputError: neither the module nor its data know how to decode them.
        """
        decode, left_out = self._decoder(module), {self.pad_id, IGNORED}
        return [decode([token for token in row if token not in left_out]) for row in ids.tolist()]

    def _decoder(self, module: Any) -> Decode:
        trainer = getattr(module, "_trainer", None)
        data = getattr(trainer, "datamodule", None)
        # The data module within an IndexedDataModule.
        data = vars(data).get("datamodule", data) if data is not None else None
        decode: Decode | None = self.decode or getattr(data, "decode", None)
        if decode is None:
            raise InputError(
                f"{type(module).__name__}: nobody knows how to make texts of token ids, which BLEU and chrF need: give "
                "decode, a data module with a method decode, or beam=NoSearch()"
            )
        return decode

    def is_due(self, module: Any, stage: str) -> bool:
        """Whether an evaluation of this stage, ``"val"`` or ``"test"``, translates."""
        if isinstance(self.search, NoSearch):
            return False
        if stage == "test":
            return True
        if self.bleu_every == 0:
            return False
        trainer = module.trainer
        return bool(trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.bleu_every == 0)

    def add(
        self, module: Any, batch: Batch, batch_idx: int, stage: str, *, dataloader_idx: int = 0
    ) -> dict[str, list[str]]:
        """Translate a batch of an evaluation, if that is due.

        Returns:
            ``"translations"`` and ``"references"``, those of the sentences that count; nothing if it is not due.
        """
        if not self.is_due(module, stage):
            return {}
        repeated = repeated_rows(module, batch_idx, dataloader_idx, batch.size)
        if repeated is not None and batch.counted is not None:
            batch = batch.replace(counted=batch.counted & ~repeated.to(batch.device)[:, None], is_checked=True)
        rows = sentences(batch)
        references = self.texts(module, batch.target if rows is None else batch.target[rows])
        translations = self.texts(module, self.translate(module, batch))
        self._pairs.setdefault(dataloader_idx, []).extend(zip(translations, references, strict=True))
        return {"translations": translations, "references": references}

    def log(self, module: Any, stage: str) -> None:
        """At the end of an evaluation, log the scores of its translations as one corpus."""
        if not self.is_due(module, stage):
            return
        trainer = module.trainer
        loaders = len(trainer.num_val_batches if stage == "val" else trainer.num_test_batches)
        for number in range(loaders):
            pairs = [pair for of_one in gathered(self._pairs.get(number, [])) for pair in of_one]
            scores = corpus_scores([translation for translation, _ in pairs], [reference for _, reference in pairs])
            of = f"/dataloader_idx_{number}" if loaders > 1 else ""
            for name, score in scores.items():
                self.signatures[name] = score.signature
                # All processes have computed the same.
                told = {"on_step": False, "on_epoch": True, "sync_dist": True, "add_dataloader_idx": False}
                module.log(f"{stage}/{name}{of}", score.value, **told)
        self._pairs = {}
        if trainer.state.fn != "fit":
            self._tell()

    def _tell(self) -> None:
        for name, signature in self.signatures.items():
            rank_zero_info(f"{name}: {signature}")

    # Moments

    def fit_starts(self, module: Any) -> None:
        """See whether validations can translate before anything is trained."""
        self.signatures = {}
        if self.bleu_every and not isinstance(self.search, NoSearch):
            self._check(module)

    def validation_starts(self, module: Any) -> None:
        """Each has texts of its own."""
        self._pairs = {}

    def test_starts(self, module: Any) -> None:
        """See whether it can translate."""
        self._pairs = {}
        if not isinstance(self.search, NoSearch):
            self._check(module)

    def fit_ends(self, module: Any) -> None:
        """Tell by which rules the validations were scored."""
        self._tell()

    def _check(self, module: Any) -> None:
        self.search.check(type(module).__name__, module.student)
        self._decoder(module)
        package("sacrebleu", extra="translation")


def sentences(batch: Batch) -> Tensor | None:
    """Which sentences of a batch have anything that counts, bool ``(N,)``; ``None``: all."""
    counted = batch.counted
    return counted.any(dim=1) if counted is not None and counted.ndim > 1 else counted
