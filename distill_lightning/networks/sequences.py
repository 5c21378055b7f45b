"""Small networks for sequences: rows of an image, one after another, or tokens of a text."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from distill_lightning.errors import InputError
from distill_lightning.networks.provenance import class_with_recipe, set_recipe
from distill_lightning.networks.sizes import check_sizes


@class_with_recipe
class SmallLSTM(nn.Module):
    """An LSTM that classifies a sequence of rows, or predicts the token after each token of a text.

    With ``input_size`` it reads images ``(N, C, H, W)`` as ``H`` steps of ``C * W`` numbers and returns logits
    ``(N, K)`` from the last step; with the defaults it has 41,674 parameters for 8x8 digits. With ``vocabulary`` it
    reads tokens ``(N, T)`` through an embedding of ``width`` numbers and returns logits ``(N, T, K)``, one row for each
    position. The LSTM is ``lstm``, the last layer ``head``.

    Args:
        num_classes: ``K``.
        input_size: numbers in a row, ``C * W``; ``None`` for tokens.
        vocabulary: number of different tokens; ``None`` for rows.
        width: hidden units of a layer.
        depth: layers.

    Raises:
        InputError: a size that is not positive, or not exactly one of ``input_size`` and ``vocabulary``.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallLSTM
        >>> SmallLSTM(num_classes=10, input_size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
        >>> SmallLSTM(num_classes=100, vocabulary=100)(tokens).shape
        torch.Size([2, 5, 100])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input_size: int | None = None,
        vocabulary: int | None = None,
        width: int = 96,
        depth: int = 1,
    ) -> None:
        super().__init__()
        read = _one_of("SmallLSTM", input_size, vocabulary)
        arguments = {"num_classes": num_classes, **read, "width": width, "depth": depth}
        check_sizes("SmallLSTM", arguments)
        set_recipe(self, arguments)
        self.embed = nn.Identity() if vocabulary is None else nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(input_size or width, width, depth, batch_first=True)
        self.head = nn.Linear(width, num_classes)
        self.reads_tokens = vocabulary is not None

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``, or ``(N, T, K)`` of tokens ``(N, T)``."""
        outputs, _ = self.lstm(self.embed(inputs if self.reads_tokens else _rows(inputs)))
        logits: Tensor = self.head(outputs if self.reads_tokens else outputs[:, -1])
        return logits


@class_with_recipe
class SmallTransformer(nn.Module):
    """A Transformer encoder that classifies a sequence of rows, or predicts the token after each token of a text.

    With ``input_size`` it reads images ``(N, C, H, W)`` as ``H`` steps of ``C * W`` numbers and returns logits
    ``(N, K)`` from the mean over the steps; with the defaults it has 68,810 parameters for 8x8 digits. With
    ``vocabulary`` it reads tokens ``(N, T)``, each position sees itself and the earlier ones, and it returns logits
    ``(N, T, K)``. The embedding ``embed`` and the learned ``positions`` are added; then follow ``encoder``, with layer
    normalisation before each of its sublayers and at its end, and ``head``.

    Args:
        num_classes: ``K``.
        length: the largest number of steps, ``H`` for images; each has a learned position.
        input_size: numbers in a row, ``C * W``; ``None`` for tokens.
        vocabulary: number of different tokens; ``None`` for rows.
        width: numbers per step, a multiple of ``heads``.
        depth: layers.
        heads: attention heads in each layer.
        feedforward: hidden units of the feed-forward network in each layer.
        dropout: the probability of dropout in training, in ``[0, 1)``.

    Raises:
        InputError: a size or probability that is out of range, not exactly one of ``input_size`` and ``vocabulary``,
            or, on a call, more steps than ``length``.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallTransformer
        >>> SmallTransformer(num_classes=10, length=8, input_size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
        >>> SmallTransformer(num_classes=100, length=16, vocabulary=100)(tokens).shape
        torch.Size([2, 5, 100])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        length: int,
        input_size: int | None = None,
        vocabulary: int | None = None,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        feedforward: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        read = _one_of("SmallTransformer", input_size, vocabulary)
        arguments = {"num_classes": num_classes, "length": length, **read, "width": width, "depth": depth}
        arguments |= {"heads": heads, "feedforward": feedforward}
        check_sizes("SmallTransformer", arguments)
        if width % heads:
            raise InputError(f"SmallTransformer: width={width} is not a multiple of heads={heads}: change one of them")
        if not 0 <= dropout < 1:
            raise InputError(f"SmallTransformer: dropout must be in [0, 1), got {dropout}")
        set_recipe(self, arguments | {"dropout": dropout})
        self.embed = nn.Linear(input_size, width) if input_size else nn.Embedding(vocabulary or 1, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.length = length
        layers = [
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.encoder = nn.TransformerEncoder(layers[0], depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        # TransformerEncoder has copied the one layer that it was given, including its weights.
        self.encoder.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, num_classes)
        self.reads_tokens = vocabulary is not None

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``, or ``(N, T, K)`` of tokens ``(N, T)``."""
        hidden = self.embed(inputs if self.reads_tokens else _rows(inputs))
        hidden = hidden + self.positions(_places(hidden, self.length))
        if self.reads_tokens:
            # Without is_causal, PyTorch would compare the mask with a causal one, and wait for the device.
            hidden = self.encoder(hidden, mask=_later(hidden), is_causal=True)
        else:
            hidden = self.encoder(hidden).mean(dim=1)
        logits: Tensor = self.head(hidden)
        return logits


def _one_of(who: str, input_size: int | None, vocabulary: int | None) -> dict[str, int]:
    given = {"input_size": input_size, "vocabulary": vocabulary}
    read = {name: value for name, value in given.items() if value is not None}
    if len(read) != 1:
        raise InputError(f"{who} needs either input_size (rows of images) or vocabulary (tokens of a text)")
    return read


def _rows(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` as sequences ``(N, H, C * W)``."""
    return images.transpose(1, 2).flatten(2)


# torch.fx takes these as single operations; it cannot trace code that depends on a length.
@fx.wrap
def _places(hidden: Tensor, length: int) -> Tensor:
    """The indices ``(T,)`` of the steps of ``(N, T, D)``."""
    steps = hidden.shape[1]
    if steps > length:
        raise InputError(
            f"SmallTransformer has positions for {length} steps, got {steps}: build it with length={steps} or more"
        )
    return torch.arange(steps, device=hidden.device)


@fx.wrap
def _later(hidden: Tensor) -> Tensor:
    """The mask ``(T, T)`` for ``(N, T, D)``, true where a step (row) must not see a later one (column)."""
    steps = hidden.shape[1]
    return torch.ones(steps, steps, dtype=torch.bool, device=hidden.device).triu(1)
