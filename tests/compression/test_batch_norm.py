"""BatchNorm statistics measured anew, and nothing else touched."""

import copy
import math

import pytest
import torch
from torch import nn

from distill_lightning.compression.run.batch_norm import recalibrate
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.errors import InputError
from distill_lightning.networks import SmallResNet


def batches(count=4):
    return [torch.randn(size, 1, 8, 8) * 2 + 1 for size in range(3, 3 + count)]


def two_norms():
    return nn.Sequential(
        nn.BatchNorm2d(1, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)
    )


def by_hand(network, given):
    """Mean over the batches of mean and unbiased variance, with loops."""
    first, second = [], []
    for batch in given:
        values = batch.flatten()
        mean = values.sum() / len(values)
        first.append((mean, ((values - mean) ** 2).sum() / (len(values) - 1)))
        biased = ((values - mean) ** 2).sum() / len(values)
        hidden = torch.relu(network[2]((batch - mean) / (biased + 1e-5).sqrt()))
        means = torch.stack([hidden[:, c].sum() / hidden[:, c].numel() for c in range(2)])
        spreads = [((hidden[:, c] - means[c]) ** 2).sum() / (hidden[:, c].numel() - 1) for c in range(2)]
        second.append((means, torch.stack(spreads)))
    return [[sum(values) / len(given) for values in zip(*of, strict=True)] for of in (first, second)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_loops(dtype):
    network, given = two_norms().to(dtype), [batch.to(dtype) for batch in batches()]
    with torch.no_grad():
        wanted = by_hand(network, given)
        network[0].running_mean.fill_(100)  # whatever was there is forgotten
    assert recalibrate(network, given) == 4
    for norm, (mean, variance) in zip((network[0], network[4]), wanted, strict=True):
        assert torch.allclose(norm.running_mean, mean.expand_as(norm.running_mean), atol=1e-5)
        assert torch.allclose(norm.running_var, variance.expand_as(norm.running_var), rtol=1e-5)
        assert norm.num_batches_tracked == 4
        assert norm.running_mean.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_left_as_it_was(training):
    network = two_norms().train(training)
    network[4].eval()
    network[0].weight.requires_grad_(requires_grad=False)
    modes = [module.training for module in network.modules()]
    parameters = {name: parameter.clone() for name, parameter in network.named_parameters()}
    objects = list(network.buffers())
    given = batches()
    random = torch.get_rng_state()
    recalibrate(network, given)
    assert torch.equal(torch.get_rng_state(), random)  # dropout drew nothing
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, parameters[name]) for name, value in network.named_parameters())
    assert [parameter.requires_grad for parameter in network.parameters()] == [False] + [True] * 5
    assert all(parameter.grad is None for parameter in network.parameters())
    assert (network[0].momentum, network[4].momentum) == (0.3, 0.1)
    assert all(a is b for a, b in zip(objects, network.buffers(), strict=True))


def test_the_limit_and_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, first, second):
            return self.norm(first + second)

    first, second = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    network = Sum()
    taken = iter(zip(first, second, strict=True))
    assert recalibrate(network, taken, limit=2) == 2
    assert torch.allclose(network.norm.running_mean, (first + second)[:2].mean((0, 1)), atol=1e-6)


def test_the_same_batches_give_the_same_statistics_again():
    network, given = SmallResNet(3), batches()
    recalibrate(network, given)
    first = copy.deepcopy(network.state_dict())
    recalibrate(network, given)
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


def test_networks_without_statistics_are_not_run():
    class Loud(nn.Module):
        def forward(self, images):
            raise AssertionError

    for network in (Loud(), nn.Sequential(Loud(), nn.BatchNorm2d(1, track_running_stats=False))):
        assert recalibrate(network, batches()) == 0


def test_nothing_changes_when_it_fails():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    recalibrate(network, batches())
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match="no batch came"):
        recalibrate(network, [])
    with pytest.raises(InputError, match="no batch came"):
        recalibrate(network, batches(), limit=0)
    with pytest.raises(InputError, match="recalibration: Expected more than 1 value per channel"):
        recalibrate(network, [*batches(), torch.randn(1, 1, 8, 8)])
    with pytest.raises(InputError, match="recalibration: a batch gives NaN or infinity"):
        recalibrate(network, [*batches(), torch.full((2, 1, 8, 8), math.nan)])
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network[1].momentum == 0.1
    assert network[1].training


def test_it_brings_a_shrunk_networks_activations_back_to_the_norm():
    network, given = SmallResNet(3, width=16), [torch.randn(32, 1, 8, 8) * 2 + 1 for _ in range(4)]
    recalibrate(network, given)
    shrink(network, {group: range(group.size // 4) for group in channel_groups(network, given[0])})

    def off():
        """How far the last block's input is from mean 0 and variance 1 behind its norm."""
        seen = []
        handle = network.stage3[0].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        network.eval()(torch.cat(given))
        handle.remove()
        norm = network.stage3[0].norm1
        plain = (seen[0] - norm.bias[:, None, None]) / norm.weight[:, None, None]
        return float(plain.mean((0, 2, 3)).abs().mean() + (plain.var((0, 2, 3)) - 1).abs().mean())

    with torch.no_grad():
        before = off()
        recalibrate(network, given)
        after = off()
    assert after < 0.1 < before


def test_frozen_parts_keep_theirs():
    """In eval mode, which a part without gradients has where its statistics are to stay."""
    network, given = two_norms(), batches()
    network[0].requires_grad_(requires_grad=False).eval()
    network[0].running_mean.fill_(0.7)
    before = copy.deepcopy(network.state_dict())
    assert recalibrate(network, given) == 4
    for name, value in before.items():
        assert torch.equal(value, network.state_dict()[name]) == (
            not name.startswith("4.running") and "4.num" not in name
        )
    # The second one's statistics are of what the first one gives in eval mode.
    with torch.no_grad():
        network.eval()
        means = [network[:4](batch).mean((0, 2, 3)) for batch in given]
    torch.testing.assert_close(network[4].running_mean, torch.stack(means).mean(0))
    # In train mode they move in training, too.
    network[0].train()
    recalibrate(network, given)
    assert not torch.equal(before["0.running_mean"], network[0].running_mean)
    # Nothing but frozen parts: the network is not a part of a training.
    network[0].running_mean.fill_(0.7)
    recalibrate(network.requires_grad_(requires_grad=False).eval(), given)
    assert not torch.equal(before["0.running_mean"], network[0].running_mean)


def test_a_network_with_nothing_to_measure_is_not_run():
    network = nn.Sequential(nn.BatchNorm2d(1).requires_grad_(requires_grad=False).eval(), nn.Conv2d(1, 1, 1))
    assert recalibrate(network, []) == 0


@pytest.mark.slow
def test_a_pruned_frozen_layer_keeps_the_statistics_of_the_channels_that_are_left():
    network = SmallResNet(3, width=8)
    norm = network.stage1[0].norm1
    norm.running_mean.copy_(torch.arange(8.0))
    norm.requires_grad_(requires_grad=False).eval()
    given = batches()
    groups = channel_groups(network, given[0])
    shrink(network, {group: range(group.size // 4) for group in groups})
    left = norm.running_mean.clone()
    recalibrate(network, given)
    assert torch.equal(norm.running_mean, left)
    assert set(left.tolist()) <= set(range(8))
