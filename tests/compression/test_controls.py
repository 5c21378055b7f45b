"""What a compressed network is compared with: a dense one of its size, and one pruned at random."""

import copy

import pytest
import torch
from torch import nn

from distill_lightning import InputError, SmallCNN, SmallLSTM, SmallTransformer
from distill_lightning.compression.factor.factoring import build_factors
from distill_lightning.compression.factor.layers import TrainEmbedding, TrainLinear
from distill_lightning.compression.file.artefact import load_compressed, write_artefact
from distill_lightning.compression.report.controls import random_steps, same_size_network
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.steps import (
    L0,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    SoftMovement,
)
from distill_lightning.compression.steps.schedules import Cubic, Threshold
from distill_lightning.compression.structure.changes import plain_copy

IMAGES = torch.rand(2, 1, 8, 8)


class Sequences(nn.Module):
    """A recurrent layer and a classifier of its last output."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(8, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, inputs):
        return self.head(self.layer(inputs)[0][:, -1])


NETWORKS = {
    "cnn": (lambda: SmallCNN(10), IMAGES),
    "lstm": (lambda: SmallLSTM(10, input_size=8), IMAGES),
    "gru": (lambda: Sequences(nn.GRU), torch.rand(2, 5, 8)),
    "stacked lstm": (lambda: Sequences(nn.LSTM, num_layers=2), torch.rand(2, 5, 8)),
    "bidirectional lstm": (lambda: Sequences(nn.LSTM, bidirectional=True), torch.rand(2, 5, 8)),
    "stacked bidirectional rnn": (lambda: Sequences(nn.RNN, num_layers=3, bidirectional=True), torch.rand(2, 5, 8)),
    "transformer": (lambda: SmallTransformer(10, length=8, input_size=8), IMAGES),
}


def compressed_by(make, steps, inputs):
    torch.manual_seed(0)
    network = make()
    Compressor(network, steps, inputs, bn_batches=0).apply()
    return network


def nonzero(network):
    """Parameters without weights of zero; biases begin as zeros, which no step prunes."""
    parameters = list(plain_copy(network).parameters())
    return sum(int(value.count_nonzero()) if value.dim() > 1 else len(value) for value in parameters)


def stored(network):
    return sum(parameter.numel() for parameter in network.parameters())


# The same size from scratch


@pytest.mark.slow
@pytest.mark.parametrize("amount", [0.3, 0.6])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_network_has_at_most_as_many_parameters_and_nearly_as_many(name, amount):
    make, inputs = NETWORKS[name]
    compressed = compressed_by(make, [PruneWeights(amount=amount)], inputs)
    size = nonzero(compressed)
    fresh = same_size_network(make(), compressed, inputs, seed=3)
    assert 0.8 * size < stored(fresh) <= size < stored(make())
    assert fresh(inputs).shape == make()(inputs).shape


@pytest.mark.slow
def test_one_unit_more_would_be_too_many():
    """Of one hidden layer every width has its size: the widest that fits is taken."""

    def make():
        return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))

    for amount in (0.2, 0.51, 0.83):
        compressed = compressed_by(make, [PruneWeights(amount=amount)], torch.rand(2, 5))
        sizes = [units * (5 + 1) + units * 3 + 3 for units in range(1, 65)]
        widest = max(size for size in sizes if size <= nonzero(compressed))
        assert stored(same_size_network(make(), compressed, torch.rand(2, 5), seed=0)) == widest


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_every_layer_and_direction_is_thinned_alike(options):
    inputs = torch.rand(2, 5, 8)

    def make():
        return Sequences(nn.LSTM, **options)

    compressed = compressed_by(make, [PruneWeights(amount=0.7)], inputs)
    layer = same_size_network(make(), compressed, inputs, seed=3).layer
    assert 1 < layer.hidden_size < 16
    assert {weight.shape[0] for weight in layer.parameters()} == {4 * layer.hidden_size}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "steps",
    [[PruneWeights(amount=0.5)], [Quantize(weight_bits=4)], [LowRank(rank=4)]],
    ids=["pruned", "quantized", "factored"],
)
def test_nothing_of_what_was_trained_is_left(name, steps):
    """Trained weights are stood for by a value that no initialisation draws."""
    make, inputs = NETWORKS[name]
    compressed = compressed_by(make, steps, inputs)
    trained = make()
    with torch.no_grad():
        for value in (*trained.parameters(), *(buffer for buffer in trained.buffers() if buffer.is_floating_point())):
            value.fill_(7.5)
    fresh = same_size_network(trained, compressed, inputs, seed=3)
    assert not any(bool((value == 7.5).any()) for value in fresh.state_dict().values())
    # By the seed alone.
    again = same_size_network(make(), compressed, inputs, seed=3)
    other = same_size_network(make(), compressed, inputs, seed=4)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in fresh.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_what_cannot_initialise_itself_is_refused():
    class Gain(nn.Linear):
        reset_parameters = None

        def __init__(self):
            nn.Module.__init__(self)
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.bias = None

    network = nn.Sequential(nn.Linear(4, 4), Gain())
    with pytest.raises(InputError, match=r"Gain has parameters and no reset_parameters\(\): give it one"):
        same_size_network(copy.deepcopy(network), network, torch.rand(2, 4), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_quantization_rounds_to_zero_was_not_pruned(bits):
    def make():
        torch.manual_seed(1)
        return SmallCNN(10)

    compressed = compressed_by(make, [Quantize(weight_bits=bits)], IMAGES)
    assert nonzero(compressed) < stored(make())
    assert stored(same_size_network(make(), compressed, IMAGES, seed=0)) == stored(make())
    both = compressed_by(make, [PruneWeights(amount=0.5), Quantize(weight_bits=bits)], IMAGES)
    pruned = compressed_by(make, [PruneWeights(amount=0.5)], IMAGES)
    sizes = [stored(same_size_network(make(), network, IMAGES, seed=0)) for network in (both, pruned)]
    assert sizes[0] == sizes[1] < stored(make())


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_in_few_bits_have_a_control(groups):
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.Flatten(), nn.Linear(128, 3)
        )

    compressed = compressed_by(make, [Quantize(weight_bits=4)], IMAGES)
    assert stored(same_size_network(make(), compressed, IMAGES, seed=0)) == stored(make())


def test_weights_that_are_tied_and_quantized_count_once():
    def make():
        network = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
        network[1].weight = network[0].weight
        return network

    tokens = torch.randint(50, (2, 5))
    compressed = compressed_by(make, [Quantize(weight_bits=8)], tokens)
    fresh = same_size_network(make(), compressed, tokens, seed=0)
    assert stored(fresh) == 50 * 8 + 50
    assert fresh[0].weight is fresh[1].weight


def test_the_row_of_a_padding_was_not_pruned():
    def make():
        return nn.Sequential(nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    tokens = torch.randint(50, (2, 5))
    for steps in ([LowRank(rank=3)], [Quantize(weight_bits=4)]):
        compressed = compressed_by(make, steps, tokens)
        assert stored(same_size_network(make(), compressed, tokens, seed=0)) == stored(plain_copy(compressed))


def test_a_width_that_cannot_shrink_is_named():
    """A Transformer can lose heads and neurons, and its width stays."""
    make, inputs = NETWORKS["transformer"]
    compressed = compressed_by(make, [PruneWeights(amount=0.97)], inputs)
    with pytest.raises(InputError, match=r"SmallTransformer: \d+ parameters are fewer .*heads, neurons.* no dense"):
        same_size_network(make(), compressed, inputs, seed=0)


# Layers made of factors


def test_a_linear_train_begins_with_the_spread_of_a_dense_layer():
    torch.manual_seed(0)
    dense = nn.Linear(64, 64)
    train = TrainLinear(dense, out_shape=[4, 4, 4], in_shape=[4, 4, 4], ranks=[8, 8])
    assert not any(bool(parameter.any()) for parameter in train.parameters())
    weights = []
    for _ in range(20):
        train.reset_parameters()
        weights.append((train(torch.eye(64)) - train.bias).detach())
    assert torch.stack(weights).std() == pytest.approx(float(dense.weight.std()), rel=0.1)
    assert 0.8 / 8 < train.bias.abs().max() <= 1 / 8


def test_an_embedding_train_begins_with_the_spread_of_a_dense_table():
    torch.manual_seed(0)
    dense = nn.Embedding(60, 16, padding_idx=3)
    train = TrainEmbedding(dense, row_shape=[8, 8], column_shape=[4, 4], ranks=[6])
    tables = []
    for _ in range(20):
        train.reset_parameters()
        tables.append(train(torch.arange(60)).detach())
    rows = [row for row in range(60) if row != 3]
    assert torch.stack(tables)[:, rows].std() == pytest.approx(1, rel=0.1)
    assert not any(bool(table[3].any()) for table in tables)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_factored_recurrent_weights_begin_with_the_spread_of_dense_ones(kind):
    torch.manual_seed(0)
    dense = kind(8, 64)
    factored = build_factors(dense, {"kind": "recurrent", "ranks": {"weight_hh_l0": 4}})
    products = []
    for _ in range(20):
        factored.reset_parameters()
        products.append((factored.weight_hh_l0_left @ factored.weight_hh_l0_right).detach())
    assert torch.stack(products).std() == pytest.approx(float(dense.weight_hh_l0.std()), rel=0.05)
    assert 0.9 / 8 < factored.weight_ih_l0.abs().max() <= 1 / 8
    assert all(parameter.requires_grad for parameter in factored.parameters())


def test_the_control_of_tensor_trains_can_learn():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))

    tokens = torch.arange(8)
    compressed = compressed_by(make, [LowRank(method="tt", rank=4)], tokens)
    assert isinstance(compressed[0], TrainEmbedding)
    assert isinstance(compressed[1], TrainLinear)
    fresh = same_size_network(make(), compressed, tokens, seed=0)
    assert stored(fresh) <= nonzero(compressed)
    fresh(tokens).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in fresh.parameters())
    assert fresh(tokens).std() > 0.01


# Pruned at random


def mask_of(steps, seed=0):
    torch.manual_seed(0)
    network = SmallCNN(10)
    Compressor(network, steps, IMAGES, bn_batches=0, seed=seed).apply()
    return {name: value != 0 for name, value in network.named_parameters() if value.dim() > 1}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("amount", [0.3, 0.8])
def test_as_much_is_pruned_at_random(amount, scope):
    steps = [PruneWeights(amount=amount, scope=scope)]
    ours, drawn = mask_of(steps), mask_of(random_steps(steps))
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in (ours, drawn)]
    assert kept[0] == kept[1]
    if scope == "layer":
        assert {name: int(mask.sum()) for name, mask in ours.items()} == {
            name: int(mask.sum()) for name, mask in drawn.items()
        }
    # Two independent masks agree on p² + (1 - p)² of all weights.
    flat = [torch.cat([mask.flatten() for mask in masks.values()]) for masks in (ours, drawn)]
    agreed = float((flat[0] == flat[1]).float().mean())
    assert agreed == pytest.approx(amount**2 + (1 - amount) ** 2, abs=0.03)
    again, other = mask_of(random_steps(steps)), mask_of(random_steps(steps), seed=1)
    assert all(torch.equal(mask, again[name]) for name, mask in drawn.items())
    assert any(not torch.equal(mask, other[name]) for name, mask in drawn.items())


def test_as_many_channels_leave_at_random():
    steps = [PruneUnits(amount=0.5, unit="channel", scope="layer")]
    ours, drawn = (compressed_by(lambda: SmallCNN(10), chosen, IMAGES) for chosen in (steps, random_steps(steps)))
    shapes = [{name: value.shape for name, value in network.named_parameters()} for network in (ours, drawn)]
    assert shapes[0] == shapes[1]
    assert any(not torch.equal(one, other) for one, other in zip(ours.parameters(), drawn.parameters(), strict=True))


class Mixed(nn.Module):
    """A layer whose inputs can be observed, and one where they cannot."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 64)

    def forward(self, inputs):
        return self.head(self.lstm(inputs)[0][:, -1])


