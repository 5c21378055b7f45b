"""What a module that translates, its student and its data say of token ids, and where they do not agree."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from distill_lightning.data.batch import IGNORED, Batch
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import data_module_of
from distill_lightning.modules.parts.guard import named
from distill_lightning.modules.parts.search import SpecialIds, positions_of


def told_id(data: Any, name: str) -> int | None:
    """The id that a data module or its tokenizer has under a name, ``"eos_id"`` for example."""
    for holder in (data, getattr(data, "tokenizer", None)):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return found
    return None


def special_ids(module: Any, batch: Batch | None = None) -> SpecialIds:
    """The ids by which sentences begin and end.

    Args:
        module: that translates; its ``pad_id`` is checked against the data's.
        batch: whose ``decoder_input_ids``, if it has some, begin with the start; a device is waited for.
    """
    data, config = data_module_of(module), getattr(module.student, "config", None)
    read = None if batch is None else batch.input.get("decoder_input_ids")
    start = told_id(data, "bos_id") if read is None else int(read[0, 0])
    end = told_id(data, "eos_id")
    return SpecialIds(
        module.pad_id,
        _own(config, "decoder_start_token_id") if start is None else start,
        _own(config, "eos_token_id") if end is None else end,
    )


def _own(config: Any, name: str) -> int | None:
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def is_token(target: Tensor, pad_id: int, end: int | None) -> Tensor:
    """Which positions of targets ``(N, T)`` are of a sentence; the others fill it up.

    Filled up is with -100 or the padding's id. Where this is the end's, too, the first one in a row is the end.
    """
    is_padding: Tensor = target.eq(pad_id)
    if pad_id == end:
        is_padding = is_padding & (is_padding.cumsum(dim=1) > 1)
    return ~is_padding & target.ne(IGNORED)


def check_vocabulary(module: Any) -> None:
    """Compare the data's ids with the module's and the student's.

    Raises:
        InputError: they have another padding, or ids for which the student has no embedding or the loss no class.
    """
    who, data = type(module).__name__, data_module_of(module)
    pad_id, count = told_id(data, "pad_id"), getattr(data, "num_classes", None)
    if pad_id is not None and pad_id != module.pad_id:
        raise InputError(
            f"{who}: pad_id={module.pad_id}, and {type(data).__name__} fills sentences up with {pad_id}: give "
            f"pad_id={pad_id}"
        )
    if isinstance(count, int) and count > module.num_classes:
        raise InputError(
            f"{who}: num_classes={module.num_classes}, and {type(data).__name__} has {count} ids: give both the same"
        )
    embedded = embeddings_of(module.student)
    if embedded is not None and embedded < module.num_classes:
        raise InputError(
            f"{who}: the student ({type(module.student).__name__}) has embeddings for {embedded} ids, and "
            f"num_classes={module.num_classes}: build it with as many"
        )


def tokenizer_of(module: Any) -> str | None:
    """The ``digest`` of the data module's tokenizer, by which it is told from others; ``None``: it has none."""
    found = getattr(getattr(data_module_of(module), "tokenizer", None), "digest", None)
    return found if isinstance(found, str) else None


def check_tokenizer(module: Any, trained: str | None) -> None:
    """Compare the data's tokenizer with that of the training.

    Args:
        module: that reads the data.
        trained: `tokenizer_of` the training; ``None``: it is not known.

    Raises:
        InputError: it is another one, whose ids mean other words.
    """
    present = tokenizer_of(module)
    if trained is not None and present is not None and present != trained:
        raise InputError(
            f"{type(module).__name__}: the tokenizer of {type(data_module_of(module)).__name__} is not that of the "
            "training, and its ids mean other words: give the text, languages, vocab_size, val_size, test_size and "
            "seed of the training"
        )


def check_longest(module: Any) -> None:
    """Compare the data's longest sentence, where a data module tells it, with the student's positions.

    Raises:
        InputError: it is longer.
    """
    positions, longest = positions_of(module.student), getattr(data_module_of(module), "longest", None)
    if positions is None or longest is None:
        return
    count, where = longest()
    if count > positions:
        raise InputError(
            f"{type(module).__name__}: {where} has {count} tokens, the most of all sentences, and the student "
            f"({type(module.student).__name__}) positions for {positions}: build it with max_length={count} or more, "
            f"or let the data leave longer ones out, max_length={positions} and on_damaged='skip'"
        )


def check_ids(module: Any, batch: Batch, where: str) -> None:
    """Look at the ids that a student reads; a device is waited for.

    Args:
        module: whose student it is.
        batch: that `Translating.read` has read.
        where: the batch's name in the message.

    Raises:
        InputError: an id has no embedding, or padding is read as words; the message names the sample.
    """
    embedded = embeddings_of(module.student)
    for side, name in (("source", "input_ids"), ("target", "decoder_input_ids")):
        ids = batch.input.get(name)
        if embedded is None or ids is None:
            continue
        wrong = (ids < 0) | (ids >= embedded)
        if wrong.any():
            raise InputError(
                f"{type(module).__name__}: the {side} of sample {_first(batch, wrong)} in {where} has "
                f"the id {int(ids[wrong][0])}, and the student ({type(module.student).__name__}) embeddings "
                f"for ids from 0 to {embedded - 1}: build it with the tokenizer's number of ids"
            )
    _check_padding(module, batch, where)


def _check_padding(module: Any, batch: Batch, where: str) -> None:
    """Look whether what fills up the sources is what the module takes for padding, and the student leaves it out."""
    ids, mask, pad_id = batch.input["input_ids"], batch.input.get("attention_mask"), module.pad_id
    if mask is None:
        padding = ~is_token(ids, pad_id, special_ids(module).end)
        if padding.any() and "attention_mask" in inspect.signature(module.student.forward).parameters:
            raise InputError(
                f"{type(module).__name__}: the source of sample {_first(batch, padding)} in {where} is filled up with "
                f"{pad_id}, and without attention_mask the student ({type(module.student).__name__}) takes that for "
                f"words: let batches have one, input_ids != {pad_id}"
            )
    elif mask.shape == ids.shape:
        # At the ends alone, since a mask may hide words, too.
        hidden = mask == 0
        filling = hidden.cummin(dim=1).values | hidden.flip(1).cummin(dim=1).values.flip(1)
        other = filling & (ids != pad_id)
        if other.any():
            raise InputError(
                f"{type(module).__name__}: the source of sample {_first(batch, other)} in {where} has the id "
                f"{int(ids[other][0])} where attention_mask is 0, and pad_id={pad_id}: give the pad_id that the data "
                "are filled up with"
            )


def _first(batch: Batch, where: Tensor) -> str:
    """The first sample with such a position, ``(N, S)``."""
    return named(batch, [int(where.any(dim=1).nonzero()[0])])


def embeddings_of(network: nn.Module) -> int | None:
    """For how many ids a network of the transformers library has embeddings; ``None``: it does not tell."""
    get: Any = getattr(network, "get_input_embeddings", None)
    count = getattr(get() if get is not None else None, "num_embeddings", None)
    if count is None:
        count = getattr(getattr(network, "config", None), "vocab_size", None)
    return count if isinstance(count, int) else None
