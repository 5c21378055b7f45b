"""Tickets go back to where they began, and their control elsewhere."""

import copy

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.mask.lottery import copy_state, reinitialize
from distill_lightning.testing import TinyNet

PATHS = ["features.0.weight", "features.3.weight", "head.weight"]


def trained(network, steps=4):
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for number in range(steps):
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        network.train()(images).square().sum().backward()
        optimizer.step()
    return optimizer


def test_a_copied_state_does_not_change_with_its_network():
    network = TinyNet()
    state, begun = copy_state(network), copy.deepcopy(network.state_dict())
    trained(network)
    assert all(torch.equal(value, begun[name]) for name, value in state.items())
    assert state.keys() == begun.keys()
    assert not torch.equal(network.head.weight, begun["head.weight"])


def test_the_control_has_new_weights_by_the_seed_alone():
    network = TinyNet()
    before = copy.deepcopy(network.state_dict())
    trained(network)
    state = torch.random.get_rng_state()
    reinitialize(network, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = copy.deepcopy(network.state_dict())
    assert all(not torch.equal(first[path], before[path]) for path in PATHS)
    assert first["features.1.running_mean"].count_nonzero() == 0
    bound = 1 / network.features[3].weight[0].numel() ** 0.5  # of PyTorch's uniform initialisation
    assert 0.8 * bound < first["features.3.weight"].abs().max() <= bound
    torch.rand(7)
    reinitialize(network, seed=3)
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())
    reinitialize(network, seed=4)
    assert not torch.equal(network.head.weight, first["head.weight"])


def test_recurrent_and_attention_layers_are_drawn_anew():
    network = nn.ModuleList([nn.LSTM(3, 4), nn.TransformerEncoderLayer(8, 2, 16), nn.Embedding(5, 3)])
    before = copy.deepcopy(network.state_dict())
    reinitialize(network, seed=9)
    same = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    assert same == [name for name in before if "norm" in name or name.endswith(("in_proj_bias", "out_proj.bias"))]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList([torch.ones(2)])


class Drawn(Listed):
    def reset_parameters(self):
        nn.init.constant_(self.gains[0], 7)


def test_parameters_in_a_list_are_drawn_by_the_layer_that_has_it():
    with pytest.raises(InputError, match="Listed has parameters and no reset_parameters"):
        reinitialize(nn.Sequential(Listed()), seed=0)
    network = nn.Sequential(Drawn())
    reinitialize(network, seed=0)
    assert network[0].gains[0].tolist() == [7, 7]


def test_what_cannot_initialise_itself_needs_a_function():
    with pytest.raises(InputError, match=r"Bare has parameters and no reset_parameters\(\): give it one, or init="):
        reinitialize(Bare(), seed=0)
    network = Bare()
    reinitialize(network, seed=0, init=lambda module: nn.init.constant_(module.gain, 5))
    assert network.gain.tolist() == [5, 5]