@pytest.mark.parametrize("criterion", ["obs", "obs_update"])
def test_the_control_of_optimal_brain_surgeon_prunes_the_same_weights(criterion):
    torch.manual_seed(0)
    network, inputs = Mixed(), torch.randn(8, 5, 4)
    pruned = []
    steps = [PruneWeights(amount=0.5, criterion=criterion)]
    for chosen in (steps, random_steps(steps), random_steps(random_steps(steps))):
        compressor = Compressor(copy.deepcopy(network), chosen, inputs, batches=[(inputs, torch.arange(8))])
        compressor.apply()
        pruned.append({path: int((~kept).sum()) for path, kept in compressor.masks.kept.items()})
    assert pruned[0] == pruned[1] == pruned[2] == {"head.weight": 256}


def test_other_steps_are_not_touched():
    steps = [Regularise(penalty="l1", weight=0.1, finetune_epochs=1), PruneWeights(amount=0.5), Quantize(weight_bits=4)]
    before = list(steps)
    drawn = random_steps(steps)
    assert steps == before
    assert [type(step) for step in drawn] == [Regularise, PruneWeights, Quantize]
    assert drawn[0] == steps[0]
    assert drawn[2] == steps[2]
    assert drawn[1] == PruneWeights(amount=0.5, criterion="random")


