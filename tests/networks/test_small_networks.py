"""SmallCNN, SmallLSTM and SmallTransformer: what they compute, their sizes, and that they can be shrunk."""

import copy
import math

import pytest
import torch
from torch import nn

from distill_lightning import InputError, SmallCNN, SmallLSTM, SmallTransformer
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.shrink.attention import convert_attention
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.recurrent import in_blocks, unit_groups
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.compression.shrink.transformer import head_groups, neuron_groups, remove_layers
from distill_lightning.layers import FeatureTap, dry_forward
from distill_lightning.networks import build_from, recipe_of

CLASSES, TOKENS = 5, 11


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def images(samples=3, channels=2, rows=6, columns=4):
    return torch.randn(samples, channels, rows, columns, generator=torch.Generator().manual_seed(0))


def tokens(samples=3, steps=7):
    return torch.randint(0, TOKENS, (samples, steps), generator=torch.Generator().manual_seed(0))


def small_cnn(**options):
    return SmallCNN(CLASSES, in_channels=2, **({"width": 4} | options))


def lstm_of_rows(**options):
    return SmallLSTM(CLASSES, input_size=8, **({"width": 6} | options))


def lstm_of_tokens(**options):
    return SmallLSTM(CLASSES, vocabulary=TOKENS, **({"width": 6} | options))


def transformer_of_rows(**options):
    return SmallTransformer(CLASSES, input_size=8, **({"length": 6, "width": 8, "feedforward": 10} | options))


def transformer_of_tokens(**options):
    return SmallTransformer(CLASSES, vocabulary=TOKENS, **({"length": 9, "width": 8, "feedforward": 10} | options))


NETWORKS = [
    (small_cnn, images),
    (lstm_of_rows, images),
    (lstm_of_tokens, tokens),
    (transformer_of_rows, images),
    (transformer_of_tokens, tokens),
]
SEQUENCES = NETWORKS[1:]
OF_TOKENS = [(lstm_of_tokens, tokens), (transformer_of_tokens, tokens)]


def made(build, **options):
    torch.manual_seed(0)
    return build(**options).eval()


# Naive references


def steps_of(network, inputs):
    """Each sample as a list of vectors, one for each step."""
    if inputs.dim() == 2:
        return [[network.embed.weight[token] for token in sample] for sample in inputs.tolist()]
    return [[torch.cat([channel[row] for channel in image]) for row in range(image.shape[1])] for image in inputs]


