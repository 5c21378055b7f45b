"""What each rule of tracing lets go: a network without the channels gives what one with them masked gives."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning.compression.shrink.channels import channel_groups, fixed_channels
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.norms import CountedLayerNorm
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.errors import InputError


class Net(nn.Module):
    """Layers by name, and how they are put together."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        return self.run(self, inputs)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, 3, padding=1, **options)


def parameter(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


def half(groups):
    """The other half of each group, not the first."""
    return {group: range(1, group.size, 2) for group in groups}


def masked(network, keep):
    network = copy.deepcopy(network)
    for group, kept in keep.items():
        for name, stays in group.masks(network, kept).items():
            network.get_parameter(name).data.masked_fill_(~stays, 0)
    return network


def check(network, inputs, sizes):
    """Half of the channels go; the sizes are those of the parameters afterwards; it is rebuilt from its description."""
    network = network.eval()
    for parameter in network.parameters():
        parameter.data.add_(torch.rand_like(parameter) * 0.5)
    dense = copy.deepcopy(network)
    keep = half(channel_groups(network, inputs))
    reference = masked(network, keep)
    shrink(network, keep)
    output, wanted = network(inputs), reference(inputs)
    assert (output - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - dense(inputs)).abs().max() > 1e-3 * wanted.abs().max()
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert {name: shapes[name] for name in sizes} == sizes
    described = json.loads(json.dumps(sizes_of(network)))
    again = set_sizes(dense, described)
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(again(inputs), output)


IMAGES = torch.randn(2, 3, 8, 8)
STEPS = torch.randn(2, 5, 6)


class NormAct(nn.BatchNorm2d):
    """A layer of PyTorch's kind that writes its forward itself."""

    def forward(self, images):
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        return F.silu(F.batch_norm(images, *statistics, self.weight, self.bias, self.training, eps=self.eps))


class SamePadding(nn.Conv2d):
    """Reads the kernel's size from the weight."""

    def forward(self, images):
        height, width = self.weight.shape[-2:]
        images = F.pad(images, (0, width - 1, 0, height - 1))
        return F.conv2d(images, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class FeatureMapNorm(nn.LayerNorm):
    def forward(self, images):
        images = images.permute(0, 2, 3, 1)
        return F.layer_norm(images, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def script(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(function)


@script
def compiled(images):
    return images.softmax(1)


@script
def harmless(images):
    return images.relu() * 2


def shuffled(net, images):
    hidden = net.one(images)
    b, c, h, w = hidden.shape
    return net.two(hidden.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


def heads(net, steps):
    """Attention whose code gives the features of a head, and takes the number of heads as it comes."""
    query, key, value = (layer(steps).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    weights = (query @ key.transpose(-2, -1) * 0.5).softmax(-1)
    return net.out((weights @ value).transpose(1, 2).flatten(2))


def flash_heads(net, steps):
    query, key, value = (layer(steps).view(2, 5, -1, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 5, -1))


QKV = {"q": nn.Linear(6, 16), "k": nn.Linear(6, 16), "v": nn.Linear(6, 16), "out": nn.Linear(16, 3)}
TWO = {"one": conv(3, 8), "two": conv(8, 3)}

GO = {
    "a norm of its own kind": (
        lambda n, x: n.two(n.norm(n.one(x))), {**TWO, "norm": NormAct(8)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "norm.weight": (4,), "two.weight": (3, 4, 3, 3)},
    ),
    "a convolution of its own kind": (
        lambda n, x: n.two(n.one(x)), {"one": SamePadding(3, 8, 3), "two": SamePadding(8, 3, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "two.weight": (3, 4, 3, 3)},
    ),
    "groups of a convolution": (
        lambda n, x: n.two(n.mid(n.one(x))), {**TWO, "mid": conv(8, 16, groups=4), "two": conv(16, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "mid.weight": (8, 1, 3, 3), "two.weight": (3, 8, 3, 3)},
    ),
    "several filters for a channel": (
        lambda n, x: n.two(n.mid(n.one(x))), {**TWO, "mid": conv(8, 16, groups=8), "two": conv(16, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "mid.weight": (8, 1, 3, 3), "two.weight": (3, 8, 3, 3)},
    ),
    "tokens that are mixed": (
        lambda n, x: n.two(n.one(x) * n.mid(n.one(x).mT).mT), {
            "one": nn.Linear(6, 8), "mid": nn.Linear(5, 5), "two": nn.Linear(8, 3),
        }, STEPS, {"one.weight": (4, 6), "mid.weight": (5, 5), "two.weight": (3, 4)},
    ),
    "transposed": (
        lambda n, x: n.two(n.mid(n.one(x))), {**TWO, "mid": nn.ConvTranspose2d(8, 6, 2, 2), "two": conv(6, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "mid.weight": (4, 3, 2, 2), "two.weight": (3, 3, 3, 3)},
    ),
    "group norm": (
        lambda n, x: n.two(n.norm(n.one(x))), {**TWO, "norm": nn.GroupNorm(4, 8)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "norm.weight": (4,)},
    ),
    "layer norm": (
        lambda n, x: n.two(n.norm(n.one(x)).relu()), {
            "one": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "two": nn.Linear(8, 3),
        }, STEPS, {"one.weight": (4, 6), "norm.weight": (4,), "two.weight": (3, 4)},
    ),
    "layer norm without a weight": (
        lambda n, x: n.two(n.norm(n.one(x))), {
            "one": nn.Linear(6, 8), "norm": nn.LayerNorm(8, elementwise_affine=False), "two": nn.Linear(8, 3),
        }, STEPS, {"one.weight": (4, 6), "two.weight": (3, 4)},
    ),
    "layer norm of feature maps": (
        lambda n, x: n.two(n.norm(n.one(x))), {**TWO, "norm": FeatureMapNorm(8)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "norm.weight": (4,), "two.weight": (3, 4, 3, 3)},
    ),
    "a scale of the block": (
        lambda n, x: n.two(n.one(x) * n.scale.view(1, -1, 1, 1)), {**TWO, "scale": parameter(8)}, IMAGES,
        {"scale": (4,), "one.weight": (4, 3, 3, 3)},
    ),
    "positions and a first token": (
        lambda n, x: n.two(torch.cat([n.token.expand(len(x), -1, -1), n.one(x)], 1) + n.place), {
            "one": nn.Linear(6, 8), "two": nn.Linear(8, 3), "token": parameter(1, 1, 8), "place": parameter(1, 6, 8),
        }, STEPS, {"token": (1, 1, 4), "place": (1, 6, 4), "one.weight": (4, 6)},
    ),
    "embeddings that are added to channels": (
        lambda n, x: n.two(n.norm(n.words(x.argmax(-1)) + n.one(n.alone(x.argmin(-1))))), {
            "words": nn.Embedding(6, 8), "alone": nn.Embedding(6, 6), "one": nn.Linear(6, 8), "norm": nn.LayerNorm(8),
            "two": nn.Linear(8, 3),
        }, STEPS, {"words.weight": (6, 4), "alone.weight": (6, 6), "one.weight": (4, 6), "two.weight": (3, 4)},
    ),
    "halves that gate each other": (
        lambda n, x: n.two(F.glu(n.one(x), 1)), {**TWO, "two": conv(4, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "two.weight": (3, 2, 3, 3)},
    ),
    "chunks": (
        lambda n, x: n.two(torch.mul(*n.one(x).chunk(2, 1))), {**TWO, "two": conv(4, 3)}, IMAGES,
        {"one.weight": (4, 3, 3, 3), "two.weight": (3, 2, 3, 3)},
    ),
    "shuffled": (shuffled, TWO, IMAGES, {"one.weight": (4, 3, 3, 3), "two.weight": (3, 4, 3, 3)}),
    "heads": (heads, QKV, STEPS, {"q.weight": (8, 6), "v.weight": (8, 6), "out.weight": (3, 8)}),
    "heads in one operation": (flash_heads, QKV, STEPS, {"k.weight": (8, 6), "out.weight": (3, 8)}),
    "the sizes of another value": (
        lambda n, x: n.two(n.one(x).flatten(2).view(n.one(x).shape)), TWO, IMAGES, {"one.weight": (4, 3, 3, 3)},
    ),
    "padded and rolled": (
        lambda n, x: n.two(torch.roll(F.pad(n.one(x), (1, 1)), 1, 2)), TWO, IMAGES, {"one.weight": (4, 3, 3, 3)},
    ),
    "a softmax over the pixels": (
        lambda n, x: n.two(n.one(x).flatten(2).softmax(-1).view(2, -1, 8, 8)), TWO, IMAGES,
        {"one.weight": (4, 3, 3, 3)},
    ),
    "summed where they are zero": (
        lambda n, x: n.two(n.one(x)) * n.one(x).relu().sum(1, keepdim=True), TWO, IMAGES, {"one.weight": (4, 3, 3, 3)},
    ),
    "of unit length where they are zero": (
        lambda n, x: n.two(F.normalize(n.one(x)) + F.normalize(n.one(x), p=1.0, dim=2)), TWO, IMAGES,
        {"one.weight": (4, 3, 3, 3)},
    ),
    "beside nothing": (
        lambda n, x: n.two(torch.cat([torch.tensor([]), n.one(x)], 1)), TWO, IMAGES, {"one.weight": (4, 3, 3, 3)},
    ),
    "compiled code": (lambda n, x: n.two(harmless(n.one(x))), TWO, IMAGES, {"one.weight": (4, 3, 3, 3)}),
    "a loop and a decision by the shape": (
        lambda n, x: n.two(sum(n.one(x) for _ in range(x.shape[0])) if x.shape[2] > 4 else n.one(x)), TWO, IMAGES,
        {"one.weight": (4, 3, 3, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GO)
def test_half_of_them_go(name):
    run, layers, inputs, sizes = GO[name]
    check(Net(run, **copy.deepcopy(layers)), inputs, sizes)


STAY = {
    "a number in a calculation": (lambda n, x: n.two(n.one(x) * n.one(x).shape[1] ** -0.5), "calculates with"),
    "a number that is compared": (
        lambda n, x: n.two(n.one(x)) if n.one(x).shape[1] == 8 else x, "calculates with their number",
    ),
    "a number that is converted": (lambda n, x: n.two(n.one(x) / float(n.one(x).size(1))), "calculates with"),
    "a number in an operation": (lambda n, x: n.two(n.one(x) * n.one(x).shape[1]), r"number goes into mul\(\)"),
    "a size of something else": (
        lambda n, x: n.two(n.one(x)) + x.new_zeros(1).expand(n.one(x).shape[1]).sum(), r"number goes into|expand",
    ),
    "layer norm after an activation that moves zero": (
        lambda n, x: n.two(n.norm(n.one(x).sigmoid())), r"go through layer_norm\(\)",
    ),
    "summed where they are not zero": (
        lambda n, x: n.two(n.one(x)) * n.one(x).sigmoid().sum(1, keepdim=True), r"go through sum\(\)",
    ),
    "of unit length where they are not zero": (
        lambda n, x: n.two(F.normalize(n.one(x).sigmoid())), r"go through normalize\(\)",
    ),
    "of the length of the smallest": (
        lambda n, x: n.two(F.normalize(n.one(x), p=-float("inf"))), r"go through normalize\(\)",
    ),
    "picked by place": (lambda n, x: n.two(n.one(x)[:, list(range(8))]), r"go through __getitem__\(\)"),
    "in compiled code": (lambda n, x: n.two(compiled(n.one(x))), r"go through _?softmax\(\)"),
    "written into": (lambda n, x: n.two(written(n.one(x))), r"go through __setitem__\(\)"),
    "in pieces of a written size": (lambda n, x: n.two(torch.cat(n.one(x).split(4, 1), 1)), r"go through split\(\)"),
    "read outside of its layer": (lambda n, x: n.two(n.one(x)) + n.one.weight.mean(), "reads the weights of one"),
    "standardised weights": (
        lambda n, x: n.two(F.conv2d(x, n.one.weight - n.one.weight.mean(1, keepdim=True), n.one.bias, padding=1)),
        "something else than the layer reads its weights",
    ),
    "with the layer's weight, but not its bias": (
        lambda n, x: n.two(F.conv2d(x, n.one.weight, padding=1) + n.one(x) * n.one.bias.exp().view(1, -1, 1, 1)),
        "reads the weights of one|fixed size",
    ),
}  # fmt: skip


def written(images):
    images[:, 2:] = 0
    return images


@pytest.mark.parametrize("name", STAY)
def test_they_stay_with_the_reason(name):
    run, reason = STAY[name]
    network = Net(run, **copy.deepcopy(TWO), norm=FeatureMapNorm(8)).eval()
    with pytest.raises(InputError, match="no channels that can be removed"):
        channel_groups(network, IMAGES)
    found = fixed_channels(network, IMAGES)["one"]
    assert re.search(reason, found), found


@pytest.mark.slow
def test_linear_layers_of_gpt2():
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D
    network = Net(lambda n, x: n.two(F.gelu(n.one(x))), one=layer(8, 6), two=layer(3, 8))
    check(network, STEPS, {"one.weight": (6, 4), "one.bias": (4,), "two.weight": (4, 3), "two.bias": (3,)})


def test_layers_that_run_in_training_only_are_followed_too():
    def run(net, images):
        hidden = net.one(images)
        return (net.two(hidden), net.aside(hidden)) if net.training else net.two(hidden)

    network = Net(run, one=nn.Sequential(conv(3, 8), NormAct(8)), two=conv(8, 3), aside=conv(8, 2))
    shrink(network, half(channel_groups(network, IMAGES)))
    assert network.aside.in_channels == 4
    assert network.one[1].num_batches_tracked == 0
    assert [part.shape[1] for part in network.train()(IMAGES)] == [3, 2]


def test_following_leaves_the_layers_as_they_were():
    network = Net(GO["a norm of its own kind"][0], **copy.deepcopy(TWO), norm=NormAct(8))
    before = [set(vars(module)) for module in network.modules()]
    channel_groups(network, IMAGES)
    assert [set(vars(module)) for module in network.modules()] == before
    with pytest.raises(InputError, match="Net cannot be followed on these example_inputs"):
        channel_groups(network, torch.randn(2, 4, 8, 8))
    assert [set(vars(module)) for module in network.modules()] == before


@pytest.mark.parametrize("dim", [-1, 1])
def test_counted_layer_norm_against_a_loop(dim):
    shape = (2, 3, 4) if dim == -1 else (2, 4, 3)
    norm, x = CountedLayerNorm(4, counted=7, dim=dim, eps=0.01), torch.randn(shape)
    norm.weight.data.uniform_(), norm.bias.data.uniform_()
    output = norm(x).movedim(dim, -1).reshape(-1, 4)
    for row, found in zip(x.movedim(dim, -1).reshape(-1, 4), output, strict=True):
        numbers = [*row.tolist(), 0, 0, 0]
        mean = sum(numbers) / 7
        spread = (sum((number - mean) ** 2 for number in numbers) / 7 + 0.01) ** 0.5
        wanted = [(numbers[i] - mean) / spread * norm.weight[i].item() + norm.bias[i].item() for i in range(4)]
        assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
