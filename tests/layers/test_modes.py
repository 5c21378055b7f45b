"""Which parts of a network train mode reaches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import KDModule, ParaphraserModule, SupervisedModule
from distill_lightning.layers import freeze, wake
from distill_lightning.testing import TinyNet, tiny_trainer


def modes(network):
    return {name: child.training for name, child in network.named_modules()}


def test_everything_that_learns_wakes():
    network = TinyNet().eval()
    wake(network)
    assert all(modes(network).values())


def test_a_frozen_part_keeps_its_mode_with_all_that_is_in_it():
    body = freeze(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Dropout()))
    network = nn.Sequential(body, nn.Dropout(), nn.Linear(2, 2)).eval()
    wake(network)
    asleep = ["0", "0.0", "0.1", "0.2"]
    assert modes(network) == {name: name not in asleep for name in ["", "0", "0.0", "0.1", "0.2", "1", "2"]}
    body.train()
    body[2].eval()
    wake(network)
    assert [name for name, training in modes(network).items() if not training] == ["0.2"]


def test_a_part_is_frozen_only_if_all_its_parameters_are():
    body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2)).eval()
    body[2].requires_grad_(requires_grad=False)
    wake(body)
    assert modes(body) == {"": True, "0": True, "1": True, "2": False}


def data():
    return DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 3), batch_size=8)


@pytest.mark.parametrize(
    "build", [lambda s: SupervisedModule(s, num_classes=3), lambda s: KDModule(s, TinyNet(), num_classes=3)]
)
def test_a_students_frozen_body_keeps_its_statistics_in_fit(build):
    student = TinyNet()
    freeze(student.features)
    before = copy.deepcopy(student.features.state_dict())
    head = student.head.weight.detach().clone()
    module = build(student)
    tiny_trainer(max_epochs=2).fit(module, data(), data())
    for name, value in student.features.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(student.head.weight, head)
    assert student.head.training
    assert not student.features[1].training


def test_a_frozen_paraphraser_keeps_its_mode():
    module = ParaphraserModule([TinyNet(), TinyNet()], layers="features", input_shape=(1, 8, 8), batch_norm=True)
    first, second = module.paraphrasers
    freeze(first)
    second.eval()
    before = copy.deepcopy(first.state_dict())
    tiny_trainer().fit(module, data(), data())
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert not first.training
    assert second.training
