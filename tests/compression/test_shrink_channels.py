"""Channels that go together are found, and a network without them gives what one with them masked gives."""

import copy
import io
import json

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import Group, Member, shrink
from distill_lightning.compression.shrink.sizes import resize_layer, set_sizes, sizes_of
from distill_lightning.errors import InputError
from distill_lightning.layers import GaussianHead
from distill_lightning.networks import SmallResNet
from distill_lightning.testing import TinyNet


def alive(network):
    """Norms as after training: without this every masked channel would be zero even with its norm left alone."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def half(groups):
    return {group: torch.randperm(group.size)[: max(1, group.size // 2)].tolist() for group in groups}


def masked(network, keep, *, only=None):
    network = copy.deepcopy(network)
    for group, kept in keep.items():
        members = tuple(m for m in group.members if not only or m.axis in only)
        chosen = Group(group.name, group.kind, group.size, members)
        for name, stays in chosen.masks(network, kept).items():
            network.get_parameter(name).data.masked_fill_(~stays, 0)
    return network


class Net(nn.Module):
    """Layers by name, and how they are put together."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images):
        return self.run(self, images)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, 3, padding=1, **options)


def flat():
    return nn.Sequential(
        conv(1, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 7),
        nn.Tanh(), nn.Linear(7, 3),
    )  # fmt: skip


def dense():
    def run(net, images):
        first = net.stem(images)
        second = torch.cat([first, net.one(F.relu(net.norm1(first)))], 1)
        third = torch.cat([second, net.two(F.relu(net.norm2(second)))], 1)
        return net.head(third.mean((2, 3)))

    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(7)}
    return Net(run, stem=conv(1, 4), one=conv(4, 3), two=conv(7, 2), head=nn.Linear(9, 3), **norms)


def inverted():
    """Depthwise, squeeze-and-excite, and a shortcut past both."""

    def run(net, images):
        first = net.norm(net.stem(images))
        inner = F.hardswish(net.deep(F.silu(net.up(first))))
        gate = torch.sigmoid(net.excite(F.relu(net.squeeze(F.adaptive_avg_pool2d(inner, 1)))))
        outer = first + net.down(inner * gate)
        return net.head(torch.flatten(outer.amax(dim=[2, 3], keepdim=True), 1))

    return Net(
        run, stem=conv(1, 4), norm=nn.BatchNorm2d(4), up=nn.Conv2d(4, 8, 1), deep=conv(8, 8, groups=8),
        squeeze=nn.Conv2d(8, 3, 1), excite=nn.Conv2d(3, 8, 1), down=nn.Conv2d(8, 4, 1), head=nn.Linear(4, 3),
    )  # fmt: skip


def basic_block():
    blocks = torchvision.models.resnet18(num_classes=4)
    return nn.Sequential(
        conv(1, 64), blocks.layer1, blocks.layer2[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4)
    )


def bottleneck():
    blocks = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=4)
    return nn.Sequential(conv(1, 64), blocks.layer1, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 4))


NETWORKS = [lambda: SmallResNet(4, depth=2), TinyNet, flat, dense, inverted, basic_block, bottleneck]
NAMES = ["SmallResNet", "TinyNet", "flat", "dense", "inverted", "BasicBlock", "Bottleneck"]
every_network = pytest.mark.parametrize("make", NETWORKS, ids=NAMES)


