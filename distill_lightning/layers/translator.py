"""The trainable maps that feature distillation adds to the student, and discards after training."""

from __future__ import annotations

from torch import Tensor, nn

from distill_lightning.errors import InputError, check_finite

_SLOPE = 0.1


def _conv_block(channels_in: int, channels_out: int, *, batch_norm: bool, transposed: bool = False) -> list[nn.Module]:
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels_in, channels_out, 3, padding=1)
    norm = [nn.BatchNorm2d(channels_out)] if batch_norm else []
    return [conv, *norm, nn.LeakyReLU(_SLOPE)]


class Translator(nn.Sequential):
    """FEED's non-linear transformation, which maps the student's feature map to one teacher's channels.

    Three 3x3 convolutions with bias, stride 1 and padding 1, channels ``C_S -> C_S -> C_T -> C_T``, each followed by
    LeakyReLU(0.1), the last one included; the spatial size is kept. This is the translator of Factor Transfer's
    official code, by default without BatchNorm, as there. ``64 -> 64`` has 110,784 parameters.

    Args:
        student_channels: ``C_S``.
        teacher_channels: ``C_T``.
        batch_norm: whether there is a BatchNorm between each convolution and its activation.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import Translator
        >>> translator = Translator(16, 64)
        >>> translator(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, batch_norm: bool = False) -> None:
        super().__init__(
            *_conv_block(student_channels, student_channels, batch_norm=batch_norm),
            *_conv_block(student_channels, teacher_channels, batch_norm=batch_norm),
            *_conv_block(teacher_channels, teacher_channels, batch_norm=batch_norm),
        )


class Paraphraser(nn.Module):
    """Factor Transfer's paraphraser: an autoencoder of one teacher's feature map, whose code is the student's target.

    The encoder is three 3x3 convolutions ``C -> C -> F -> F`` with ``F = round(rate * C)`` factor channels, the decoder
    three 3x3 transposed convolutions ``F -> F -> C -> C``; LeakyReLU(0.1) follows each. It is trained beforehand on
    the mean absolute error between `forward` and its input (by `distill_lightning.ParaphraserModule`); afterwards only
    the encoder is used.

    Args:
        channels: ``C``, the channels of the teacher's feature map.
        rate: number of factor channels per channel of the feature map.
        batch_norm: whether there is a BatchNorm between each convolution and its activation.

    Raises:
        InputError: ``rate`` leaves no factor channel.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import Paraphraser
        >>> paraphraser = Paraphraser(64, rate=0.5)
        >>> feature = torch.zeros(2, 64, 8, 8)
        >>> paraphraser.encoder(feature).shape, paraphraser(feature).shape
        (torch.Size([2, 32, 8, 8]), torch.Size([2, 64, 8, 8]))

    Kim, Park, Kwak: *Paraphrasing Complex Network*, https://arxiv.org/abs/1802.04977
    """

    def __init__(self, channels: int, *, rate: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()
        check_finite("rate", rate)
        factors = round(rate * channels)
        if factors < 1:
            raise InputError(f"rate {rate} of {channels} channels leaves no factor channel")
        self.encoder = nn.Sequential(
            *_conv_block(channels, channels, batch_norm=batch_norm),
            *_conv_block(channels, factors, batch_norm=batch_norm),
            *_conv_block(factors, factors, batch_norm=batch_norm),
        )
        self.decoder = nn.Sequential(
            *_conv_block(factors, factors, batch_norm=batch_norm, transposed=True),
            *_conv_block(factors, channels, batch_norm=batch_norm, transposed=True),
            *_conv_block(channels, channels, batch_norm=batch_norm, transposed=True),
        )
        self.channels = channels
        self.factors = factors

    def forward(self, feature: Tensor) -> Tensor:
        """The reconstruction ``(N, C, H, W)`` of a feature map ``(N, C, H, W)``."""
        reconstruction: Tensor = self.decoder(self.encoder(feature))
        return reconstruction
