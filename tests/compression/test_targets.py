"""Which layers a pattern means."""

import pytest
import torch
from torch import nn

from distill_lightning import SmallCNN, SmallTransformer
from distill_lightning.compression import Compressor, PruneUnits, PruneWeights, Quantize, ShareWeights
from distill_lightning.compression.access.targets import match_layers
from distill_lightning.errors import InputError


def found(targets, exclude=(), network=None, kinds=(nn.Conv2d, nn.Linear)):
    network = network or SmallCNN(10)
    fits = lambda layer: isinstance(layer, kinds)  # noqa: E731
    return match_layers(network, targets, exclude, fits=fits, what="convolutional and linear layers")


@pytest.mark.parametrize(
    ("targets", "exclude", "paths"),
    [
        (None, (), ["features.0", "features.4", "features.8", "head"]),
        ("features", (), ["features.0", "features.4", "features.8"]),
        ("features.*", "features.0", ["features.4", "features.8"]),
        ("Conv2d", (), ["features.0", "features.4", "features.8"]),
        ("Module", ["head"], ["features.0", "features.4", "features.8"]),
        (["head", "features.4"], (), ["features.4", "head"]),
        (r"re:features\.[04]", (), ["features.0", "features.4"]),
        (r"re:features\..", (), ["features.0", "features.4", "features.8"]),
        (None, "Linear", ["features.0", "features.4", "features.8"]),
        (None, "features", ["head"]),
    ],
)
def test_patterns(targets, exclude, paths):
    assert found(targets, exclude) == paths


def test_the_name_of_a_part_means_all_in_it():
    network = SmallTransformer(10, length=8, input_size=8)
    assert found("encoder.layers.0", network=network) == [
        "encoder.layers.0.self_attn.out_proj", "encoder.layers.0.linear1", "encoder.layers.0.linear2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        ("feature", (), "targets 'feature' matches none of SmallCNN's .*: similar names: features"),
        ("BatchNorm2d", (), "targets 'BatchNorm2d' matches none"),
        ("re:features", (), "matches none"),
        ("re:(", (), r"targets 're:\(' is not a regular expression"),
        (None, "re:(", r"exclude 're:\(' is not a regular expression"),
        (None, "tail", "exclude 'tail' matches none"),
        ("head", "head", "nothing is left to work on"),
        ([], (), r"nothing is left to work on, which needs .*: targets=\[\]"),
    ],
)
def test_what_matches_nothing_is_refused(targets, exclude, message):
    with pytest.raises(InputError, match=message) as refusal:
        found(targets, exclude)
    assert "\n" not in str(refusal.value)


IMAGES = torch.rand(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneWeights(amount={"Conv3d": 0.5}), "amount 'Conv3d' matches none of SmallCNN's layers to prune"),
        (PruneUnits(unit="channel", amount={"Conv3d": 0.5}), "amount 'Conv3d' matches none"),
        (ShareWeights(k={"Conv3d": 4}), "k 'Conv3d' matches none of SmallCNN's layers with weights"),
        (ShareWeights(k={"*": 4, "Conv3d": 4}, targets="Conv2d"), "k 'Conv3d' matches none"),
        (Quantize(bits={"Conv3d": 4}), "bits 'Conv3d' matches none of SmallCNN's layers to quantize"),
        (ShareWeights(targets="Conv3d"), "targets 'Conv3d' matches none"),
        (PruneUnits(unit="neuron", amount=0.5), "the neurons of other networks are channels, unit='channel'"),
    ],
)
def test_the_message_names_the_option_that_has_the_pattern(step, message):
    with pytest.raises(InputError, match=message):
        Compressor(SmallCNN(10), [step], IMAGES).apply()


def test_no_bias_to_correct():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    step = Quantize(weight_bits=4, bias_correction=True)
    with pytest.raises(InputError, match="Sequential has no linear or conv layer with a bias .* leave bias_correction"):
        Compressor(network, [step], IMAGES, batches=[(IMAGES, torch.tensor([0, 1]))]).apply()
