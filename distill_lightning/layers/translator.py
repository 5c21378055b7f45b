"""The trainable maps that feature distillation adds beside the student, and throws away after training."""

from __future__ import annotations

from torch import Tensor, nn

from distill_lightning.errors import InputError

_SLOPE = 0.1


def _conv_block(channels_in: int, channels_out: int, *, batch_norm: bool, transposed: bool = False) -> list[nn.Module]:
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels_in, channels_out, 3, padding=1)
    norm = [nn.BatchNorm2d(channels_out)] if batch_norm else []
    return [conv, *norm, nn.LeakyReLU(_SLOPE)]


class Translator(nn.Sequential):
    """FEED's non-linear transformation: the student's feature map, said in one teacher's channels.

    Three 3x3 convolutions with bias, stride 1 and padding 1, channels ``C_S -> C_S -> C_T -> C_T``, each followed by
    LeakyReLU(0.1), the last one included; the spatial size is kept. It is the translator of Factor Transfer's official
    code, without BatchNorm by default, as there. ``64 -> 64`` has 110,784 parameters.

    Args:
        student_channels: ``C_S``.
        teacher_channels: ``C_T``.
        batch_norm: a BatchNorm between each convolution and its activation.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, batch_norm: bool = False) -> None:
        super().__init__(
            *_conv_block(student_channels, student_channels, batch_norm=batch_norm),
            *_conv_block(student_channels, teacher_channels, batch_norm=batch_norm),
            *_conv_block(teacher_channels, teacher_channels, batch_norm=batch_norm),
        )


class Paraphraser(nn.Module):
    """Factor Transfer's paraphraser: an autoencoder of one teacher's feature map, whose code is the target.

    The encoder is three 3x3 convolutions ``C -> C -> F -> F`` with ``F = round(rate * C)`` factor channels, the decoder
    three 3x3 transposed convolutions ``F -> F -> C -> C``; LeakyReLU(0.1) follows each. It is trained beforehand with
    the mean absolute error of `forward` to its input (by `distill_lightning.ParaphraserModule`), and then only encodes.

    Args:
        channels: ``C`` of the teacher's feature map.
        rate: factor channels per channel.
        batch_norm: a BatchNorm between each convolution and its activation.

    Raises:
        InputError: ``rate`` leaves no factor channel.

    Kim, Park, Kwak: *Paraphrasing Complex Network*, https://arxiv.org/abs/1802.04977
    """

    def __init__(self, channels: int, *, rate: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()
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
