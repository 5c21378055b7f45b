"""An encoder-decoder and sentences that are small enough for tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # its usual name

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.errors import InputError

PAD, BOS, EOS, UNKNOWN = range(4)
_SPECIAL = 4
_LONGEST = 6
"""Words of a sentence."""


class TinyEncoderDecoder(nn.Module):
    """One layer of attention to the source and one to the target so far, called as those of ``transformers`` are.

    Args:
        num_classes: number of ids, of sources and of targets.
        width: entries of an embedding.
        length: the largest number of positions.

    Attributes:
        config: the number of positions, and the token that targets begin with.
    """

    def __init__(self, num_classes: int = 12, *, width: int = 8, length: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=length, decoder_start_token_id=BOS)
        self.embed = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(length, width)
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.decoder = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits ``(N, T, K)``.

        Args:
            input_ids: the sources, int64 ``(N, S)``.
            attention_mask: 0 at what pads them, ``(N, S)``.
            decoder_input_ids: the targets, each token one place late, int64 ``(N, T)``.
        """
        source = self.encoder(self._placed(input_ids))
        target = self._placed(decoder_input_ids)
        so_far = F.scaled_dot_product_attention(target, target, target, is_causal=True)
        seen = attention_mask.bool()[:, None, :]
        attended = F.scaled_dot_product_attention(self.decoder(so_far), source, source, attn_mask=seen)
        logits: Tensor = self.head(self.norm(so_far + attended))
        return logits

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int, **_beams: Any) -> Tensor:
        """The most probable token after each token, int64 ``(N, T)``: begins with `BOS`, is padded behind `EOS`.

        Args:
            input_ids: the sources, int64 ``(N, S)``.
            attention_mask: 0 at what pads them, ``(N, S)``.
            max_new_tokens: tokens at the most behind the first.
            _beams: what a beam search would be told; there is none.
        """
        ids = torch.full_like(input_ids[:, :1], BOS)
        for _ in range(max_new_tokens):
            following = self(input_ids, attention_mask, ids)[:, -1].argmax(dim=1)
            is_over = (ids == EOS).any(dim=1)
            ids = torch.cat([ids, following.masked_fill(is_over, PAD)[:, None]], dim=1)
        return ids

    def _placed(self, ids: Tensor) -> Tensor:
        placed: Tensor = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        return placed


class TinySentences(ViewDataset):
    """Pairs of sentences, padded batch by batch; every view is the plain pair.

    Args:
        sources: ids of each, without `EOS`.
        targets: as many.
    """

    depends_on = ()

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        super().__init__(seed=0, partners=False)
        self.sources, self.targets = sources, targets

    def __len__(self) -> int:
        return len(self.sources)

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these pairs."""
        sources = _padded([[*self.sources[place], EOS] for place in index.tolist()])
        targets = _padded([[*self.targets[place], EOS] for place in index.tolist()])
        late = torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], dim=1)
        inputs = {"input_ids": sources, "attention_mask": (sources != PAD).long(), "decoder_input_ids": late}
        return Batch(inputs, targets, index, view)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)


class TinyTranslationDataModule(ViewDataModule):
    """Seeded sentences of one to six words, whose translation is the same words in the opposite order.

    Args:
        num_classes: number of ids: `PAD`, `BOS`, `EOS`, `UNKNOWN` and at most 26 words.
        samples: number of training pairs; there are as many for validation and for test.
        val_size: number of validation pairs; ``None``: as many as training pairs.
        batch_size: pairs per batch and process.
        seed: of everything.

    Raises:
        InputError: there are no words among the ids, or more than letters.
    """

    task = "translation"
    num_classes: int
    input_shape = None  # type: ignore[assignment]  # sentences are of any length
    pad_id, bos_id, eos_id = PAD, BOS, EOS
    source, target = "forwards", "backwards"

    def __init__(
        self,
        *,
        num_classes: int = 12,
        samples: int = 24,
        val_size: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(val_size=val_size or samples, subset=samples, batch_size=batch_size, seed=seed)
        if not 1 <= num_classes - _SPECIAL <= 26:
            raise InputError(f"num_classes must be between 5 and 30, got {num_classes}: there are 4 ids besides words")
        self.num_classes = num_classes
        self.count = samples

    def setup(self, stage: str | None = None) -> None:
        """There is nothing to read."""

    def dataset(self, split: str, *, augment: bool = False) -> TinySentences:
        """The generated pairs of one split."""
        place = ("train", "val", "test").index(split)
        generator = torch.Generator().manual_seed(3 * self.seed + place)
        count = (self.val_size or self.count) if split == "val" else self.count
        lengths = torch.randint(1, _LONGEST + 1, (count,), generator=generator)
        sources = [
            torch.randint(_SPECIAL, self.num_classes, (length,), generator=generator).tolist()
            for length in lengths.tolist()
        ]
        return TinySentences(sources, [source[::-1] for source in sources])

    def decode(self, ids: Sequence[int]) -> str:
        """The words of a sentence: ``a`` is id 4, and so on; what is no word is left out."""
        return " ".join(chr(ord("a") + number - _SPECIAL) for number in ids if number >= _SPECIAL)