def test_a_learned_mask_is_compared_with_random_scores_under_its_schedule():
    options = {"schedule": Cubic(end=0.7), "scope": "layer"}
    drawn = random_steps([LearnMask(Movement(0.5, **options), targets="Conv2d", at=1, finetune_epochs=2)])
    expected = PruneWeights(amount=0.5, criterion="random", targets="Conv2d", at=1, finetune_epochs=2, **options)
    assert drawn == [expected]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Regularise(penalty="l1", weight=0.1, threshold=0.01, finetune_epochs=1), "Regularise l1 prunes by its own"),
        (LearnMask(L0(0.1), finetune_epochs=1), "the gates of LearnMask L0 fix no amount to draw"),
        (Regularise(penalty="bn_gamma", weight=0.1, threshold=0.1, finetune_epochs=1), "Regularise bn_gamma prunes"),
        (LearnMask(SoftMovement(), finetune_epochs=1), "threshold is one of the learned scores"),
        (PruneWeights(schedule=Threshold(0.1)), "threshold is one of the criterion's scores"),
    ],
)
def test_what_prunes_as_much_as_its_scores_say_has_no_random_control(step, reason):
    for steps in ([step], [step, PruneWeights(amount=0.5)]):
        with pytest.raises(InputError, match=reason):
            random_steps(steps)


