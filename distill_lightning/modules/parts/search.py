"""How a translation is searched for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from distill_lightning.choices import Choice
from distill_lightning.errors import InputError, check_finite


class SpecialIds(NamedTuple):
    """Ids that are no words, of the data or else of the student; ``None`` where neither tells.

    Attributes:
        pad: what sources and targets are filled up with.
        start: what the decoder begins with.
        end: the last of a sentence.
    """

    pad: int | None = None
    start: int | None = None
    end: int | None = None


OWN_IDS = SpecialIds()
"""Those of the student, whatever they are."""


class Search(Choice):
    """How a network's translation of a sentence is found."""

    @abstractmethod
    def check(self, who: str, student: nn.Module) -> None:
        """Refuse a network that cannot translate; the message begins with ``who``.

        Raises:
            InputError: it cannot.
        """

    @abstractmethod
    def __call__(self, student: nn.Module, inputs: Mapping[str, Any], ids: SpecialIds = OWN_IDS) -> Tensor:
        """Translations of a batch.

        Args:
            student: in eval mode.
            inputs: what it reads, ``input_ids`` ``(N, S)`` among it.
            ids: by which translations begin and end; ``None``: the student's own.

        Returns:
            Token ids, int64 ``(N, T')``, filled up where a translation is shorter, and without what they begin with.
        """


@dataclass(frozen=True)
class BeamSearch(Search):
    r"""The most probable of the sentences that a beam search finds, each by its mean log-probability.

    .. math:: \frac{1}{T^{\lambda}} \sum_{t=1}^{T} \log p(y_t \mid y_{<t}, x)

    It is the network's own ``generate``, called as the transformers library's networks are, with ``num_beams``,
    ``length_penalty``, ``max_new_tokens``, and the ids by which translations begin and end; what it returns begins with
    the decoder's first token.

    Args:
        size: sentences that are kept at each step; 1: the most probable token each time.
        length_penalty: :math:`\lambda`; a larger one prefers longer translations.
        max_length: the largest number of tokens of a translation; the network's positions bound it, too.

    Raises:
        InputError: an option is out of range; when called: the network has no ``generate``.

    Wu et al.: *Google's Neural Machine Translation System*, https://arxiv.org/abs/1609.08144

    Example:
        >>> import torch
        >>> from distill_lightning import BeamSearch, translation_transformer
        >>> network = translation_transformer(50, width=8, encoder_depth=1, decoder_depth=1, heads=2, feedforward=8)
        >>> BeamSearch(size=2, max_length=6)(network.eval(), {"input_ids": torch.full((3, 4), 7)}).shape[0]
        3
    """

    size: int = 5
    length_penalty: float = 1.0
    max_length: int = 128

    def __post_init__(self) -> None:
        """Check the options."""
        for name, count in (("size", self.size), ("max_length", self.max_length)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise InputError(f"BeamSearch: {name} must be an integer of at least 1, got {count!r}")
        check_finite("BeamSearch: length_penalty", self.length_penalty)

    def check(self, who: str, student: nn.Module) -> None:
        """Refuse a network without ``generate``."""
        if not callable(getattr(student, "generate", None)):
            raise InputError(
                f"{who}: the student ({type(student).__name__}) has no generate(), which translations, BLEU and chrF "
                "need: take a network that has, as translation_transformer makes, or beam=NoSearch()"
            )

    def __call__(self, student: nn.Module, inputs: Mapping[str, Any], ids: SpecialIds = OWN_IDS) -> Tensor:
        """What ``generate`` returns, without the first token."""
        self.check("BeamSearch", student)
        positions = positions_of(student)
        length = self.max_length if positions is None else min(self.max_length, positions)
        source = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        # Without a beam it would only be warned of.
        penalty = {"length_penalty": self.length_penalty} if self.size > 1 else {}
        told = {"pad_token_id": ids.pad, "decoder_start_token_id": ids.start, "eos_token_id": ids.end}
        known = {name: value for name, value in told.items() if value is not None}
        generate: Any = student.generate
        found: Tensor = generate(
            **source, **known, num_beams=self.size, do_sample=False, max_new_tokens=length, **penalty
        )
        return found[:, 1:]


@dataclass(frozen=True)
class NoSearch(Search):
    """No translations, so neither BLEU nor chrF; for networks without ``generate``, and where these take too long."""

    def check(self, who: str, student: nn.Module) -> None:
        """Every network will do."""

    def __call__(self, student: nn.Module, inputs: Mapping[str, Any], ids: SpecialIds = OWN_IDS) -> Tensor:
        """There is no translation.

        Raises:
            InputError: always.
        """
        raise InputError("with beam=NoSearch() nothing is translated: give beam=BeamSearch()")


def positions_of(network: nn.Module) -> int | None:
    """How many tokens a network of the transformers library has positions for; ``None``: it does not tell."""
    positions = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None
