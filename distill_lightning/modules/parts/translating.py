"""What modules that translate share: how they read a batch, and how their translations are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from distill_lightning.data.batch import IGNORED, Batch, answered_rows, spread
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode
from distill_lightning.lightning_internals import begins_anew, data_module_of, suffix_of_loader
from distill_lightning.modules.parts.evaluation import without_repeated
from distill_lightning.modules.parts.guard import FIRST, STAGES, named
from distill_lightning.modules.parts.search import NoSearch, Search, positions_of
from distill_lightning.modules.parts.vocabulary import (
    check_ids,
    check_longest,
    check_tokenizer,
    check_vocabulary,
    is_token,
    special_ids,
    tokenizer_of,
    told_id,
)
from distill_lightning.networks.libraries import package
from distill_lightning.outputs.metrics import corpus_scores
from distill_lightning.part import Part
from distill_lightning.processes import gathered

Decode = Callable[[Sequence[int]], str]


class Translating(Part):
    """Reads batches of sentence pairs, translates those of an evaluation, and scores the translations.

    The texts of an evaluation are kept until its end, when those of all processes are scored as one corpus.

    Args:
        search: how a translation is found.
        bleu_every: epochs from one validation with translations to the next; 0: there are none in a validation.
        decode: from token ids to a text; ``None``: that of the data module.

    Raises:
        InputError: ``bleu_every`` is negative.
    """

    def __init__(self, search: Search, bleu_every: int, decode: Decode | None) -> None:
        if bleu_every < 0:
            raise InputError(f"bleu_every cannot be negative, got {bleu_every}")
        self.search, self.bleu_every, self.decode = search, bleu_every, decode
        self.signatures: dict[str, str] = {}
        # Which ids the training's words had.
        self.tokenizer: str | None = None
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
            tokens = is_token(target, module.pad_id, special_ids(module).end)
            counted = tokens if batch.counted is None else tokens & spread(batch.counted, tokens)
            batch = batch.replace(counted=counted, is_checked=True)
            if "decoder_input_ids" not in batch.input:
                batch = batch.replace(input={**batch.input, "decoder_input_ids": self._shifted(module, target)})
        self._check_lengths(module, batch)
        return batch

    @staticmethod
    def _shifted(module: Any, target: Tensor) -> Tensor:
        """What the decoder reads: the target one place later."""
        begin = torch.full_like(target[:, :1], _start(module))
        return torch.cat([begin, target[:, :-1].masked_fill(target[:, :-1] == IGNORED, module.pad_id)], dim=1)

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

    def translate(self, module: Any, given: Any, where: str = "the batch") -> Tensor:
        """Token ids of the translations of a batch, ``(N, T')``, those of `answered_rows`."""
        batch = self.read(module, given)
        check_ids(module, batch, where)
        return self._found(module, batch, answered_rows(Batch.of(given)))

    @torch.no_grad()
    def _found(self, module: Any, batch: Batch, rows: Tensor | None) -> Tensor:
        self.search.check(type(module).__name__, module.student)
        # Before anything is computed, refuse what cannot begin.
        start = _start(module, batch)
        with eval_mode(module.student):
            ids = self.search(module.student, batch.input, special_ids(module)._replace(start=start))
        return ids if rows is None else ids[rows]

    def texts(self, module: Any, ids: Tensor) -> list[str]:
        """The texts of token ids ``(N, T)``.

        Raises:
            InputError: neither the module nor its data know how to decode them.
        """
        decode, left_out = self._decoder(module, ""), {module.pad_id, IGNORED}
        # Of the data alone: a student's own may be a word of theirs.
        end = told_id(data_module_of(module), "eos_id")
        rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
        return [decode([token for token in row if token not in left_out]) for row in rows]

    def _decoder(self, module: Any, way_out: str) -> Decode:
        decode: Decode | None = self.decode or getattr(data_module_of(module), "decode", None)
        if decode is None:
            is_lost = "decode" in module._missing  # noqa: SLF001
            lost = ", and the checkpoint could not keep the decode that was given" if is_lost else ""
            raise InputError(
                f"{type(module).__name__}: nobody knows how to make texts of token ids{lost}: give decode, or a data "
                f"module with a method decode{way_out}"
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
        trainer, epochs = module.trainer, module.trainer.current_epoch + 1
        return bool(trainer.state.fn != "fit" or epochs % self.bleu_every == 0 or epochs == trainer.max_epochs)

    def add(
        self, module: Any, batch: Batch, batch_idx: int, stage: str, *, dataloader_idx: int = 0
    ) -> dict[str, list[str]]:
        """Translate a batch of an evaluation, if that is due.

        Returns:
            ``"sources"``, ``"references"`` and ``"translations"`` of the sentences that count; nothing if it is not
            due.
        """
        if not self.is_due(module, stage):
            return {}
        batch = without_repeated(module, batch, batch_idx, dataloader_idx)
        rows = batch.counted_rows
        sources, references = (
            self.texts(module, ids if rows is None else ids[rows]) for ids in (batch.input["input_ids"], batch.target)
        )
        translations = self.texts(module, self._found(module, batch, rows))
        self._pairs.setdefault(dataloader_idx, []).extend(zip(translations, references, strict=True))
        return {"sources": sources, "references": references, "translations": translations}

    def log(self, module: Any, stage: str) -> None:
        """At the end of an evaluation, log the scores of its translations as one corpus."""
        if not self.is_due(module, stage):
            return
        trainer = module.trainer
        loaders = len(trainer.num_val_batches if stage == "val" else trainer.num_test_batches)
        for number in range(loaders):
            pairs = [pair for of_one in gathered(self._pairs.get(number, [])) for pair in of_one]
            scores = corpus_scores([translation for translation, _ in pairs], [reference for _, reference in pairs])
            of = suffix_of_loader(number) if loaders > 1 else ""
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

    def look(self, module: Any, given: Any, number: int, stage: str) -> None:
        """Look at the ids of a batch of a training or an evaluation: on the CPU, elsewhere at an epoch's first ones.

        Raises:
            InputError: the student has no embedding for one.
        """
        if module.device.type == "cpu" or number < FIRST:
            check_ids(module, self.read(module, given), f"{STAGES[stage]} batch {number}")

    def predict_starts(self, module: Any) -> None:
        """See whether the data fit."""
        check_vocabulary(module)
        check_tokenizer(module, self.tokenizer)

    def fit_starts(self, module: Any) -> None:
        """See whether the data fit, and validations can translate, before anything is trained."""
        self.signatures = {}
        check_vocabulary(module)
        check_longest(module)
        if self.bleu_every and not isinstance(self.search, NoSearch):
            self._check(module)

    def training_starts(self, module: Any) -> None:
        """Begin with the data's tokenizer, or see whether it is that of the checkpoint."""
        if begins_anew(module.trainer):
            self.tokenizer = None
        check_tokenizer(module, self.tokenizer)
        self.tokenizer = tokenizer_of(module) or self.tokenizer

    def state_dict(self) -> dict[str, Any] | None:
        """By which tokenizer the data were read."""
        return None if self.tokenizer is None else {"tokenizer": self.tokenizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.tokenizer = state["tokenizer"]

    def validation_starts(self, module: Any) -> None:
        """Each has texts of its own."""
        self._pairs = {}
        if module.trainer.state.fn != "fit":
            self.predict_starts(module)

    def test_starts(self, module: Any) -> None:
        """See whether the data fit, and it can translate."""
        self._pairs = {}
        self.predict_starts(module)
        if not isinstance(self.search, NoSearch):
            self._check(module)

    def fit_ends(self, module: Any) -> None:
        """Tell by which rules the validations were scored."""
        self._tell()

    def _check(self, module: Any) -> None:
        self.search.check(type(module).__name__, module.student)
        self._decoder(module, "; or, for neither BLEU nor chrF, beam=NoSearch()")
        package("sacrebleu", extra="translation")


def _start(module: Any, batch: Batch | None = None) -> int:
    start = special_ids(module, batch).start
    if start is None:
        raise InputError(
            f"{type(module).__name__}: nobody knows what the decoder begins with: let batches have decoder_input_ids, "
            f"the data module a bos_id, or the student ({type(module.student).__name__}) a "
            "config.decoder_start_token_id"
        )
    return start
