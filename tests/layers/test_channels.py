"""In which dimension a network's own operations have put the channels."""

import pytest
import torch
import torch._dynamo
import torchvision
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.layers import FeatureTap
from distill_lightning.layers.channels import ChannelDims

# Rows, columns and channels alike: shapes tell nothing.
SIZE = 4


def dim_after(function, inputs=None):
    """Where the channels are after a 1x1 convolution to four channels of 4x4 and what comes then."""
    convolution = nn.Conv2d(1, SIZE, 1)
    with torch.no_grad(), ChannelDims() as dims:
        result = function(convolution(torch.zeros(1, 1, SIZE, SIZE) if inputs is None else inputs))
    return dims.of(result[0] if isinstance(result, (tuple, list)) else result)


@pytest.mark.parametrize(
    ("function", "dim"),
    [
        (lambda x: x, 1),
        (lambda x: x.permute(0, 2, 3, 1), 3),
        (lambda x: torch.permute(x, (0, 2, 3, 1)).relu_() + 1, 3),
        (lambda x: torch.permute(input=x, dims=(0, 2, 3, 1)), 3),
        (lambda x: x.movedim(1, -1).transpose(1, 2), 3),
        (lambda x: x.movedim(1, -1).transpose(2, 3), 2),
        (lambda x: x.mT.mT, 1),
        (lambda x: x[0].unsqueeze(0), None),
        (lambda x: x.flatten(2), 1),
        (lambda x: x.flatten(2).transpose(1, 2), 2),
        (lambda x: x.flatten(2).transpose(1, 2).reshape(1, SIZE, SIZE, SIZE), 3),
        (lambda x: x.flatten(2).mT.reshape(1, 2, 2, SIZE, SIZE).permute(0, 1, 3, 2, 4).flatten(1, 3), 2),
        (lambda x: x.reshape(1, 2, 2, SIZE, SIZE).transpose(1, 2).reshape(1, SIZE, SIZE, SIZE), None),
        (lambda x: x.flatten(1), None),
        (lambda x: x.permute(0, 2, 3, 1) + F.gelu(x), None),
        (lambda x: x * x.mean((2, 3), keepdim=True), 1),
        (lambda x: torch.cat([x, x], dim=1)[:, :3].contiguous(), 1),
        (lambda x: x.chunk(2, dim=1), 1),
        (lambda x: F.pad(x, (1, 1)), 1),
        (lambda x: x[:, :, ::2], 1),
        (lambda x: x[..., None], None),
        (lambda x: x @ x, None),
        (lambda x: F.layer_norm(x, (SIZE,)), 1),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (SIZE,)), 3),
        (lambda x: F.layer_norm(x, (SIZE, SIZE, SIZE)), 1),
        # Tokens are mixed along their dimension, and the channels stay in theirs.
        (lambda x: F.linear(x.flatten(2), torch.zeros(5, SIZE**2)).transpose(1, 2), 2),
        (lambda x: nn.MultiheadAttention(SIZE, 1, batch_first=True)(*[x.flatten(2).mT] * 3), 2),
        (lambda x: F.adaptive_avg_pool2d(x, 1), 1),
        (lambda x: F.dropout(x, 0.5, training=True, inplace=True), 1),
    ],
)
def test_channels_are_followed(function, dim):
    assert dim_after(function) == dim


@pytest.mark.parametrize(
    ("reader", "dim"),
    [
        (lambda x: F.conv2d(x, torch.zeros(2, SIZE, 1, 1)), 1),
        (lambda x: F.batch_norm(x, torch.zeros(SIZE), torch.ones(SIZE)), 1),
        (lambda x: F.max_pool2d(x, 2), 1),
        (lambda x: F.linear(x, torch.zeros(2, SIZE)), 3),
        (lambda x: F.layer_norm(x, (SIZE,)), 3),
        (lambda x: x.mean((2, 3)), 1),
        (lambda x: x.mean(dim=(1, 2)), 3),
        (lambda x: x.mean(dim=(-2, -1)), 1),
        (lambda x: x.mean(1), None),
        (lambda x: x.mean(), None),
        (lambda x: x.flatten(1), None),
    ],
)
def test_what_reads_a_tensor_first_tells_of_it(reader, dim):
    unknown = torch.zeros(1, SIZE, SIZE, SIZE)
    with ChannelDims() as dims:
        reader(unknown)
    assert dims.of(unknown) == dim


