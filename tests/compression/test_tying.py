"""Tied layers are one object, and remain it whatever happens to the network."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distill_lightning import InputError, SupervisedModule
from distill_lightning.compression.shrink.tying import restore_ties, tie_layers, ties_of
from distill_lightning.testing import tiny_trainer


class Block(nn.Module):
    def __init__(self, width, *, scale=1.0):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.scale = scale

    def forward(self, images):
        return images + self.scale * torch.relu(self.norm(self.conv(images)))


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *(Block(4) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


GROUPS = [["1", "3"], ["2.conv", "4.conv"]]
TIED = [("1", "3"), ("2.conv", "4.conv")]
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def assert_tied(network, prefix=""):
    for one, other in TIED:
        assert network.get_submodule(prefix + one) is network.get_submodule(prefix + other)
    assert network.get_submodule(f"{prefix}2.norm") is not network.get_submodule(f"{prefix}4.norm")


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_tied_layers_are_one_object_and_counted_once():
    network, dense = build(), build()
    first = network[1]
    assert tie_layers(network, GROUPS) is network
    assert_tied(network)
    assert network[3] is first
    assert count(network) == count(dense) - count(dense[3]) - count(dense[4].conv)
    # Naively: the same weights copied to both places of a network with layers of its own.
    dense[3].load_state_dict(dense[1].state_dict())
    dense[4].conv.load_state_dict(dense[2].conv.state_dict())
    assert torch.equal(network.eval()(IMAGES), dense.eval()(IMAGES))


def test_the_gradient_is_the_sum_over_all_places():
    network, dense = build().double().eval(), build().double().eval()
    tie_layers(network, GROUPS)
    dense[3].load_state_dict(dense[1].state_dict())
    dense[4].conv.load_state_dict(dense[2].conv.state_dict())
    for one in (network, dense):
        one(IMAGES.double()).square().sum().backward()
    for name, parameter in network[1].named_parameters():
        summed = dense[1].get_parameter(name).grad + dense[3].get_parameter(name).grad
        assert torch.allclose(parameter.grad, summed, atol=1e-14)
    assert torch.allclose(network[2].conv.weight.grad, dense[2].conv.weight.grad + dense[4].conv.weight.grad)


def test_means_are_those_of_all_modules():
    network, dense = build(), build()
    for module in (network, dense):
        torch.manual_seed(1)
        module(IMAGES)
        module[3](torch.randn(5, 4, 6, 6))
    tie_layers(network, [["1", "3", "4"]], init="mean")
    for name, tensor in network[1].state_dict().items():
        three = [dense[place].state_dict()[name] for place in (1, 3, 4)]
        if name == "norm.num_batches_tracked":
            assert tensor == three[0] == 1
        else:
            assert torch.allclose(tensor, (three[0] + three[1] + three[2]) / 3, atol=1e-7)
    assert network[1] is network[3] is network[4]
    assert not torch.equal(dense[1].norm.running_mean, network[1].norm.running_mean)


def test_batch_norms_of_tied_blocks_are_one():
    network = build()
    tie_layers(network, [["1", "3"]])
    network(IMAGES)
    assert network[3].norm.num_batches_tracked == 2


@pytest.mark.parametrize("init", ["first", "mean"])
@pytest.mark.parametrize("make", [
    lambda: nn.LSTM(4, 4, num_layers=2, bidirectional=True), lambda: nn.TransformerEncoderLayer(8, 2, 16),
    lambda: nn.MultiheadAttention(8, 2), lambda: nn.Embedding(5, 3), lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
])  # fmt: skip
def test_every_kind_of_layer(make, init):
    network = nn.ModuleDict({"one": make(), "two": make()})
    wanted = {
        name: (one.float() + two.float()) / 2 if init == "mean" else one.float().clone()
        for (name, one), two in zip(
            network["one"].state_dict().items(), network["two"].state_dict().values(), strict=True
        )
    }
    tie_layers(network, [["one", "two"]], init=init)
    assert network["one"] is network["two"]
    for name, tensor in network["two"].state_dict().items():
        assert torch.allclose(tensor.float(), wanted[name], rtol=2**-8, atol=0)


def test_it_remains_one_object_through_load_copy_and_save(tmp_path):
    network = tie_layers(build(), GROUPS)
    other = tie_layers(build(1), GROUPS)
    other.load_state_dict(network.state_dict(), strict=True)
    assert_tied(other)
    assert torch.equal(other.eval()(IMAGES), network.eval()(IMAGES))

    copied = copy.deepcopy(network)
    assert_tied(copied)
    assert copied[1] is not network[1]

    torch.save(network.state_dict(), tmp_path / "state.pt")
    loaded = tie_layers(build(2), GROUPS)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_tied(loaded)
    assert torch.equal(loaded.eval()(IMAGES), network.eval()(IMAGES))

    pickled = io.BytesIO()
    torch.save(network, pickled)
    pickled.seek(0)
    assert_tied(torch.load(pickled, weights_only=False))


def test_a_file_stores_it_once():
    def written(network):
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        return len(buffer.getvalue())

    one, two = (nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200)) for _ in range(2))
    tie_layers(one, [["0", "1"]])
    assert written(one) < 0.55 * written(two)


def test_it_remains_one_object_through_training():
    network = tie_layers(build(), GROUPS)
    before = network[1].conv.weight.detach().clone()
    loader = torch.utils.data.DataLoader([(image, number % 3) for number, image in enumerate(IMAGES)], batch_size=2)
    module = SupervisedModule(network, num_classes=3)
    tiny_trainer(max_epochs=2).fit(module, loader, loader)
    assert_tied(module.student)
    assert not torch.equal(module.student[3].conv.weight, before)
    parameters = module.configure_optimizers()
    optimizer = parameters["optimizer"] if isinstance(parameters, dict) else parameters
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == count(network)


@pytest.mark.slow
def test_an_exported_program_has_it_once():
    network = tie_layers(build(), GROUPS).eval()
    program = torch.export.export(network, (IMAGES,))
    stored = {value.untyped_storage().data_ptr(): value.numel() for _, value in program.named_parameters()}
    assert sum(stored.values()) == count(network)
    assert torch.allclose(program.module()(IMAGES), network(IMAGES), atol=1e-6)


def test_a_description_ties_a_fresh_network():
    network = tie_layers(build(), GROUPS)
    description = json.loads(json.dumps(ties_of(network)))
    assert description == GROUPS
    fresh = build(4)
    assert restore_ties(fresh, description) is fresh
    assert_tied(fresh)
    fresh.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(IMAGES), network.eval()(IMAGES))
    assert ties_of(fresh) == description
    # What is tied already, by the constructor say, remains so.
    assert restore_ties(fresh, description) is fresh
    assert ties_of(fresh) == description
    assert ties_of(build()) == []
    activation = nn.ReLU()
    assert ties_of(nn.Sequential(nn.Linear(2, 2), activation, nn.Linear(2, 2), activation)) == []


def test_what_was_tied_before_comes_along():
    network = tie_layers(build(), [["1", "2"]])
    tie_layers(network, [["3", "2"]])
    assert network[1] is network[2] is network[3]
    assert ties_of(network) == [["1", "2", "3"]]
    inner = tie_layers(build(), [["1.conv", "2.conv"]])
    tie_layers(inner, [["1", "2"]])
    assert inner[1] is inner[2]
    assert ties_of(inner) == [["1", "2"]]


def hooked():
    network = build()
    network[3].conv.register_forward_hook(lambda *_: None)
    return network


def parametrized():
    network = build()
    parametrize.register_parametrization(network[3].conv, "weight", nn.Identity())
    return network


def changed(change):
    network = build()
    change(network)
    return network


def borrowed():
    network = build()
    network.add_module("9", nn.Conv2d(4, 4, 3))
    network[8].weight = network[3].conv.weight
    return network


REFUSED = {
    "one path": (build, [["1"]], "at least two"),
    "text": (build, ["13"], "at least two"),
    "no module": (build, [["1", "31"]], "no layer '31'"),
    "a parameter": (build, [["1.conv.weight", "2.conv.weight"]], "no layer"),
    "the network": (build, [["", "1"]], "cannot be tied as a whole"),
    "twice": (build, [["1", "1"]], "is named twice"),
    "two groups": (build, [["1", "2"], ["2", "3"]], "is named twice"),
    "inside": (build, [["1", "2"], ["1.conv", "3.conv"]], "'1.conv' is inside '1'"),
    "inside its own group": (build, [["1.conv", "1"]], "'1.conv' is inside '1'"),
    "one module": (lambda: tie_layers(build(), [["1", "2"]]), [["1", "2"]], "the same module already"),
    "aliases": (lambda: tie_layers(build(), [["1", "2"]]), [["1", "3"], ["2", "4"]], "the same module already"),
    "class": (build, [["0", "1"]], "Conv2d and Block"),
    "shapes": (build, [["0", "1.conv"]], "in_channels is 1 and 4"),
    "options": (lambda: changed(lambda n: setattr(n[3], "scale", 0.5)), [["1", "3"]], "scale is 1.0 and 0.5"),
    "inner options": (lambda: changed(lambda n: setattr(n[3].norm, "eps", 0.5)), [["1", "3"]], "eps is .* at 'norm'"),
    "dtype": (lambda: changed(lambda n: n[3].double()), [["1", "3"]], "float32.* float64"),
    "frozen": (lambda: changed(lambda n: n[3].requires_grad_(False)), [["1", "3"]], "that trains"),
    "parts": (lambda: changed(lambda n: n[3].add_module("more", nn.ReLU())), [["1", "3"]], "parts differ"),
    "hooks": (hooked, [["1", "3"]], "'3' has hooks"),
    "parametrized": (parametrized, [["1", "3"]], "'3' is reparametrized"),
    "borrowed": (borrowed, [["1", "3"]], "shares weights with '9.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tied_is_one_line_and_changes_nothing(name):
    make, groups, words = REFUSED[name]
    network = make()
    modules = dict(network.named_modules(remove_duplicate=False))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=words) as refused:
        tie_layers(network, [["2.norm", "4.norm"], *groups] if name in ("class", "hooks") else groups, init="mean")
    assert "\n" not in str(refused.value)
    assert dict(network.named_modules(remove_duplicate=False)) == modules
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_initialisation_is_one_of_two_and_borrowed_weights_may_come_first():
    with pytest.raises(InputError, match="init must be one of first, mean"):
        tie_layers(build(), GROUPS, init="last")
    network = tie_layers(borrowed(), [["3", "1"]])
    assert network[8].weight is network[1].conv.weight
