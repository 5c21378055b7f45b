"""Translator and Paraphraser: counted and computed by hand."""

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.layers import Paraphraser, Translator


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def naive_conv(feature, weight, bias):
    """3x3, stride 1, padding 1, one sample ``(C, H, W)``; weight ``(out, in, 3, 3)``."""
    _, height, width = feature.shape
    result = torch.zeros(len(weight), height, width, dtype=feature.dtype)
    for out in range(len(weight)):
        for y in range(height):
            for x in range(width):
                total = bias[out].item()
                for channel in range(len(feature)):
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                pixel = feature[channel, y + dy, x + dx].item()
                                total += pixel * weight[out, channel, dy + 1, dx + 1].item()
                result[out, y, x] = total
    return result


def naive_transposed_conv(feature, weight, bias):
    """Every input pixel spreads over its 3x3 neighbours; weight ``(in, out, 3, 3)``."""
    _, height, width = feature.shape
    result = bias.detach()[:, None, None].repeat(1, height, width)
    for channel in range(len(feature)):
        for y in range(height):
            for x in range(width):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            spread = feature[channel, y, x] * weight[channel, :, dy + 1, dx + 1].detach()
                            result[:, y + dy, x + dx] += spread
    return result


def naive_leaky(feature):
    values = [max(value, 0.1 * value) for value in feature.flatten().tolist()]
    return torch.tensor(values, dtype=feature.dtype).reshape(feature.shape)


def naive_run(stack, feature):
    for module in stack:
        if isinstance(module, nn.ConvTranspose2d):
            feature = naive_transposed_conv(feature, module.weight, module.bias)
        elif isinstance(module, nn.Conv2d):
            feature = naive_conv(feature, module.weight, module.bias)
        else:
            feature = naive_leaky(feature)
    return feature


# Translator


@pytest.mark.parametrize(("student", "teacher"), [(2, 3), (3, 2), (1, 1)])
def test_the_translator_is_three_convolutions_each_with_leaky_relu(student, teacher):
    torch.manual_seed(0)
    translator = Translator(student, teacher).double()
    features = torch.randn(2, student, 3, 4, dtype=torch.float64)
    translated = translator(features)
    assert translated.shape == (2, teacher, 3, 4)
    for sample, expected in zip(translated, [naive_run(translator, feature) for feature in features], strict=True):
        assert torch.allclose(sample, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("student", "teacher"), [(64, 64), (8, 16), (16, 8), (1, 5)])
def test_the_parameters_of_the_translator_are_those_counted_by_hand(student, teacher, batch_norm):
    expected = (9 * student * student + student) + (9 * student * teacher + teacher) + (9 * teacher * teacher + teacher)
    if batch_norm:
        expected += 2 * (student + teacher + teacher)
    assert count(Translator(student, teacher, batch_norm=batch_norm)) == expected


def test_the_translator_of_64_to_64_has_110784_parameters():
    assert count(Translator(64, 64)) == 110_784


def test_the_translator_has_no_batch_norm_by_default():
    kinds = [nn.Conv2d, nn.LeakyReLU] * 3
    assert [type(module) for module in Translator(2, 3)] == kinds
    assert [type(module) for module in Translator(2, 3, batch_norm=True)] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.LeakyReLU,
    ] * 3


def test_the_channels_of_the_translator_change_in_the_middle():
    channels = [(conv.in_channels, conv.out_channels) for conv in Translator(2, 5) if isinstance(conv, nn.Conv2d)]
    assert channels == [(2, 2), (2, 5), (5, 5)]


def test_the_last_activation_lets_a_tenth_of_the_negative_through():
    translator = Translator(1, 1)
    for parameter in translator.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(translator[4].bias, -2.0)
    assert torch.allclose(translator(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), -0.2))


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 8)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_translator_keeps_the_spatial_size(size, batch_norm):
    assert Translator(3, 4, batch_norm=batch_norm)(torch.rand(2, 3, *size)).shape == (2, 4, *size)


def test_every_parameter_of_the_translator_gets_a_gradient():
    torch.manual_seed(0)
    translator = Translator(3, 4)
    translator(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in translator.parameters())


# Paraphraser


def test_the_paraphraser_is_three_convolutions_and_three_transposed_ones():
    torch.manual_seed(0)
    paraphraser = Paraphraser(4, rate=0.5).double()
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    code, reconstruction = paraphraser.encoder(features), paraphraser(features)
    for n in range(2):
        expected = naive_run(paraphraser.encoder, features[n])
        assert torch.allclose(code[n], expected, rtol=1e-10, atol=1e-12)
        expected = naive_run(paraphraser.decoder, expected)
        assert torch.allclose(reconstruction[n], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "rate", "factors"), [(64, 0.5, 32), (4, 0.5, 2), (4, 1.0, 4), (4, 2.0, 8), (10, 0.33, 3), (3, 0.25, 1)]
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_code_has_the_rate_of_the_channels_and_the_reconstruction_all(channels, rate, factors, batch_norm):
    paraphraser = Paraphraser(channels, rate=rate, batch_norm=batch_norm)
    feature = torch.rand(2, channels, 3, 5)
    assert (paraphraser.channels, paraphraser.factors) == (channels, factors)
    assert paraphraser.encoder(feature).shape == (2, factors, 3, 5)
    assert paraphraser(feature).shape == (2, channels, 3, 5)
    convolutions = [(c * 9 * d, d) for c, d in [(channels, channels), (channels, factors), (factors, factors)]]
    convolutions += [(c * 9 * d, d) for c, d in [(factors, factors), (factors, channels), (channels, channels)]]
    expected = sum(weights + outputs * (3 if batch_norm else 1) for weights, outputs in convolutions)
    assert count(paraphraser) == expected


def test_the_rate_is_one_half_by_default():
    assert Paraphraser(64).factors == 32


def test_the_decoder_is_transposed_and_the_encoder_is_not():
    paraphraser = Paraphraser(4)
    assert [type(module) for module in paraphraser.encoder] == [nn.Conv2d, nn.LeakyReLU] * 3
    assert [type(module) for module in paraphraser.decoder] == [nn.ConvTranspose2d, nn.LeakyReLU] * 3


@pytest.mark.parametrize(("channels", "rate"), [(4, 0.0), (4, 0.1), (4, -0.5), (1, 0.5)])
def test_a_rate_that_leaves_no_factor_channel_is_refused(channels, rate):
    with pytest.raises(InputError, match=f"rate {rate} of {channels} channels leaves no factor channel"):
        Paraphraser(channels, rate=rate)
