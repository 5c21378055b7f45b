"""The last layer of a regression, and a network without what it says of its deviation."""

import copy
import math

import pytest
import torch
from torch import nn

from distill_lightning import AdaptedInput, InputError, SmallResNet
from distill_lightning.functional import gaussian_nll, split_gaussian
from distill_lightning.layers import GaussianHead
from distill_lightning.networks import recipe_of, without_deviation
from distill_lightning.testing import TinyNet


def filled(head, seed=0, scale=1.0):
    """The head with weights of which none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return head


def naive_head(head, feature):
    """Row by row, entry by entry."""
    rows = []
    for values in feature.tolist():
        outputs = [
            sum(w * x for w, x in zip(weights, values, strict=True)) + bias
            for weights, bias in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
        ]
        targets = len(outputs) // 2
        low, high = head.bounds
        rows.append(outputs[:targets] + [min(max(value, low), high) for value in outputs[targets:]])
    return rows


@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-0.5, 0.25)])
@pytest.mark.parametrize(("count", "features", "targets"), [(1, 1, 1), (4, 5, 1), (3, 6, 2), (2, 3, 7)])
def test_the_output_is_the_loop(count, features, targets, bounds):
    head = filled(GaussianHead(features, targets, bounds=bounds))
    feature = torch.randn(count, features)
    output = head(feature)
    assert output.shape == (count, 2 * targets)
    for row, expected in zip(output.tolist(), naive_head(head, feature), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_default_bounds_are_those_of_the_formulas():
    head = filled(GaussianHead(2, 1), scale=100.0)
    output = head(torch.tensor([[10.0, 10.0], [-10.0, -10.0]]))
    assert sorted(output[:, 1].tolist()) == [-10, 10]
    assert output[:, 0].abs().min().item() > 10
    mean, log_var = split_gaussian(output)
    assert torch.equal(torch.cat([mean, log_var], dim=1), output)


@pytest.mark.parametrize("targets", [1, 3])
def test_a_new_head_says_variance_1_of_everything_and_its_means_differ(targets):
    output = GaussianHead(8, targets)(torch.randn(20, 8) * 100)
    assert torch.equal(output[:, targets:], torch.zeros(20, targets))
    assert (output[:, :targets].std(dim=0) > 1).all()


@pytest.mark.parametrize(
    ("bounds", "begins"),
    [
        ((-10.0, 10.0), 0.0),
        ((-0.5, 0.25), 0.0),
        ((-math.inf, math.inf), 0.0),
        ((-8.0, -2.0), -3.0),
        ((-8.0, 0.0), -1.0),
        ((0.0, 6.0), 1.0),
        ((3.0, 3.5), 3.25),
        ((1.0, math.inf), 2.0),
    ],
)
def test_a_new_head_begins_where_it_has_a_gradient(bounds, begins):
    head = GaussianHead(4, 2, bounds=bounds)
    output = head(torch.randn(5, 4))
    assert output[:, 2:].unique().tolist() == [begins]
    output.sum().backward()
    assert head.bias.grad.tolist() == [5, 5, 5, 5]
    assert (head.weight.grad[2:] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [(-8.0, -2.0), (2.0, 8.0), (-10.0, 10.0)])
def test_a_head_learns_the_deviation_of_its_targets(bounds):
    middle = sum(bounds) / 2
    head = GaussianHead(4, 2, bounds=bounds)
    feature = torch.randn(400, 4)
    target = head(feature)[:, :2].detach() + math.exp(middle / 2) * torch.randn(400, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        gaussian_nll(*split_gaussian(head(feature)), target).backward()
        optimizer.step()
    # Four standard errors of the logarithm of a variance from 400 normal numbers, and what five weights take away.
    error = 4 * math.sqrt(2 / 400) + 5 / 400
    assert (head(feature)[:, 2:].mean(dim=0) - middle).abs().max().item() < error


def test_beyond_its_bounds_a_log_variance_has_no_gradient_and_a_mean_has():
    head = filled(GaussianHead(3, 1, bounds=(-1.0, 1.0)), scale=10.0)
    head(torch.ones(1, 3)).sum().backward()
    assert head.weight.grad.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_is_the_features(dtype):
    head = filled(GaussianHead(3, 2)).to(dtype)
    output = head(torch.ones(2, 3, dtype=dtype))
    assert output.dtype == dtype
    assert output[0].tolist() == pytest.approx(naive_head(head, torch.ones(1, 3))[0], rel=0.02, abs=0.02)


@pytest.mark.parametrize("targets", [0, -1])
def test_no_targets_are_refused(targets):
    with pytest.raises(InputError, match=f"GaussianHead: num_targets must be at least 1, got {targets}"):
        GaussianHead(3, targets)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, -2.0), (float("nan"), 1.0)])
def test_bounds_that_are_no_interval_are_refused(bounds):
    with pytest.raises(InputError, match=r"GaussianHead: bounds must be \(smallest, largest\) log-variance, got \("):
        GaussianHead(3, 1, bounds=bounds)


# the means alone


@pytest.mark.parametrize("targets", [1, 3])
def test_the_means_are_a_plain_layer_with_weights_of_its_own(targets):
    head = filled(GaussianHead(5, targets))
    layer, feature = head.means(), torch.randn(7, 5)
    assert type(layer) is nn.Linear
    expected = [row[:targets] for row in naive_head(head, feature)]
    for row, values in zip(layer(feature).tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-5, abs=1e-5)
    with torch.no_grad():
        head.weight.zero_()
    assert layer.weight.all()


def test_the_means_keep_the_type():
    assert {parameter.dtype for parameter in GaussianHead(3, 1).double().means().parameters()} == {torch.float64}


# without_deviation


def networks():
    torch.manual_seed(1)
    built = [
        TinyNet(None, num_targets=2),
        SmallResNet(num_targets=2, width=2),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 5), nn.ReLU(), GaussianHead(5, 2))),
        AdaptedInput(SmallResNet(num_targets=2, width=2), mean=0.5, std=0.5),
        nn.Sequential(nn.Flatten(), GaussianHead(64, 2)),
    ]
    for network in built:
        for module in network.modules():
            if isinstance(module, GaussianHead):
                filled(module)
    return built


@pytest.mark.parametrize("number", range(5))
def test_a_network_without_deviation_gives_its_means(number):
    network = networks()[number].eval()
    images = torch.rand(9, 1, 8, 8)
    plain = without_deviation(network)
    with torch.no_grad():
        assert plain(images).shape == (9, 2)
        assert torch.allclose(plain(images), network(images)[:, :2], rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, GaussianHead) for module in plain.modules())


def test_a_head_alone_becomes_a_plain_layer():
    head = filled(GaussianHead(4, 1))
    feature = torch.randn(3, 4)
    plain = without_deviation(head)
    assert type(plain) is nn.Linear
    assert torch.allclose(plain(feature), head(feature)[:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", range(5))
def test_the_network_itself_stays_as_it_is_and_shares_nothing(number):
    network = networks()[number]
    before = copy.deepcopy(network.state_dict())
    plain = without_deviation(network)
    for value in plain.state_dict().values():
        value.fill_(7)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_only_the_rows_of_the_log_variances_are_gone():
    network = networks()[1]
    whole, plain = network.state_dict(), without_deviation(network).state_dict()
    assert whole.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(value, whole[name][:2] if name.startswith("head.") else whole[name])
    assert sum(value.numel() for value in whole.values()) - sum(value.numel() for value in plain.values()) == 2 * 9


@pytest.mark.parametrize("number", [1, 3])
def test_a_network_without_deviation_has_no_recipe_because_it_is_not_what_the_factory_builds(number):
    network = networks()[number]
    plain = without_deviation(network)
    assert recipe_of(network) is not None
    assert [recipe_of(module) for module in plain.modules() if recipe_of(module) is not None] == []


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (nn.Sequential(nn.Linear(3, 2)), 0),
        (nn.Sequential(GaussianHead(3, 2), GaussianHead(4, 1)), 2),
        (nn.Linear(3, 2), 0),
    ],
)
def test_a_network_without_a_head_or_with_several_is_refused(network, count):
    message = f"{type(network).__name__} has {count} GaussianHead layers where one is needed"
    with pytest.raises(InputError, match=message):
        without_deviation(network)