def test_lstms_and_one_dimensional_convolutions_are_known():
    with ChannelDims() as dims, torch.no_grad():
        output, _ = nn.LSTM(SIZE, SIZE, batch_first=True)(torch.zeros(1, SIZE, SIZE))
        feature = nn.Conv1d(SIZE, SIZE, 1)(torch.zeros(1, SIZE, SIZE))
    assert (dims.of(output), dims.of(feature)) == (2, 1)


# Where real networks have them. The channels of each layer are different from its rows.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", {"layer4": 512, "layer1.0.bn2": 64, "avgpool": 512}),
        ("swin_t", {"features.7": 768, "features.0": 96, "features.2": 192, "norm": 768, "permute": 768}),
        ("convnext_tiny", {"features.7": 768, "features.1.0": 96, "features.1.0.block.5": 96}),
        ("shufflenet_v2_x0_5", {"stage4": 192, "conv5": 1024}),
        ("densenet121", {"features": 1024}),
        ("vit_b_32", {"encoder.layers.encoder_layer_1": 768, "conv_proj": 768}),
    ],
)
def test_features_of_real_networks_come_in_one_layout(name, layers):
    tap = FeatureTap(getattr(torchvision.models, name)(num_classes=3), list(layers))
    _, shapes = tap.shapes((3, 224, 224) if name == "vit_b_32" else (3, 64, 64))
    assert {layer: shape[1 if len(shape) > 3 else -1] for layer, shape in shapes.items()} == layers
    # Given, it is not looked for.
    told = FeatureTap(tap.network, "features.7", channels="last") if name == "swin_t" else None
    assert told is None or told.shapes((3, 64, 64))[1]["features.7"] == shapes["features.7"]


class Last(nn.Module):
    """Its ``body`` gives ``(N, H, W, C)``, all of one size; ``wild``: nobody knows what."""

    def __init__(self, *, wild=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wild = nn.Conv2d(1, SIZE, 3, padding=1), wild
        self.body, self.head = nn.Identity(), nn.Linear(SIZE, 3)

    def forward(self, inputs):
        features = self.stem(inputs)
        features = features[:, [2, 0, 1, 3]] if self.wild else features.permute(0, 2, 3, 1)
        return self.head(self.body(features).flatten(1, 2).mean(1))


def test_features_are_moved_and_their_gradients_with_them():
    network = Last()
    tap = FeatureTap(network, "body")
    inputs = torch.rand(2, 1, SIZE, SIZE)
    assert torch.equal(tap(inputs)[1]["body"], network.stem(inputs).permute(0, 2, 3, 1))
    tap.shapes((1, SIZE, SIZE))
    feature = tap(inputs)[1]["body"]
    assert torch.equal(feature, network.stem(inputs))
    weights = torch.rand(feature.shape)
    (feature * weights).sum().backward()
    found = network.stem.weight.grad.clone()
    network.zero_grad()
    (network.stem(inputs) * weights).sum().backward()
    torch.testing.assert_close(found, network.stem.weight.grad)


def test_what_nothing_tells_must_be_said():
    with pytest.raises(InputError, match=r"Last: nothing tells which dimension of 'body' \(1, 4, 4, 4\)") as caught:
        FeatureTap(Last(wild=True), "body").shapes((1, SIZE, SIZE))
    assert "\n" not in str(caught.value)
    inputs = torch.rand(2, 1, SIZE, SIZE)
    for channels, moved in (("first", (0, 1, 2, 3)), ("last", (0, 3, 1, 2))):
        network = Last(wild=True)
        tap = FeatureTap(network, "body", channels=channels)
        expected = network.stem(inputs)[:, [2, 0, 1, 3]].permute(moved)
        assert torch.equal(tap(inputs)[1]["body"], expected)
        tap.shapes((1, SIZE, SIZE))
        assert torch.equal(tap(inputs)[1]["body"], expected)
    with pytest.raises(InputError, match="channels must be one of first, last, got 'second'"):
        FeatureTap(Last(), "body", channels="second")


@pytest.mark.slow
def test_a_compiled_network_tells_as_well():
    torch._dynamo.reset()
    network = Last()
    network.compile(backend="eager")
    tap = FeatureTap(network, "body")
    tap.shapes((1, SIZE, SIZE))
    inputs = torch.rand(2, 1, SIZE, SIZE)
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    with torch.no_grad():
        assert torch.allclose(tap(inputs)[1]["body"], network.stem(inputs), atol=1e-6)
    torch._dynamo.config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()
