"""Pairs of sentences, tokenized and in batches of similar length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Unpack

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules.translation.corpus import Corpus, Faults, Pair, read_lines
from distill_lightning.data.datamodules.translation.dataset import TranslationDataset
from distill_lightning.data.datamodules.translation.length_sampler import (
    LengthSampler,
    SameLengthSampler,
    check_max_tokens,
)
from distill_lightning.data.datamodules.translation.libreoffice import LibreOfficeHelp
from distill_lightning.data.datamodules.translation.pair_options import PairOptions
from distill_lightning.data.datamodules.translation.parallel_text import ParallelText
from distill_lightning.data.datamodules.translation.splits import Dealt, deal, texts
from distill_lightning.data.datamodules.translation.tokenizer import (
    PAD,
    BytePairTokenizer,
    cache_folder,
    check_vocab_size,
    kept_tokenizer,
)
from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.errors import InputError, check_count

# Pairs for validation and for test, where there are no files for them.
_DRAWN = 1000


class TranslationDataModule(ViewDataModule):
    r"""Sentences and their translations, for networks with an encoder and a decoder.

    A batch of ``N`` pairs, of at most ``S`` source and ``T`` target ids, is a `Batch` of int64 tensors: ``input`` is
    ``{"input_ids": (N, S), "attention_mask": (N, S), "decoder_input_ids": (N, T)}``, ``target`` ``(N, T)``. Sentences
    end with id 2 and are padded by id 0; the decoder reads id 1, then the target up to the id before its last.

    By default the text is LibreOffice's help, two packages of Debian; with ``data_dir`` it is in that folder, plain
    parallel text or IWSLT's own files: see `ParallelText`, `LibreOfficeHelp`, `GettextCatalogues`. Repeated pairs are
    dropped from the training, not from validation and test files, and **no source sentence stands in two splits**, in
    other white space or case neither. A line tells how many pairs there are, and how many were left out and why.

    The tokenizer is a byte-level byte-pair encoding (`BytePairTokenizer`) of both languages, trained on the training
    pairs alone, on all of them whatever ``subset`` says, so that losses per token can be compared. It is kept in a file
    whose name is a digest of this text and ``vocab_size``.

    Batches hold sentences of similar length, as many as fit ``max_tokens``; see `LengthSampler`, also for several
    processes. The order is a function of ``order_seed`` and the epoch, and a checkpoint from the middle of an epoch
    goes on there. Validation and test run from the shortest sentence to the longest, prediction in the order of the
    text.

    Args:
        source: the language to translate from, as files and folders call it.
        target: the language to translate into.
        data_dir: the folder of the text; ``None``: where the system has it.
        corpus: in which files the text is; ``None``: `ParallelText` in ``data_dir``, `LibreOfficeHelp` without.
        vocab_size: number of ids, at least 260; the tokenizer has fewer if the text does not yield as many.
        max_tokens: budget of a batch and process: its number of sentences times the longest source and target together.
        min_length: ids that each side has at least; shorter pairs are left out of every split.
        max_length: ids that a side may have at most, the end's included: the positions that the network knows.
        on_damaged: what becomes of a pair with an empty side, bytes that are not UTF-8, a damaged catalogue, and a
            sentence longer than ``max_length``: ``"error"`` refuses it, ``"skip"`` leaves it out and tells how many
            there were.
        val_size: pairs for validation: the first ones of its files, or so many drawn by ``seed`` where it has none;
            ``None``: all, or 1,000.
        test_size: pairs for test, likewise.
        cache_dir: where tokenizers are kept; ``None``: in ``data_dir``, or in ``distill_lightning`` in the user's cache
            folder where that is not given or cannot be written to.
        predict_file: sentences to translate, one a line, without translations; ``None``: those for test.
        options: how pairs are chosen, ordered and loaded; see `PairOptions`.

    Raises:
        InputError: an option is out of range; from ``setup``: files or a language are missing, files of a split are of
            unequal length, something in them is damaged, a sentence is too long, or a split is larger than the text.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from distill_lightning import TranslationDataModule
        >>> folder = Path(mkdtemp())
        >>> for language, text in (("en", "One dog.\nTwo dogs.\nA cat."), ("de", "Ein Hund.\nZwei Hunde.\nKatze.")):
        ...     _ = (folder / f"train.{language}").write_text(text)
        >>> data = TranslationDataModule(data_dir=folder, vocab_size=280, val_size=1, test_size=1)
        >>> len(data.dataset("train"))
        1
        >>> data.decode(data.encode_target("Drei Hunde."))
        'Drei Hunde.'
    """

    task = "translation"
    pad_id = PAD
    num_classes: int
    input_shape = None  # type: ignore[assignment]  # sentences have lengths of their own

    def __init__(
        self,
        *,
        source: str = "en",
        target: str = "de",
        data_dir: str | Path | None = None,
        corpus: Corpus | None = None,
        vocab_size: int = 8000,
        max_tokens: int = 4096,
        min_length: int = 1,
        max_length: int = 512,
        on_damaged: Literal["error", "skip"] = "error",
        val_size: int | None = None,
        test_size: int | None = None,
        cache_dir: str | Path | None = None,
        predict_file: str | Path | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(val_size=val_size, test_size=test_size, views=1, **options)
        # A batch is as large as its tokens allow.
        del self.batch_size
        if source == target:
            raise InputError(f"source and target are both {source!r}: give two languages")
        check_vocab_size(vocab_size)
        check_max_tokens(max_tokens)
        check_count("min_length", min_length, at_least=1)
        check_count("max_length", max_length, at_least=min_length, because="min_length")
        self.source, self.target = source, target
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.corpus = corpus or (LibreOfficeHelp() if data_dir is None else ParallelText())
        self.num_classes = self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.min_length, self.max_length = min_length, max_length
        self.on_damaged = on_damaged
        self.cache_dir = cache_folder(None if cache_dir is None else Path(cache_dir), self.data_dir)
        self.predict_file = None if predict_file is None else Path(predict_file)
        self._faults = Faults(on_damaged)
        self._left_out: Counter[str] = Counter()
        self._splits: dict[str, TranslationDataset] = {}

    def prepare_data(self) -> None:
        """Train the tokenizer, unless it is there."""
        _ = self.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read the text, split it and make ids of it; a second call does nothing."""
        if self._splits:
            return
        pairs, self._left_out = dict(self._dealt.splits), Counter(self._dealt.left_out)
        if self.subset is not None:
            if self.subset > len(pairs["train"]):
                raise InputError(
                    f"subset={self.subset} is larger than the {len(pairs['train']):,} training pairs that are left"
                )
            self._left_out[f"beyond subset={self.subset}"] = len(pairs["train"]) - self.subset
            order = torch.randperm(len(pairs["train"]), generator=torch.Generator().manual_seed(self.seed))
            pairs["train"] = [pairs["train"][place] for place in order[: self.subset].tolist()]
        splits = {split: self._encoded(pairs[split]) for split in pairs}
        for split, dataset in splits.items():
            if not len(dataset):
                raise InputError(
                    f"{self._place}: none of {len(pairs[split]):,} pairs for {split} has between "
                    f"min_length={self.min_length} and max_length={self.max_length} ids: lower or raise them"
                )
        self._splits = splits
        self._tell()

    @cached_property
    def tokenizer(self) -> BytePairTokenizer:
        """Of both languages, trained on the training pairs or read from the cache."""
        sides = texts(self._dealt.splits["train"])
        return kept_tokenizer(self.cache_dir, [*sides[0], *sides[1]], vocab_size=self.vocab_size)

    def encode_source(self, sentence: str) -> list[int]:
        """The ids of a sentence to translate, and the end's."""
        return self.tokenizer.encode(sentence)

    def encode_target(self, sentence: str) -> list[int]:
        """The ids of a translation, and the end's."""
        return self.tokenizer.encode(sentence)

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence of some ids, of either language; what is no text is left out."""
        return self.tokenizer.decode(ids)

    def dataset(self, split: str, *, augment: bool = False) -> TranslationDataset:
        """One split, ``"train"``, ``"val"`` or ``"test"``; there is nothing to ``augment``."""
        self.setup()
        return self._splits[split]

    def longest(self) -> tuple[int, str]:
        """Of the splits' longest sentence, source or target, its number of ids and its file and line."""
        self.setup()
        return max((dataset.longest() for dataset in self._splits.values()), key=lambda found: found[0])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of similar length, shuffled."""
        seed = self.seed if self.order_seed is None else self.order_seed
        return self._batches(self.dataset("train"), shuffle=True, seed=seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """From the shortest sentences to the longest."""
        return self._batches(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """From the shortest sentences to the longest."""
        return self._batches(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The sentences of ``predict_file``, or those for test, in their order."""
        if self.predict_file is None:
            return self._batches(self.dataset("test"), in_order=True)
        lines = [line or "" for line in read_lines(self.predict_file, Faults("error", way_out="mend it"))]
        if not lines:
            raise InputError(f"{self.predict_file} is empty: write sentences into it, one a line")
        ids = self.tokenizer.encode_all(lines)
        for number, row in enumerate(ids, start=1):
            if len(row) > self.max_length:
                raise InputError(
                    f"{self.predict_file}:{number} has {len(row)} ids, more than max_length={self.max_length}: split it"
                )
        dataset = TranslationDataset(ids, None, sentences=([line.encode() for line in lines], []))
        return self._batches(dataset, in_order=True)

    @cached_property
    def _dealt(self) -> Dealt:
        read = self.corpus.read(self.data_dir, source=self.source, target=self.target, faults=self._faults)
        if not read["train"]:
            raise InputError(f"{self._place} has no pairs of {self.source} and {self.target}: give another data_dir")
        return deal(read, val_size=self.val_size, test_size=self.test_size, drawn=_DRAWN, seed=self.seed)

    @property
    def _place(self) -> str:
        name = type(self.corpus).__name__
        return name if self.data_dir is None else f"{name} in {self.data_dir}"

    def _encoded(self, pairs: list[Pair]) -> TranslationDataset:
        """The pairs that are neither too short nor too long."""
        sides = texts(pairs)
        ids = [self.tokenizer.encode_all(side) for side in sides]
        kept = [place for place, pair in enumerate(pairs) if self._fits(pair.where, ids[0][place], ids[1][place])]
        chosen = [[side[place] for place in kept] for side in ids]
        sentences = [[side[place].encode(errors="surrogatepass") for place in kept] for side in sides]
        where = [pairs[place].where for place in kept]
        return TranslationDataset(*chosen, sentences=(sentences[0], sentences[1]), where=where)

    def _fits(self, where: str, source: list[int], target: list[int]) -> bool:
        if min(len(source), len(target)) < self.min_length:
            self._left_out[f"shorter than min_length={self.min_length}"] += 1
            return False
        side, longest = ("source", source) if len(source) >= len(target) else ("target", target)
        if len(longest) <= self.max_length:
            return True
        self._faults.note(
            f"pairs longer than max_length={self.max_length}",
            f"{where}: the {side} has {len(longest)} ids, more than max_length={self.max_length}",
        )
        return False

    def _tell(self) -> None:
        sizes = ", ".join(f"{len(dataset):,} for {split}" for split, dataset in self._splits.items())
        counts = [f"{count:,} {why}" for why, count in self._left_out.items() if count]
        rank_zero_info(
            f"TranslationDataModule: pairs of {self.source} and {self.target}: {sizes}"
            + (f"; left out: {', '.join(counts)}" if counts else "")
            + (f"; skipped: {self._faults.told()}" if self._faults.counts else "")
        )

    def _batches(
        self, dataset: TranslationDataset, *, shuffle: bool = False, in_order: bool = False, seed: int = 0
    ) -> DataLoader[Batch]:
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        sampler = (SameLengthSampler if overfits else LengthSampler)(
            dataset,
            dataset.lengths,
            max_tokens=self.max_tokens,
            shuffle=shuffle,
            in_order=in_order,
            seed=seed,
            **self._share,
        )
        return self._loader_of(dataset, sampler, batch_size=None)
