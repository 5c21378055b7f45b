"""The groups that torch-pruning finds are ours where both know the network, and hold where ours does not."""

import copy
import json
import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from distill_lightning import InputError
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.shrink.attention import convert_attention
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.compression.shrink.torch_pruning import channel_groups_by_torch_pruning
from distill_lightning.networks import SmallResNet

torch_pruning = pytest.importorskip("torch_pruning")


def sequential():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.PReLU(5),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 7), nn.Tanh(), nn.Linear(7, 3),
    )  # fmt: skip


SMALL, LARGE = (1, 1, 8, 8), (1, 3, 64, 64)
NETWORKS = {
    "sequential": (sequential, SMALL),
    "SmallResNet": (lambda: SmallResNet(4, depth=2), SMALL),
    **{
        name: (lambda name=name: torchvision.models.get_model(name, num_classes=10), LARGE)
        for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_0")
    },
}
SLOW = {
    name: (lambda name=name: torchvision.models.get_model(name, num_classes=10), LARGE)
    for name in ("densenet121", "efficientnet_b0", "regnet_y_400mf", "resnext50_32x4d", "convnext_tiny")
}
FEWER = ("regnet_y_400mf", "resnext50_32x4d", "convnext_tiny")  # it leaves grouped convolutions and layer norms alone
every_network = pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def alive(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def half(groups):
    return {group: torch.randperm(group.size)[: max(1, group.size // 2)].tolist() for group in groups}


def masked(network, keep):
    network = copy.deepcopy(network)
    for group, kept in keep.items():
        for name, stays in group.masks(network, kept).items():
            network.get_parameter(name).data.masked_fill_(~stays, 0)
    return network


def told(groups):
    return [
        (group.name, group.kind, group.size, {(m.path, m.axis): m.channels.tolist() for m in group.members})
        for group in groups
    ]


@pytest.mark.slow
@every_network
def test_the_groups_are_ours_and_shrunk_is_masked(name):
    make, shape = (NETWORKS | SLOW)[name]
    torch.manual_seed(0)
    network = alive(make())
    groups = channel_groups_by_torch_pruning(network, torch.randn(shape))
    ours = told(channel_groups(network, torch.randn(shape)))
    assert all(group in ours for group in told(groups)) if name in FEWER else told(groups) == ours
    keep = half(groups)
    reference = masked(network, keep)
    assert shrink(network, keep) is network
    images = torch.randn(3, shape[1], 2 * shape[2] if name == "resnet18" else shape[2], shape[3])
    with torch.no_grad():
        output, wanted = network(images), reference(images)
    assert (output - wanted).norm() < 1e-4 * wanted.norm()
    assert wanted.std(0).max() > 0

    rebuilt = set_sizes(make().eval(), json.loads(json.dumps(sizes_of(network))))
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), output)


@pytest.mark.slow
def test_half_of_resnet18():
    network = torchvision.models.resnet18()
    groups = channel_groups_by_torch_pruning(network, torch.randn(1, 3, 64, 64))
    shrink(network, {group: range(group.size // 2) for group in groups})
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_055_880
    assert network.fc.out_features == 1000
    # What the library's README has for it, and ours, without its norms, activations, pooling and biases.
    image = torch.zeros(1, 3, 224, 224)
    macs, parameters = torch_pruning.utils.count_ops_and_params(network.eval(), image)
    assert (macs, parameters) == (487_202_536, 3_055_880)
    assert count_macs(network, image).dense == 483_149_824


def test_scores_and_the_next_round():
    network = SmallResNet(4)
    images = torch.randn(1, 1, 8, 8)
    values = {name: parameter.abs() for name, parameter in network.named_parameters()}
    for group, ours in zip(
        channel_groups_by_torch_pruning(network, images), channel_groups(network, images), strict=True
    ):
        assert torch.equal(group.scores(network, values), ours.scores(network, values))
    for _ in range(2):
        groups = channel_groups_by_torch_pruning(network, images)
        shrink(network, {group: range(group.size // 2) for group in groups})
    assert network.stem[0].out_channels == 2
    assert network(images).shape == (1, 4)


def test_looking_for_groups_leaves_the_network_and_the_random_state_as_they_were():
    network = SmallResNet(4)
    network.stage1.eval()
    network.head.weight.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    trained = [parameter.requires_grad for parameter in network.parameters()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 1, 8, 8)
    kept, drawn = images.clone(), torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        channel_groups_by_torch_pruning(network, images)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == trained
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(images, kept)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Net(nn.Module):
    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def branching(net, images):
    """What torch.fx refuses: a decision by the data, and a layer that runs twice."""
    first = net.one(images)
    if images.sum() > -1e9:
        first = first * 2
    for _ in range(2):
        first = first + torch.relu(net.two(first))
    return {"out": net.head(first.mean((2, 3)))}


def test_a_network_that_cannot_be_traced():
    network = Net(branching, one=nn.Conv2d(1, 6, 3), two=nn.Conv2d(6, 6, 3, padding=1), head=nn.Linear(6, 3)).eval()
    images = torch.randn(3, 1, 8, 8)
    with pytest.raises(InputError, match="decides by numbers in the data"):
        channel_groups(network, images)
    (group,) = channel_groups_by_torch_pruning(network, images)
    assert repr(group) == "Group('one', 6 channels: one:out, two:out, two:in, head:in)"
    keep = {group: [1, 2, 5]}
    reference = masked(network, keep)
    shrink(network, keep)
    assert torch.allclose(network(images)["out"], reference(images)["out"], atol=1e-6)


linear = nn.Linear


def three(run):
    """Linear layers a, b and c, from 4 to 2 features."""
    return lambda: Net(run, a=linear(4, 6), b=linear(6, 5), c=linear(5, 2))


def recurrent(kind):
    return Net(
        lambda net, words: net.b(net.a(net.rnn(net.embedding(words))[0]).relu()),
        embedding=nn.Embedding(9, 6), rnn=kind(6, 5, batch_first=True), a=linear(5, 7), b=linear(7, 3),
    )  # fmt: skip


def encoder(*, convert):
    network = nn.Sequential(linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), linear(8, 3))
    return convert_attention(network) if convert else network


WORDS, VECTORS = torch.randint(0, 9, (2, 4)), torch.randn(2, 5, 4)


def tied():
    network = Net(
        lambda net, x: net.d(net.c(net.b(net.a(x)).relu()).relu()),
        a=linear(4, 6), b=linear(6, 6), c=linear(6, 6), d=linear(6, 3),
    )  # fmt: skip
    network.c.weight = network.b.weight
    return network


def normed():
    network = nn.Sequential(linear(4, 6), nn.ReLU(), linear(6, 5), nn.ReLU(), linear(5, 3))
    parametrizations.weight_norm(network[2])
    return network


def scaled():
    network = Net(
        lambda net, x: net.c(net.b(net.a(x) * net.scale).relu()), a=linear(4, 6), b=linear(6, 5), c=linear(5, 3)
    )
    network.scale = nn.Parameter(torch.ones(6))
    return network


PARTLY = {
    "lstm": (lambda: recurrent(nn.LSTM), WORDS, ["a"]),
    "gru": (lambda: recurrent(nn.GRU), WORDS, ["a"]),
    "attention": (lambda: encoder(convert=False), VECTORS, ["1.linear1"]),
    "converted attention": (lambda: encoder(convert=True), VECTORS, ["1.linear1"]),
    "two outputs": (
        lambda: Net(lambda net, x: (net.b(net.a(x)), net.c(x)), a=linear(4, 6), b=linear(6, 5), c=linear(4, 2)),
        VECTORS, ["a"],
    ),
    "a layer's output returned": (three(lambda net, x: [y := net.a(x), net.c(net.b(y.relu()))]), VECTORS, ["b"]),
    "a softmax over channels": (three(lambda net, x: net.c(net.b(net.a(x).softmax(-1)).relu())), VECTORS, ["b"]),
    "a mean over channels": (three(lambda net, x: net.c(net.b(net.a(x) - net.a(x).mean(-1, True)))), VECTORS, ["b"]),
    "grouped convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1),
        ),
        torch.randn(1, 1, 8, 8), ["2"],
    ),
    "shared weights": (tied, VECTORS, []),
    "weight norm": (normed, VECTORS, []),
    "a bare parameter": (scaled, VECTORS, ["b"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTLY)
def test_only_what_can_be_removed_is_in_a_group(name):
    make, inputs, wanted = PARTLY[name]
    torch.manual_seed(0)
    network = make().eval()
    if not wanted:
        with pytest.raises(InputError, match="finds no channels"):
            channel_groups_by_torch_pruning(network, inputs)
        return
    groups = channel_groups_by_torch_pruning(network, inputs)
    assert [group.name for group in groups] == wanted
    keep = half(groups)
    reference = masked(network, keep)
    shrink(network, keep)
    with torch.no_grad():
        output, expected = network(inputs), reference(inputs)
    for one, other in zip(*(o if isinstance(o, (tuple, list)) else [o] for o in (output, expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_it_cannot_follow_is_one_line(monkeypatch):
    with pytest.raises(InputError, match="cannot follow it") as refused:
        channel_groups_by_torch_pruning(SmallResNet(4), torch.randn(2, 5))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="finds no channels"):
        channel_groups_by_torch_pruning(linear(4, 2), VECTORS)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"distill-lightning\[pruning\]"):
        channel_groups_by_torch_pruning(SmallResNet(4), torch.randn(2, 1, 8, 8))