@pytest.mark.slow
@every_network
def test_shrunk_is_masked(make):
    network = alive(make())
    keep = half(channel_groups(network, torch.randn(1, 1, 8, 8)))
    reference = masked(network, keep)
    sizes = {group: group.size for group in keep}
    assert shrink(network, keep) is network
    for count, size in [(1, 8), (3, 8), (3, 8 if make is flat else 12)]:
        images = torch.randn(count, 1, size, size)
        assert torch.allclose(network(images), reference(images), atol=5e-6, rtol=0)
    found = {group.name: group.size for group in channel_groups(network, torch.randn(1, 1, 8, 8))}
    wanted = {group.name: max(1, size // 2) for group, size in sizes.items()}
    assert found == {name: size for name, size in wanted.items() if size > 1}


@pytest.mark.slow
@every_network
def test_shrunk_is_masked_in_float64(make):
    network = alive(make().double())
    keep = half(channel_groups(network, torch.randn(1, 1, 8, 8, dtype=torch.float64)))
    reference = masked(network, keep)
    shrink(network, keep)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(network(images), reference(images), atol=1e-13, rtol=0)
    assert {p.dtype for p in network.parameters()} == {torch.float64}


def test_a_filter_is_masked_only_together_with_its_norm():
    network = alive(basic_block())
    keep = half(channel_groups(network, torch.randn(1, 1, 8, 8)))
    makers_and_norms, filters = masked(network, keep, only=("out", "channels")), masked(network, keep, only=("out",))
    shrink(network, keep)
    images = torch.randn(3, 1, 8, 8)
    shrunk = network(images)
    assert torch.allclose(shrunk, makers_and_norms(images), atol=5e-6, rtol=0)
    assert (shrunk - filters(images)).norm() > 0.05 * shrunk.norm()


def test_a_sequential_network_cut_by_hand():
    network = alive(flat())
    keep = {"0": [0, 2, 5], "3": [1, 4], "6": [0, 3, 6]}
    by_hand = copy.deepcopy(network).state_dict()
    hand = {}
    hand["0.weight"] = torch.stack([by_hand["0.weight"][i] for i in keep["0"]])
    hand["0.bias"] = torch.stack([by_hand["0.bias"][i] for i in keep["0"]])
    for name in ("weight", "bias", "running_mean", "running_var"):
        hand[f"1.{name}"] = torch.stack([by_hand[f"1.{name}"][i] for i in keep["0"]])
    hand["1.num_batches_tracked"] = by_hand["1.num_batches_tracked"]
    hand["3.weight"] = torch.stack([torch.stack([by_hand["3.weight"][o, i] for i in keep["0"]]) for o in keep["3"]])
    hand["3.bias"] = torch.stack([by_hand["3.bias"][o] for o in keep["3"]])
    columns = [channel * 16 + pixel for channel in keep["3"] for pixel in range(16)]
    hand["6.weight"] = torch.stack([torch.stack([by_hand["6.weight"][o, i] for i in columns]) for o in keep["6"]])
    hand["6.bias"] = torch.stack([by_hand["6.bias"][o] for o in keep["6"]])
    hand["8.weight"] = torch.stack([by_hand["8.weight"][:, i] for i in keep["6"]], 1)
    hand["8.bias"] = by_hand["8.bias"]
    groups = {group.name: group for group in channel_groups(network, torch.randn(1, 1, 8, 8))}
    shrink(network, {groups[name]: kept for name, kept in keep.items()})
    assert network.state_dict().keys() == hand.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, hand[name]), name
    assert (network[3].in_channels, network[3].out_channels, network[1].num_features) == (3, 2, 3)
    assert (network[6].in_features, network[6].out_features, network[8].in_features) == (32, 3, 3)


def test_the_groups_of_a_residual_network():
    groups = channel_groups(SmallResNet(4, depth=2), torch.randn(1, 1, 8, 8))
    assert [(group.name, group.size) for group in groups] == [
        ("stem.0", 8), ("stage1.0.conv1", 8), ("stage1.1.conv1", 8), ("stage2.0.conv1", 16), ("stage2.0.conv2", 16),
        ("stage2.1.conv1", 16), ("stage3.0.conv1", 32), ("stage3.0.conv2", 32), ("stage3.1.conv1", 32),
    ]  # fmt: skip
    members = {(member.path, member.axis) for member in groups[4].members}
    assert members == {
        ("stage2.0.conv2", "out"), ("stage2.0.norm2", "channels"), ("stage2.0.shortcut.0", "out"),
        ("stage2.0.shortcut.1", "channels"), ("stage2.1.conv1", "in"), ("stage2.1.conv2", "out"),
        ("stage2.1.norm2", "channels"), ("stage3.0.conv1", "in"), ("stage3.0.shortcut.0", "in"),
    }  # fmt: skip
    assert "16 channels: stage2.0.conv2:out" in repr(groups[4])


@pytest.mark.slow
def test_half_of_resnet18():
    network = torchvision.models.resnet18()
    groups = channel_groups(network, torch.randn(1, 3, 32, 32))
    shrink(network, {group: range(group.size // 2) for group in groups})
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_055_880
    assert network.fc.out_features == 1000
    # Half as wide, each layer written out: kernel, channels in, channels out, side of the output, how many of it.
    layers = [(7, 3, 32, 112, 1), (3, 32, 32, 56, 4)]
    for channels, side in ((64, 28), (128, 14), (256, 7)):
        half = channels // 2
        layers += [(3, half, channels, side, 1), (3, channels, channels, side, 3), (1, half, channels, side, 1)]
    macs = sum(kernel**2 * before * after * side**2 * times for kernel, before, after, side, times in layers)
    counted = count_macs(network, torch.zeros(1, 3, 224, 224))
    assert counted.dense == counted.effective == macs + 256 * 1000 == 483_149_824


TORCHVISION = {  # and in how many groups their channels are
    "mobilenet_v2": 25, "mobilenet_v3_small": 27, "shufflenet_v2_x0_5": 20, "squeezenet1_0": 25, "densenet121": 120,
    "efficientnet_b0": 40, "regnet_y_400mf": 53, "convnext_tiny": 22, "googlenet": 57, "resnext50_32x4d": 37,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    network = alive(torchvision.models.get_model(name, num_classes=10, **options))
    groups = channel_groups(network, torch.randn(1, 3, 64, 64))
    assert len(groups) == TORCHVISION[name]
    keep = half(groups)
    reference = masked(network, keep)
    shrink(network, keep)
    images = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        output, wanted = network(images), reference(images)
    assert (output - wanted).norm() < 1e-4 * wanted.norm()
    assert wanted.std(0).max() > 0


def test_looking_for_groups_leaves_the_network_as_it_was():
    network = SmallResNet(4)
    network.stage1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 1, 8, 8)
    kept = images.clone()
    channel_groups(network, images)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(images, kept)


# What must never be cut.


class Centred(nn.Conv2d):
    """Its weights depend on one another along the input channels."""

    def forward(self, images):
        return self._conv_forward(images, self.weight - self.weight.mean(1, keepdim=True), self.bias)


PAIR = {"one": conv(1, 4), "two": conv(4, 3)}
UNKNOWN = {
    "transposed in groups": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": nn.ConvTranspose2d(4, 4, 1, groups=2)}),
    "one group": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": nn.GroupNorm(1, 4)}),
    "softmax": (lambda n, x: n.two(n.one(x).softmax(1)), {}),
    "over the channels": (lambda n, x: n.two(n.one(x) - n.one(x).mean(1, keepdim=True)), {}),
    "some channels": (lambda n, x: n.two(torch.cat([n.one(x)[:, :2], n.one(x)[:, 2:]], 1)), {}),
    "one channel": (lambda n, x: n.two(n.one(x) * n.one(x)[:, :1]), {}),
    "shuffled": (lambda n, x: n.two(n.one(x).view(-1, 2, 2, 8, 8).transpose(1, 2).flatten(1, 2)), {}),
    "turned round": (lambda n, x: n.two(n.one(x).flip(1)), {}),
    "size in the code": (lambda n, x: n.two(n.one(x).view(-1, 4, 8, 8)), {}),
    "with the input": (lambda n, x: n.two(n.one(x) + x.repeat(1, 4, 1, 1)), {}),
    "with a parameter": (lambda n, x: n.two(n.one(x) * n.mid.weight.view(1, 4, 1, 1)), {"mid": nn.PReLU(4)}),
    "its weight again": (lambda n, x: n.two(n.one(x)) + n.one.weight.sum(), {}),
    "a layer of its own kind": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": Centred(4, 4, 1)}),
    "any dimension of one": (
        lambda n, x: n.head(n.one(x).amax((2, 3), keepdim=True).squeeze()), {"head": nn.Linear(4, 3)}
    ),
    "returned": (lambda n, x: (n.two(n.one(x)), n.one(x)), {}),
    "pooled over channels": (
        lambda n, x: n.head(F.max_pool1d(n.one(x).mean(3).transpose(1, 2), 3, 1, 1)), {"head": nn.Linear(4, 3)}
    ),
    "reparametrized": (lambda n, x: n.two(n.one(x)), {"one": parametrizations.weight_norm(conv(1, 4))}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_channels_of_unknown_use_stay(name):
    run, layers = UNKNOWN[name]
    with pytest.raises(InputError, match="no channels that can be removed"):
        channel_groups(Net(run, **{**PAIR, **layers}), torch.randn(1, 1, 8, 8))


KNOWN = {
    "plain": (lambda n, x: n.two(n.one(x)), {}),
    "twice the same layer": (lambda n, x: n.two(F.relu(n.one(x))) + n.two(torch.tanh(n.one(x))), {}),
    "norm per image": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": nn.InstanceNorm2d(4, affine=True)}),
    "prelu": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": nn.PReLU(4)}),
    "one prelu for all": (lambda n, x: n.two(n.mid(n.one(x))), {"mid": nn.PReLU()}),
    "a number, and one channel": (lambda n, x: n.two(0.5 * n.one(x) * x + 1), {}),
    "size from the value": (lambda n, x: n.two(n.one(x).view(x.shape[0], n.one(x).shape[1], -1, 8)), {}),
    "channels last": (lambda n, x: n.head(n.one(x).permute(0, 2, 3, 1)), {"head": nn.Linear(4, 3)}),
    "pixels, then channels": (
        lambda n, x: n.head(n.one(x).permute(0, 2, 3, 1).flatten(1)), {"head": nn.Linear(256, 3)}
    ),
    "larger": (lambda n, x: n.two(F.interpolate(n.one(x), scale_factor=2)), {}),
    "in place": (lambda n, x: n.two(F.relu_(n.one(x).add_(0.1))), {}),
    "gaussian head": (lambda n, x: n.head(n.one(x).mean((2, 3))), {"head": GaussianHead(4, 2)}),
    "an argument that is not given": (None, {}),
}  # fmt: skip


class WithMask(Net):
    def forward(self, images, mask=None):
        hidden = self.one(images)
        if mask is not None:
            hidden = hidden.softmax(1)
        return self.two(hidden)


@pytest.mark.parametrize("name", KNOWN)
def test_channels_of_known_use_go(name):
    run, layers = KNOWN[name]
    network = copy.deepcopy((WithMask if run is None else Net)(run, **{**PAIR, **layers})).eval()
    (group,) = channel_groups(network, torch.randn(1, 1, 8, 8))
    keep = {group: [3, 1]}
    reference = masked(network, keep)
    shrink(network, keep)
    images = torch.randn(2, 1, 8, 8)
    assert torch.allclose(network(images), reference(images), atol=1e-6)
    assert network.one.weight.shape == (2, 1, 3, 3)


def test_inputs_survive_a_network_that_writes_into_them():
    images = torch.zeros(1, 1, 8, 8)
    channel_groups(Net(lambda n, x: n.two(n.one(x.add_(1))), **PAIR), images)
    assert not images.any()


def test_shared_weights_stay():
    network = Net(lambda n, x: n.two(n.mid(n.one(x))), one=conv(4, 4), mid=conv(4, 4), two=conv(4, 3))
    network.mid.weight = network.one.weight
    with pytest.raises(InputError, match="no channels"):
        channel_groups(network, torch.randn(1, 4, 8, 8))
    by_hand = Group("one", "channels", 4, (Member("one", "out", torch.arange(4)),))
    with pytest.raises(InputError, match="one shares its weights"):
        shrink(network, {by_hand: [0]})
    aliased = Net(lambda n, x: n.two(n.mid(n.one(x))), one=conv(4, 4), two=conv(4, 3))
    aliased.mid = aliased.one
    with pytest.raises(InputError, match="no channels"):  # it reads what it makes, and so the images' channels
        channel_groups(aliased, torch.randn(1, 4, 8, 8))


# What shrinking does to the objects.


def test_files_shrink_with_the_parameters_and_tensors_own_their_storage():
    network = SmallResNet(4, width=32)
    before = written(network)
    count = sum(tensor.numel() for tensor in network.state_dict().values())
    shrink(network, half(channel_groups(network, torch.randn(1, 1, 8, 8))))
    after, tensors = written(network), network.state_dict()
    ratio = sum(tensor.numel() for tensor in tensors.values()) / count
    assert ratio < 0.3
    assert abs(after - ratio * before) < 0.01 * before + 300 * len(tensors)
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def written(network):
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return len(file.getvalue())


@pytest.mark.slow
@every_network
def test_training_goes_on(make):
    network = make()
    shrink(network, half(channel_groups(network, torch.randn(1, 1, 8, 8))))
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    losses = []
    images, target = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    for _ in range(15):
        loss = F.cross_entropy(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.slow
@every_network
def test_a_described_network_is_rebuilt_and_loads_strictly(make):
    network = alive(make())
    shrink(network, half(channel_groups(network, torch.randn(1, 1, 8, 8))))
    description = json.loads(json.dumps(sizes_of(network)))
    again = make()
    assert set_sizes(again, description) is again
    assert again.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.eval()(images), network(images))
    assert str(again) == str(network)
    assert sizes_of(again) == description


def test_keeping_everything_changes_nothing():
    network = SmallResNet(4)
    parameters = list(network.parameters())
    groups = channel_groups(network, torch.randn(1, 1, 8, 8))
    shrink(network, {group: range(group.size) for group in groups})
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))


def test_the_order_of_the_indices_and_the_number_of_calls_do_not_matter():
    network = alive(SmallResNet(4))
    images = torch.randn(1, 1, 8, 8)
    shuffled, in_steps = copy.deepcopy(network), copy.deepcopy(network)
    shrink(network, {group: range(1, group.size, 2) for group in channel_groups(network, images)})
    shrink(shuffled, {g: torch.arange(1, g.size, 2).flip(0) for g in channel_groups(shuffled, images)})
    for number, group in enumerate(channel_groups(in_steps, images)):
        current = channel_groups(in_steps, images)[number]
        assert current.name == group.name
        shrink(in_steps, {current: range(1, current.size, 2)})
    for other in (shuffled, in_steps):
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_frozen_parameters_stay_frozen():
    network = SmallResNet(4).requires_grad_(requires_grad=False)
    network.head.requires_grad_()
    shrink(network, half(channel_groups(network, torch.randn(1, 1, 8, 8))))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_scores_are_summed_over_everything_that_leaves():
    network = dense()
    values = {name: torch.rand(parameter.shape) for name, parameter in network.named_parameters()}
    groups = {group.name: group for group in channel_groups(network, torch.randn(1, 1, 8, 8))}
    for channel in range(3):
        place = 4 + channel  # behind the stem's four in what norm2, two and head read
        total = values["one.weight"][channel].sum() + values["one.bias"][channel]
        total += values["norm2.weight"][place] + values["norm2.bias"][place]
        total += values["two.weight"][:, place].sum() + values["head.weight"][:, place].sum()
        assert torch.isclose(groups["one"].scores(network, values)[channel], total)
    with pytest.raises(InputError, match=r"no score: give values by parameter name, for example one\.weight"):
        groups["one"].scores(network, {})


def test_what_cannot_be_kept_changes_nothing():
    network = dense()
    groups = channel_groups(network, torch.randn(1, 1, 8, 8))
    state = copy.deepcopy(network.state_dict())
    for keep, message in [
        ([], "one: at least one of the 3 channels must stay"),
        ([0, 0], "different indices below 3"),
        ([3], "different indices below 3"),
        ([-1], "different indices below 3"),
    ]:
        with pytest.raises(InputError, match=message):
            shrink(network, {groups[0]: [0], groups[1]: keep})
    with pytest.raises(
        InputError, match="x was found when head:in had 2 positions, but it has 9: find the groups of this network"
    ):
        shrink(network, {groups[0]: [0], Group("x", "channels", 2, (Member("head", "in", torch.arange(2)),)): [0]})
    with pytest.raises(InputError, match="Net has no layer 'body'"):
        shrink(network, {Group("x", "channels", 2, (Member("body", "in", torch.arange(2)),)): [0]})
    sides = [
        Group("x", "channels", 4, (Member("one", "in", torch.tensor(c)),)) for c in ([0, 1, -1, -1], [-1, -1, 0, 1])
    ]
    with pytest.raises(InputError, match="nothing would stay of axis 'in'"):
        shrink(network, {sides[0]: [2], sides[1]: [3]})
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_network_that_cannot_be_followed_is_one_line():
    branching = Net(lambda n, x: n.two(n.one(x)) if x.sum() > 0 else n.one(x), **PAIR)
    for network, inputs in [
        (branching, torch.randn(1, 1, 8, 8)),
        (Net(UNKNOWN["softmax"][0], **PAIR), torch.randn(1, 5, 8, 8)),
    ]:
        with pytest.raises(InputError, match="Net cannot be followed on these example_inputs") as caught:
            channel_groups(network, inputs)
        assert "\n" not in str(caught.value)
        assert network.training


def test_a_description_of_another_network_is_refused():
    with pytest.raises(InputError, match="no layer 'stem'"):
        set_sizes(nn.Linear(2, 2), {"stem": {"kind": "linear", "in_features": 1, "out_features": 1}})
    with pytest.raises(InputError, match="Linear cannot be rebuilt as 'norm'"):
        resize_layer(nn.Linear(2, 2), {"kind": "norm", "num_features": 1})
    with pytest.raises(InputError, match="ReLU cannot be rebuilt as 'linear'"):
        resize_layer(nn.ReLU(), {"kind": "linear", "in_features": 1, "out_features": 1})