def test_a_packed_network_cannot_tell_what_was_pruned(tmp_path):
    network = compressed_by(lambda: SmallCNN(10), [Quantize(weight_bits=4)], IMAGES)
    write_artefact(network, tmp_path / "network.dlpk")
    with pytest.raises(
        InputError, match="network.dlpk is a packed network, whose weights are baked: give a checkpoint"
    ):
        load_compressed(tmp_path / "network.dlpk", bake=False)


def test_a_factorys_own_initialisation_is_kept_where_sizes_are():
    torch.manual_seed(0)
    network = SmallTransformer(10, input_size=8, length=8)
    images = torch.rand(2, 1, 8, 8)
    compressed = copy.deepcopy(network)
    Compressor(compressed, [PruneUnits(amount=0.5, unit="neuron")], images).apply()
    fresh = same_size_network(network, compressed, images, seed=5)
    torch.manual_seed(5)
    own = SmallTransformer(10, input_size=8, length=8)
    drawn, kept = dict(own.named_parameters()), dict(fresh.named_parameters())
    same = {name for name in drawn if torch.equal(drawn[name], kept[name])}
    assert same == {name for name in drawn if drawn[name].shape == kept[name].shape and "linear2" not in name}
    assert any("linear2.weight" in name for name in drawn.keys() - same)
