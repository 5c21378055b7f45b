"""MEAL V2's discriminator: its sizes, what it computes, and where it dies."""

import math
import warnings

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.functional import discriminator_loss
from distill_lightning.layers import Discriminator


def quiet(num_classes, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Discriminator: with")
        return Discriminator(num_classes, **options)


def widths(network):
    linear = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    return [linear[0].in_features, *(layer.out_features for layer in linear)]


def naive_forward(network, rows):
    """Plain loops over the layers' weights."""
    outputs = []
    for row in rows.tolist():
        for number in (0, 2, 4):
            weight, bias = network.layers[number].weight.tolist(), network.layers[number].bias.tolist()
            row = [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]  # noqa: PLW2901
            if network.kind == "official":
                row = [max(x, 0.0) for x in row]  # noqa: PLW2901
            elif number < 4:
                row = [x if x > 0 else 0.2 * x for x in row]  # noqa: PLW2901
        outputs.append(row)
    return torch.tensor(outputs)


@pytest.mark.parametrize("kind", ["official", "fixed"])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_the_forward_is_the_loop(kind, num_classes):
    for seed in range(4):
        torch.manual_seed(seed)
        network = quiet(num_classes, kind=kind)
        rows = torch.randn(6, num_classes) * 4
        assert torch.allclose(network(rows), naive_forward(network, rows), rtol=1e-4, atol=1e-5)


def test_the_official_network_has_127047_parameters_at_1000_classes():
    network = Discriminator(1000)
    assert widths(network) == [1000, 125, 15, 2]
    assert sum(parameter.numel() for parameter in network.parameters()) == 127_047


def test_the_linear_layers_are_the_1x1_convolutions_of_the_paper():
    network = Discriminator(300)
    rows = torch.randn(3, 300)
    maps = rows[:, :, None, None]
    for number in (0, 2, 4):
        layer = network.layers[number]
        maps = torch.relu(nn.functional.conv2d(maps, layer.weight[:, :, None, None], layer.bias))
    assert torch.allclose(network(rows), maps.flatten(1), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "num_classes", "reduction", "expected"),
    [
        ("official", 2, 8, [2, 1, 1, 2]),
        ("official", 63, 8, [63, 7, 1, 2]),
        ("official", 64, 8, [64, 8, 1, 2]),
        ("official", 100, 4, [100, 25, 6, 2]),
        ("official", 256, 8, [256, 32, 4, 2]),
        ("fixed", 2, 8, [2, 16, 16, 2]),
        ("fixed", 200, 8, [200, 25, 16, 2]),
        ("fixed", 2000, 8, [2000, 250, 31, 2]),
        ("fixed", 200, 2, [200, 100, 50, 2]),
    ],
)
def test_the_widths(kind, num_classes, reduction, expected):
    assert widths(quiet(num_classes, kind=kind, reduction=reduction)) == expected


def test_only_the_official_outputs_are_never_negative():
    rows = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * 10
    assert Discriminator(300)(rows).min() == 0
    assert Discriminator(300, kind="fixed")(rows).min() < 0


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [64, 100])
def test_half_of_the_official_networks_have_a_dead_output_with_few_classes_and_no_fixed_one(num_classes):
    rows = torch.randn(128, num_classes, generator=torch.Generator().manual_seed(0)) * 3
    dead = {"official": 0, "fixed": 0}
    for kind in dead:
        for seed in range(100):
            torch.manual_seed(seed)
            dead[kind] += int((quiet(num_classes, kind=kind)(rows) == 0).all(dim=0).any())
    assert 40 <= dead["official"] <= 80
    assert dead["fixed"] == 0


@pytest.mark.parametrize(
    ("num_classes", "reduction", "message"),
    [
        (63, 8, "with 63 classes .* is 0 wide: its widths vanish"),
        (10, 8, "is 0 wide: its widths vanish"),
        (64, 8, "with 64 classes .* is 1 wide: its outputs are often dead from the start.*'fixed'"),
        (255, 8, "is 3 wide: its outputs are often dead"),
        (15, 4, "is 0 wide: its widths vanish"),
    ],
)
def test_few_classes_are_warned_about_and_the_way_out_named(num_classes, reduction, message):
    with pytest.warns(UserWarning, match=message):
        Discriminator(num_classes, reduction=reduction)


def test_enough_classes_and_the_fixed_kind_are_silent():
    # Warnings are errors here.
    Discriminator(256)
    Discriminator(64, reduction=4)
    Discriminator(2, kind="fixed")


@pytest.mark.slow
def test_the_fixed_network_learns_what_the_official_one_cannot():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(128, 300, generator=generator)
    teacher = torch.randn(128, 300, generator=generator) + 1
    ends = {}
    for kind in ("official", "fixed"):
        torch.manual_seed(0)
        network = Discriminator(300, kind=kind)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            discriminator_loss(network(student), network(teacher)).backward()
            optimizer.step()
        ends[kind] = discriminator_loss(network(student), network(teacher)).item()
    assert math.log(2) / 2 < ends["official"] < 0.36
    assert ends["fixed"] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "offical"}, "kind must be 'official' or 'fixed', got 'offical'"),
        ({"reduction": 0}, "must be at least 1, got 300 and 0"),
        ({"num_classes": 0}, "must be at least 1, got 0 and 8"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        Discriminator(**({"num_classes": 300} | options))
