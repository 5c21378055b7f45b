"""The names that parts of a network have without what wraps them."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from distill_lightning.layers import named_parts, plain_name, unwrapped
from distill_lightning.layers.wrappers import part_at
from distill_lightning.networks import recipe_of
from distill_lightning.networks.weights import write_weights
from distill_lightning.testing import TinyNet


def wrapped():
    network = TinyNet()
    network.features[0] = checkpoint_wrapper(network.features[0])
    network.features = nn.DataParallel(network.features)
    return torch.compile(network, backend="eager")


def test_parts_of_a_wrapped_network_have_the_names_that_they_had():
    assert list(named_parts(wrapped())) == [name for name, _ in TinyNet().named_modules()]
    network = wrapped()
    assert named_parts(network)["features.0"] is unwrapped(unwrapped(network).features)[0]._checkpoint_wrapped_module
    assert all(part_at(network, name) is part for name, part in named_parts(network).items() if name)


def test_state_of_a_wrapped_network_has_the_names_that_it_had():
    network = wrapped()
    assert [plain_name(network, name) for name in network.state_dict()] == list(TinyNet().state_dict())


def test_a_module_of_that_name_is_no_wrapper():
    network = nn.ModuleDict({"module": nn.Linear(1, 1)})
    assert list(named_parts(network)) == ["", "module"]
    assert plain_name(network, "module.weight") == "module.weight"
    assert part_at(network, "nobody") is None


def test_tied_modules_have_their_first_name():
    layer = nn.Linear(1, 1)
    assert list(named_parts(nn.Sequential(layer, nn.Sequential(layer)))) == ["", "0", "1"]


def test_an_average_of_weights_is_a_wrapper():
    network = TinyNet()
    average = AveragedModel(network)
    assert unwrapped(average) is average.module


def test_recipes_and_weights_are_those_of_the_network_itself(tmp_path):
    from distill_lightning import SmallCNN

    network = SmallCNN(3)
    outer = nn.DataParallel(network)
    assert recipe_of(outer) == recipe_of(network)
    assert recipe_of(network) is not None
    saved = torch.load(write_weights(outer, tmp_path / "network.pt"), weights_only=True)
    assert saved.keys() == network.state_dict().keys()