def naive_lstm(network, inputs):
    def sigmoid(x):
        return 1 / (1 + (-x).exp())

    def layer(steps, number):
        w_in, w_hidden, b_in, b_hidden = (
            getattr(network.lstm, f"{name}_l{number}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden, cell, outputs = torch.zeros(w_hidden.shape[1]), torch.zeros(w_hidden.shape[1]), []
        for step in steps:
            i, f, g, o = (w_in @ step + b_in + w_hidden @ hidden + b_hidden).chunk(4)
            cell = sigmoid(f) * cell + sigmoid(i) * g.tanh()
            hidden = sigmoid(o) * cell.tanh()
            outputs.append(hidden)
        return outputs

    results = []
    for steps in steps_of(network, inputs):
        for number in range(network.lstm.num_layers):
            steps = layer(steps, number)  # noqa: PLW2901
        read = steps if inputs.dim() == 2 else steps[-1:]
        results.append(torch.stack([network.head.weight @ step + network.head.bias for step in read]))
    return torch.stack(results) if inputs.dim() == 2 else torch.cat(results)


def naive_transformer(network, inputs):
    causal = inputs.dim() == 2

    def norm(x, layer):
        variance = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (variance + layer.eps).sqrt() * layer.weight + layer.bias

    def attend(steps, attention):
        width, heads = len(steps[0]), attention.num_heads
        size = width // heads
        joined = [attention.in_proj_weight @ step + attention.in_proj_bias for step in steps]
        outputs = []
        for place in range(len(steps)):
            parts = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                query = joined[place][:width][own]
                seen = range(place + 1) if causal else range(len(steps))
                scores = [float(query @ joined[other][width : 2 * width][own]) / math.sqrt(size) for other in seen]
                shares = torch.tensor([math.exp(score) for score in scores])
                shares = shares / shares.sum()
                parts.append(
                    sum(share * joined[other][2 * width :][own] for share, other in zip(shares, seen, strict=True))
                )
            outputs.append(attention.out_proj.weight @ torch.cat(parts) + attention.out_proj.bias)
        return outputs

    results = []
    for steps in steps_of(network, inputs):
        if not causal:
            steps = [network.embed.weight @ step + network.embed.bias for step in steps]  # noqa: PLW2901
        hidden = [step + network.positions.weight[place] for place, step in enumerate(steps)]
        for layer in network.encoder.layers:
            seen = attend([norm(step, layer.norm1) for step in hidden], layer.self_attn)
            hidden = [step + more for step, more in zip(hidden, seen, strict=True)]
            for place, step in enumerate(hidden):
                inner = (layer.linear1.weight @ norm(step, layer.norm2) + layer.linear1.bias).clamp_min(0)
                hidden[place] = step + layer.linear2.weight @ inner + layer.linear2.bias
        hidden = torch.stack([norm(step, network.encoder.norm) for step in hidden])
        results.append((hidden if causal else hidden.mean(dim=0)) @ network.head.weight.T + network.head.bias)
    return torch.stack(results)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("build", "inputs"), SEQUENCES)
@torch.no_grad()
def test_a_network_of_sequences_computes_what_its_layers_say(build, inputs, depth):
    network = made(build, depth=depth)
    naive = naive_transformer if isinstance(network, SmallTransformer) else naive_lstm
    expected = naive(network, inputs())
    assert expected.shape == ((3, 7, CLASSES) if inputs is tokens else (3, CLASSES))
    torch.testing.assert_close(network(inputs()), expected, atol=2e-6, rtol=1e-5)
    # In train mode PyTorch takes another way through a Transformer.
    torch.testing.assert_close(network.train()(inputs()), expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_the_small_cnn_is_three_convolutions_with_pooling_between():
    network = made(small_cnn)
    for norm in (network.features[1], network.features[5], network.features[9]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    hidden = images(rows=9, columns=8)
    for place in (0, 4, 8):
        conv, norm = network.features[place], network.features[place + 1]
        # Without im2col: every pixel's patch by hand.
        padded = nn.functional.pad(hidden, (1, 1, 1, 1))
        rows, columns = hidden.shape[2:]
        patches = torch.stack(
            [padded[:, :, y : y + 3, x : x + 3].flatten(1) for y in range(rows) for x in range(columns)], dim=-1
        )
        hidden = (conv.weight.flatten(1) @ patches).unflatten(2, (rows, columns))
        per_channel = [
            (hidden[:, c] - norm.running_mean[c]) / (norm.running_var[c] + norm.eps).sqrt()
            for c in range(hidden.shape[1])
        ]
        hidden = torch.stack(per_channel, dim=1).clamp_min(0)
        if place < 8:
            hidden = hidden[:, :, : rows // 2 * 2, : columns // 2 * 2]
            hidden = hidden.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5))
    expected = hidden.mean(dim=(2, 3)) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(images(rows=9, columns=8)), expected, atol=1e-5, rtol=1e-5)


# Sizes


def test_the_default_sizes_on_digits_are_those_counted_by_hand():
    assert count(SmallCNN(10)) == 9 * (24 + 24 * 48 + 48 * 96) + 2 * (24 + 48 + 96) + 96 * 10 + 10 == 53_362
    assert count(SmallLSTM(10, input_size=8)) == 4 * 96 * (8 + 96) + 2 * 4 * 96 + 96 * 10 + 10 == 41_674
    attention, feedforward, norms = 4 * (64 * 64 + 64), 64 * 128 + 128 + 128 * 64 + 64, 2 * 2 * 64
    around = 8 * 64 + 64 + 8 * 64 + 2 * 64 + 64 * 10 + 10
    assert count(SmallTransformer(10, length=8, input_size=8)) == 2 * (attention + feedforward + norms) + around
    assert count(SmallTransformer(10, length=8, input_size=8)) == 68_810


@pytest.mark.parametrize("size", [8, 16, 28])
def test_the_small_cnn_takes_digits_and_larger_images(size):
    network = SmallCNN(10).eval()
    output, features = FeatureTap(network, "features").shapes((1, size, size))
    assert output == (1, 10)
    assert features["features"] == (1, 96, size // 2 // 2, size // 2 // 2)


# What an output depends on


@pytest.mark.parametrize(("build", "inputs"), OF_TOKENS)
@torch.no_grad()
def test_a_language_model_sees_nothing_that_comes_later(build, inputs):
    network, text = made(build, depth=2), inputs()
    before = network(text)
    for place in range(text.shape[1]):
        changed = text.clone()
        changed[:, place] = (changed[:, place] + 1) % TOKENS
        after = network(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
        # From there on every position sees it.
        assert (after - before)[:, place:].abs().amax(dim=-1).min() > 1e-7


@pytest.mark.parametrize(("build", "inputs"), OF_TOKENS)
@torch.no_grad()
def test_the_beginning_of_a_text_is_predicted_as_in_the_whole(build, inputs):
    network = made(build)
    torch.testing.assert_close(network(inputs()[:, :3]), network(inputs())[:, :3], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("build", "inputs"), NETWORKS)
@torch.no_grad()
def test_samples_do_not_see_each_other(build, inputs):
    network = made(build)
    alone = torch.cat([network(sample[None]) for sample in inputs()])
    torch.testing.assert_close(network(inputs()), alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_order_of_the_rows_counts():
    for build in (lstm_of_rows, transformer_of_rows):
        network = made(build)
        assert (network(images()) - network(images().flip(2))).abs().max() > 1e-4


def test_the_layers_of_a_transformer_begin_with_weights_of_their_own():
    first, second = made(transformer_of_rows, depth=2).encoder.layers
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))


@pytest.mark.parametrize(("build", "inputs"), NETWORKS)
def test_a_gradient_reaches_every_parameter(build, inputs):
    network = made(build).train()
    network(inputs(steps=9) if build is transformer_of_tokens else inputs()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_is_in_training_alone():
    network = made(transformer_of_rows, dropout=0.5)
    assert torch.equal(network(images()), network(images()))
    network.train()
    assert not torch.equal(network(images()), network(images()))


# Recipes, and other ways to run


@pytest.mark.parametrize(("build", "inputs"), NETWORKS)
@torch.no_grad()
def test_a_recipe_builds_the_same_network(build, inputs):
    network = made(build, width=4)
    again = build_from(recipe_of(network)).eval()
    assert recipe_of(again) == recipe_of(network)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(inputs()), network(inputs()))


def test_a_recipe_keeps_every_argument():
    network = SmallTransformer(
        3, length=5, vocabulary=7, width=12, depth=3, heads=2, feedforward=9, dropout=0.25
    )  # fmt: skip
    assert recipe_of(network)["arguments"] == {
        "num_classes": 3, "length": 5, "vocabulary": 7, "width": 12, "depth": 3, "heads": 2, "feedforward": 9,
        "dropout": 0.25,
    }  # fmt: skip
    assert str(build_from(recipe_of(network))) == str(network)
    other = SmallLSTM(3, input_size=5, width=12, depth=3)
    assert recipe_of(other)["arguments"] == {"num_classes": 3, "input_size": 5, "width": 12, "depth": 3}
    assert str(build_from(recipe_of(other))) == str(other)


@pytest.mark.parametrize(("build", "inputs"), OF_TOKENS)
def test_a_dry_forward_gives_tokens_to_a_language_model(build, inputs):
    network, seen = made(build), []
    network.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    assert dry_forward(network, (7,)).shape == (1, 7, CLASSES)
    assert seen[0].dtype == torch.int64


def test_a_dry_forward_gives_numbers_to_a_network_that_embeds_something_else():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 3)

        def forward(self, images):
            assert images.is_floating_point()
            return self.head(images.mean(dim=(1, 2)) + self.embed(torch.zeros(len(images), dtype=torch.long)))

    assert dry_forward(Positions(), (1, 6, 4)).shape == (1, 3)


def test_a_dry_forward_says_which_tokens_a_network_does_not_take():
    with pytest.raises(InputError, match=r"SmallTransformer has positions for 9 steps, got 10: .*length"):
        dry_forward(made(transformer_of_tokens), (10,))
    broken = nn.Sequential(nn.Embedding(3, 4), nn.Linear(5, 2))
    with pytest.raises(InputError, match=r"input of shape \(10,\) .*give input_shape=\(T,\) of your tokens"):
        dry_forward(broken, (10,))


@pytest.mark.parametrize(("build", "inputs"), NETWORKS)
def test_every_product_is_counted(build, inputs):
    found = count_macs(made(build), inputs(1))
    assert found.uncounted == ()
    assert found.by_module["head"] == made(build).head.weight.numel() * (7 if inputs is tokens else 1)


# Surgery


def masked(network, groups, keep):
    """A copy with zeros where the groups' other units are."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for group in groups:
            for name, mask in group.masks(copied, keep[group]).items():
                copied.get_parameter(name).mul_(mask)
    return copied


def halves(groups):
    generator = torch.Generator().manual_seed(0)
    return {group: torch.randperm(group.size, generator=generator)[: group.size // 2].tolist() for group in groups}


def check_shrinking(network, groups, keep, inputs, build):
    expected = masked(network, groups, keep)
    size = count(network)
    shrink(network, keep)
    assert count(network) < 0.8 * size
    again = set_sizes(made(build), sizes_of(network)).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        for samples in (1, 2, 5):
            torch.testing.assert_close(network(inputs(samples)), expected(inputs(samples)), atol=1e-5, rtol=1e-4)
            assert torch.equal(again(inputs(samples)), network(inputs(samples)))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("build", "inputs"), [(lstm_of_rows, images), (lstm_of_tokens, tokens)])
def test_hidden_units_of_an_lstm_can_be_removed(build, inputs, depth):
    network = made(build, depth=depth)
    (group,) = unit_groups(network, inputs(1))
    assert group.size == 6 * depth
    keep = {group: in_blocks(network, group, [[block, block + 1, 5] for block in range(depth)])}
    check_shrinking(network, [group], keep, inputs, lambda: build(depth=depth))
    assert network.lstm.hidden_size == 3


@pytest.mark.parametrize(("build", "inputs"), [(transformer_of_rows, images), (transformer_of_tokens, tokens)])
def test_heads_and_neurons_of_a_transformer_can_be_removed(build, inputs):
    network = convert_attention(made(build))
    with torch.no_grad():
        torch.testing.assert_close(network(inputs()), made(build)(inputs()), atol=1e-6, rtol=1e-5)
    groups = head_groups(network) + neuron_groups(network)
    assert [group.size for group in groups] == [4, 4, 10, 10]
    check_shrinking(network, groups, halves(groups), inputs, build)


@pytest.mark.parametrize(("build", "inputs"), [(transformer_of_rows, images), (transformer_of_tokens, tokens)])
@torch.no_grad()
def test_layers_of_a_transformer_can_be_removed(build, inputs):
    network = made(build, depth=3)
    expected = copy.deepcopy(network)
    del expected.encoder.layers[1]
    remove_layers(network.encoder, [0, 2])
    assert torch.equal(network(inputs()), expected(inputs()))


def test_channels_of_the_small_cnn_can_be_removed():
    network = made(small_cnn)
    groups = channel_groups(network, images(1, rows=8, columns=8))
    assert [group.size for group in groups] == [4, 8, 16]
    check_shrinking(network, groups, halves(groups), lambda samples: images(samples, rows=8, columns=8), small_cnn)


# What is refused


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (small_cnn, {"width": 0}, "SmallCNN: width must be at least 1, got 0"),
        (lstm_of_rows, {"depth": 0}, "SmallLSTM: depth must be at least 1, got 0"),
        (lstm_of_rows, {"vocabulary": 3}, r"SmallLSTM needs either input_size .* or vocabulary"),
        (transformer_of_rows, {"length": 0}, "SmallTransformer: length must be at least 1, got 0"),
        (transformer_of_rows, {"feedforward": -1}, "SmallTransformer: feedforward must be at least 1, got -1"),
        (transformer_of_rows, {"heads": 3}, "width=8 is not a multiple of heads=3: change one of them"),
        (transformer_of_rows, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (transformer_of_rows, {"vocabulary": 3}, r"SmallTransformer needs either input_size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(build, options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.parametrize("network", [SmallLSTM, SmallTransformer])
def test_what_is_read_has_to_be_said(network):
    options = {"length": 4} if network is SmallTransformer else {}
    with pytest.raises(InputError, match="needs either input_size"):
        network(3, **options)
    for name in ("input_size", "vocabulary"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            network(3, **{name: 0}, **options)


def test_more_steps_than_positions_are_refused():
    with pytest.raises(InputError, match="has positions for 6 steps, got 7: build it with length=7"):
        made(transformer_of_rows)(images(rows=7))
