"""Byte-level byte-pair encoding, trained on the training sentences and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distill_lightning.errors import check_count, refusing
from distill_lightning.libraries import package
from distill_lightning.storage.files import write_whole

PAD, BOS, EOS, UNK = range(4)
"""The ids of what is no text: padding, the beginning and the end of a sentence, and what is not known."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# Every byte has an id, so that there is nothing that cannot be written.
SMALLEST = len(_SPECIAL) + 256
# Raised when tokenizers of the same text and options become others.
_FORMAT = 1


class BytePairTokenizer:
    """Sentences as ids and back, without loss: ``decode(encode(sentence)) == sentence`` for every sentence.

    Sennrich, Haddow, Birch: *Neural Machine Translation of Rare Words with Subword Units*, ACL 2016; on bytes, so that
    no character is unknown. Ids 0 to 3 are padding, beginning, end and unknown; a ``</s>`` in a sentence is text.

    Args:
        definition: as the ``tokenizers`` library writes a tokenizer.

    Raises:
        InputError: the library is not installed.

    Example:
        >>> from distill_lightning.data.datamodules import BytePairTokenizer
        >>> tokenizer = BytePairTokenizer.trained(["ein Hund", "ein Hut"], vocab_size=270)
        >>> tokenizer.decode(tokenizer.encode("ein Huhn"))
        'ein Huhn'
    """

    pad_id, bos_id, eos_id, unk_id = PAD, BOS, EOS, UNK

    def __init__(self, definition: str) -> None:
        self.definition = definition
        self._tokenizer: Any = package("tokenizers", extra="translation").Tokenizer.from_str(definition)
        # Else a sentence about HTML would end at its "</s>". It does not stand in the definition.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def trained(cls, sentences: Iterable[str], *, vocab_size: int) -> BytePairTokenizer:
        """Train one.

        Args:
            sentences: to train on.
            vocab_size: number of ids at most; few sentences make fewer.

        Raises:
            InputError: ``vocab_size`` is below 260 or no integer, or the library is not installed.
        """
        check_vocab_size(vocab_size)
        library = package("tokenizers", extra="translation")
        tokenizer = library.Tokenizer(library.models.BPE(unk_token=_SPECIAL[UNK]))
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences, trainer)
        return cls(tokenizer.to_str())

    def encode(self, sentence: str) -> list[int]:
        """The ids of a sentence, and the end's."""
        return self.encode_all([sentence])[0]

    def encode_all(self, sentences: Sequence[str]) -> list[list[int]]:
        """The ids of each sentence, and the end's."""
        return [[*encoded.ids, EOS] for encoded in self._tokenizer.encode_batch(list(sentences))]

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence; ids up to 3, and those that the tokenizer does not have, are left out.

        Half a character, which a network may well write, becomes the replacement character.
        """
        size = len(self)
        text: str = self._tokenizer.decode(
            [id_ for id_ in map(int, ids) if UNK < id_ < size], skip_special_tokens=False
        )
        return text

    @property
    def digest(self) -> str:
        """Of the ids and what they stand for, by which a tokenizer is told from others."""
        ids = sorted((id_, token) for token, id_ in self._tokenizer.get_vocab().items())
        return blake2b(repr(ids).encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __getstate__(self) -> dict[str, Any]:
        return {"definition": self.definition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["definition"])  # type: ignore[misc]  # there is nothing else in it


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that has no room for all bytes.

    Raises:
        InputError: it is below 260, or no integer.
    """
    check_count("vocab_size", vocab_size, at_least=SMALLEST, because="4 special ids and 256 bytes")


def kept_tokenizer(folder: Path, sentences: Sequence[str], *, vocab_size: int) -> BytePairTokenizer:
    """A tokenizer that is trained once, and then read from a file whose name is a digest of text and options.

    Several processes may ask for the same: each file is written whole or not at all, and all would write the same.

    Args:
        folder: of such files; it is made.
        sentences: to train on.
        vocab_size: number of ids at most.

    Raises:
        InputError: the file is damaged, or cannot be written.
    """
    digest = blake2b(f"{_FORMAT} {vocab_size} ".encode(), digest_size=8)
    for sentence in sentences:
        digest.update(sentence.encode(errors="surrogatepass") + b"\n")
    path = folder / f"tokenizer-{digest.hexdigest()}.json"
    if not path.is_file():
        tokenizer = BytePairTokenizer.trained(sentences, vocab_size=vocab_size)
        write_whole(path, [tokenizer.definition.encode()])
        return tokenizer
    definition = path.read_text(encoding="utf-8", errors="replace")
    # The library raises nothing more special.
    with refusing(f"{path} is damaged: remove it, and it is made again", Exception):
        return BytePairTokenizer(definition)


def cache_folder(given: Path | None, data_dir: Path | None) -> Path:
    """Where tokenizers are kept: the given folder, that of the data if it can be written to, or the user's cache."""
    if given is not None:
        return given
    if data_dir is not None and os.access(data_dir, os.W_OK):
        return data_dir
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "distill_lightning"
