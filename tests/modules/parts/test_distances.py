"""Distances and the translators that belong to them."""

import pytest
import torch
from torch import nn

from distill_lightning import (
    AttentionDistance,
    Conv1x1Translator,
    Conv3Translator,
    FactorDistance,
    FunctionTranslator,
    HintDistance,
    InputError,
    LinearTranslator,
    NoTranslator,
    functional,
)
from distill_lightning.layers import Translator

FEATURES = torch.rand(2, 5, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_three_convolutions_are_the_papers_translator(batch_norm):
    made = Conv3Translator(batch_norm=batch_norm).make(4, 6)
    wanted = Translator(4, 6, batch_norm=batch_norm)
    assert type(made) is Translator
    assert [type(module) for module in made] == [type(module) for module in wanted]
    assert {name: value.shape for name, value in made.state_dict().items()} == {
        name: value.shape for name, value in wanted.state_dict().items()
    }


def test_one_convolution_with_and_without_its_activation():
    convolution, activation = Conv1x1Translator().make(2, 3)
    linear = LinearTranslator().make(2, 3)
    for layer in (convolution, linear):
        assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (2, 3, (1, 1))
    feature = FEATURES[0, :, :2]
    assert isinstance(activation, nn.LeakyReLU)
    assert activation.negative_slope == 0.1
    weight, bias = linear.weight[:, :, 0, 0], linear.bias
    expected = torch.einsum("oc,nchw->nohw", weight, feature) + bias[:, None, None]
    assert torch.allclose(linear(feature), expected, atol=1e-6)


def test_no_translator_is_the_identity_between_equal_channels():
    feature = FEATURES[0]
    assert NoTranslator().make(8, 8)(feature) is feature
    with pytest.raises(InputError, match="they have 8 and 4 channels: choose another translator"):
        NoTranslator().make(8, 4)


def test_a_function_gets_the_channels_and_takes_features_of_any_shape():
    translation = FunctionTranslator(nn.Linear, shared=True)
    made = translation.make(4, 6)
    assert (made.in_features, made.out_features) == (4, 6)
    assert not translation.maps_only
    assert Conv3Translator().maps_only


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_distance_is_its_formula(reduction):
    one, other = FEATURES
    pairs = [
        (FactorDistance(p=2, reduction=reduction), functional.factor_distance(one, other, p=2, reduction=reduction)),
        (HintDistance(reduction=reduction), functional.hint_distance(one, other, reduction=reduction)),
        (AttentionDistance(reduction=reduction), functional.attention_distance(one, other, reduction=reduction)),
    ]
    for distance, expected in pairs:
        assert torch.equal(distance(one, other), expected)


def test_names_weights_and_translators_are_the_papers():
    found = [(one.name, one.beta, one.translator) for one in (FactorDistance(), HintDistance(), AttentionDistance())]
    assert found == [("feed", 500.0, Conv3Translator()), ("hint", 1.0, Conv3Translator()), ("attention", 1000.0, None)]


def test_the_share_of_zero_features_is_a_mean_over_teachers():
    black = FEATURES[0].clone()
    black[0] = 0
    assert float(FactorDistance().observed([black, FEATURES[1]])["zero_features"]) == pytest.approx(0.1)
    assert FactorDistance(normalize="none").observed([black]) == {}
    assert HintDistance().observed([black]) == {}
