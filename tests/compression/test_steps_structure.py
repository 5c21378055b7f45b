"""The steps LowRank and TieLayers, and the structure that they leave."""

import copy
import json
from dataclasses import dataclass

import jsonargparse
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.access.computed import bake, is_computed
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.factor.convolutions import ConvChain
from distill_lightning.compression.factor.layers import LowRankLinear
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.recurrent import unit_groups
from distill_lightning.compression.shrink.transformer import neuron_groups
from distill_lightning.compression.steps import (
    HashShare,
    LowRank,
    Order,
    ShareWeights,
    Step,
    TieLayers,
    TrainedStep,
)
from distill_lightning.compression.structure.changes import (
    NOTHING,
    changes_of,
    note_change,
    plain_copy,
    plain_structure,
    rebuild_structure,
    structure_of,
)


class Sequences(nn.Module):
    def __init__(self, kind=nn.LSTM, words=None):
        super().__init__()
        self.embedding = nn.Linear(8, 16) if words is None else nn.Embedding(words, 16, padding_idx=0)
        self.rnn = kind(16, 16, batch_first=True)
        self.head = nn.Linear(16, words or 10)

    def forward(self, inputs):
        return self.head(self.rnn(self.embedding(inputs))[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)
        for parameter in self.encoder.parameters():
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def forward(self, inputs):
        return self.head(self.encoder(inputs).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


NETWORKS = {
    "conv": (convolutional, lambda: torch.randn(4, 3, 8, 8)),
    "lstm": (Sequences, lambda: torch.randn(4, 6, 8)),
    "encoder": (Encoder, lambda: torch.randn(4, 6, 16)),
    "language": (lambda: Sequences(words=50), lambda: torch.randint(0, 50, (4, 6))),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    return make().eval(), inputs()


def compress(network, inputs, *steps, **options):
    compressor = Compressor(network, steps, inputs, **options)
    compressor.apply()
    return compressor


@dataclass(frozen=True, kw_only=True)
class Shrink(TrainedStep):
    """Half of everything that can be removed."""

    order = Order.STRUCTURE

    def act(self, piece):
        network, inputs = piece.network, piece.example_inputs
        if isinstance(network, Encoder):
            groups = neuron_groups(network)
        elif isinstance(network, nn.Sequential):
            groups = channel_groups(network, inputs)
        else:
            groups = unit_groups(network, inputs)
        shrink(network, {group: torch.arange((group.size + 1) // 2) for group in groups})
        note_change(network, "sizes")
        piece.changed = True


# LowRank


def test_every_layer_that_fits_is_factored_and_the_report_names_it():
    network, inputs = build("conv")
    compressor = compress(network, inputs, LowRank(method={"Conv2d": "tucker2", "Linear": "svd"}, rank=0.25))
    assert [type(network[at]) for at in (0, 3, 7)] == [ConvChain, ConvChain, LowRankLinear]
    assert network[0].method == "tucker2"
    assert [note for note in compressor.piece.notes if note.startswith("7: Linear as svd of rank 2: 276 weights")]
    assert "LowRank works on 100% of Sequential's weights" in compressor.piece.notes
    assert list(changes_of(network)[0]["layers"]) == ["0", "3", "7"]


@pytest.mark.parametrize("name", NETWORKS)
def test_full_rank_is_the_same_network(name):
    network, inputs = build(name)
    expected = network(inputs)
    compress(network, inputs, LowRank(rank=1.0, only_if_smaller=False, convert_attention=True))
    torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "svd_spatial", "tucker2", "cp", "tt"])
@pytest.mark.parametrize("fraction", [0.4, 0.7])
def test_no_layer_is_above_its_budget(method, fraction):
    network, inputs = build("conv")
    before = {path: layer.weight.numel() for path, layer in network.named_children() if hasattr(layer, "in_channels")}
    step = LowRank(method=method, rank=f"params:{fraction}", targets="Conv2d")
    compress(network, inputs, step)
    for path, dense in before.items():
        after = sum(p.numel() for name, p in network.get_submodule(path).named_parameters() if "weight" in name)
        assert after <= fraction * dense
    network, _ = build("conv")
    macs = count_macs(network, inputs).dense
    linear = 4 * 128 * 10
    compress(network, inputs, LowRank(method=method, rank=f"macs:{fraction}", targets="Conv2d"))
    assert isinstance(network[0], ConvChain)
    assert count_macs(network, inputs).dense - linear <= fraction * (macs - linear)


def test_what_would_not_shrink_stays_untouched_and_that_is_said():
    network, inputs = build("conv")
    state = copy.deepcopy(network.state_dict())
    compressor = compress(network, inputs, LowRank(rank=1.0), batches=[(inputs, torch.zeros(4, dtype=torch.long))])
    assert structure_of(network) == NOTHING
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert "LowRank has factored no layer: no factors were smaller or within the budget" in compressor.piece.notes
    assert any("3: Conv2d as svd of rank 32 would have" in note for note in compressor.piece.notes)


def test_on_the_calibration_data_a_data_aware_layer_is_no_worse():
    """Each layer by itself, because the errors of several may cancel."""
    for path in ("0", "3", "7"):
        network, _ = build("conv")
        inputs = torch.randn(256, 3, 8, 8) * torch.tensor([3.0, 1.0, 0.1])[:, None, None]
        layer = network.get_submodule(path)
        given = []
        handle = layer.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0].detach()))
        network(inputs)
        handle.remove()
        outputs = layer(given[0])
        errors = []
        for aware in (False, True):
            other = copy_network(network)
            step = LowRank(rank=3, targets=path, data_aware=aware, damping=0.0 if aware else None)
            compress(other, inputs, step, batches=[(inputs, None)], bn_batches=0)
            errors.append(float((other.get_submodule(path)(given[0]) - outputs).detach().norm()))
        assert errors[1] <= errors[0] * (1 + 1e-5), path


def test_data_awareness_looks_into_an_encoder_in_eval_mode():
    network, inputs = build("encoder")
    batches = [((inputs,), torch.zeros(4, dtype=torch.long))]
    compress(network, inputs, LowRank(rank=4, data_aware=True, targets="*.linear1"), batches=batches)
    assert isinstance(network.encoder.layers[1].linear1, LowRankLinear)
    with pytest.raises(InputError, match="needs calibration data"):
        compress(build("encoder")[0], inputs, LowRank(rank=4, data_aware=True))


class Odd(nn.Module):
    """A grouped convolution, tied weights, and one too small for a budget."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 24)
        self.big = nn.Linear(24, 96)
        self.small = nn.Linear(96, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=4)
        self.back = nn.Linear(96, 24)
        self.out = nn.Linear(24, 30, bias=False)
        self.out.weight = self.table.weight

    def forward(self, index):
        hidden = self.big(self.table(index))
        self.small(hidden)
        return self.out(self.back(hidden))


def test_what_cannot_be_factored_is_left_out_with_its_reason_or_refused_where_it_is_named():
    inputs = torch.arange(6)
    network = Odd()
    compressor = compress(network, inputs, LowRank(rank="params:0.4"))
    assert type(network.big) is type(network.back) is LowRankLinear
    assert type(network.small) is nn.Linear
    assert type(network.grouped) is nn.Conv2d
    assert network.out.weight is network.table.weight
    notes = "\n".join(compressor.piece.notes)
    assert "table: shares a weight with out.weight: left as it is" in notes
    assert "small: a budget of 76.8 is below the 98 of rank 1" in notes
    assert "grouped: a convolution with groups=4 cannot be factored" in notes
    for target, message in (
        ("out", "'out' shares a weight with 'table.weight'"),
        ("small", "small: a budget of 76.8 is below"),
        ("grouped", "grouped: a convolution with groups=4"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            compress(Odd(), inputs, LowRank(rank="params:0.4", targets=target))
        assert "\n" not in str(caught.value)


def test_attention_is_converted_where_one_asks_for_it():
    network, inputs = build("encoder")
    expected = network(inputs)
    with pytest.raises(InputError, match="targets '\\*self_attn\\*' matches none"):
        compress(copy.deepcopy(network), inputs, LowRank(rank=4, targets="*self_attn*"))
    compress(network, inputs, LowRank(rank=1.0, convert_attention=True, targets="*linear1"))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in network.modules())
    torch.testing.assert_close(network(inputs), expected)
    rebuilt = rebuilt_of("encoder", network)
    assert torch.equal(rebuilt(inputs), network(inputs))


def test_a_step_that_covers_little_refuses():
    network = nn.Sequential(nn.Bilinear(8, 8, 50), nn.Linear(50, 4))
    with pytest.raises(
        InputError, match="LowRank would work on only 6% of Sequential's weights: name the layers in targets to"
    ):
        compress(network, torch.ones(2, 8), LowRank(rank=1))
    compress(network, torch.ones(2, 8), LowRank(rank=1, targets="Linear"))
    assert type(network[1]) is LowRankLinear


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM])
def test_a_network_that_is_one_layer_cannot_be_factored(kind):
    for targets in (None, kind.__name__):
        with pytest.raises(InputError, match=f"the network itself is a {kind.__name__}: put it into another module"):
            compress(kind(8, 8), torch.ones(2, 3, 8), LowRank(rank=1, targets=targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 2, "method": "svg"}, "method must be one of svd"),
        ({"rank": 2, "method": {}}, "method is empty"),
        ({"rank": 2, "method": {"Conv9d": "svd"}}, "class in method must be one of .*, got 'Conv9d'"),
        ({"rank": 2, "method": {"LSTM": "cp"}}, "method of LSTM must be one of svd"),
        ({"rank": 2, "parts": 1}, "parts must be at least 2"),
        ({"rank": 2, "parts": 4}, "parts is for method 'tt'"),
        ({"rank": 2, "parts": 4, "method": {"Conv2d": "tt", "Linear": "svd"}}, "parts is for method 'tt'"),
        ({"rank": 2, "damping": 0.1}, "damping is for data_aware=True"),
        ({"rank": 2, "damping": -5, "data_aware": True}, "damping must not be negative, got -5"),
        ({"rank": 2, "method": "cp", "data_aware": True}, "data_aware=True is for method 'svd'"),
    ],
)
def test_wrong_options_of_low_rank_are_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        LowRank(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_train_in_a_plain_loop(name):
    network, inputs = build(name)
    targets = network(inputs).detach().argmax(-1)
    compressor = Compressor(network, [LowRank(rank=0.3, finetune_epochs=1)], inputs, epochs=2)
    optimizer, losses, start = torch.optim.Adam(network.parameters(), 0.01), [], None
    for epoch in range(2):
        if compressor.begin_epoch(epoch, steps_per_epoch=15, optimizer=optimizer):
            optimizer = torch.optim.Adam(network.parameters(), 0.01)
            start = {key: value.clone() for key, value in network.state_dict().items()}
        for _ in range(15):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
            losses.append(float(loss.detach()))
    assert losses[14] < losses[0]
    assert any(not torch.equal(start[key], value) for key, value in network.state_dict().items() if ".1.weight" in key)


# TieLayers


def test_tied_layers_are_one_after_everything():
    network, inputs = build("encoder")
    before = count_parameters(network).stored
    one = sum(parameter.numel() for parameter in network.encoder.layers[0].parameters())
    compressor = compress(network, inputs, TieLayers(groups=[["encoder.layers.0", "encoder.layers.1"]]))
    assert any(f"has left {before - one:,} parameters of {before:,}" in note for note in compressor.piece.notes)
    for other in (network, copy.deepcopy(network), plain_copy(network), rebuilt_of("encoder", network)):
        assert other.encoder.layers[0] is other.encoder.layers[1]
        assert count_parameters(other).stored == before - one
        assert torch.equal(other(inputs), network(inputs))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(inputs).square().mean().backward()
    optimizer.step()
    assert network.encoder.layers[0].linear1.weight is network.encoder.layers[1].linear1.weight


def test_the_mean_of_tied_layers_is_that_of_their_weights():
    network, inputs = build("encoder")
    first, second = (layer.linear1.weight.detach().clone() for layer in network.encoder.layers)
    compress(network, inputs, TieLayers(groups=[["encoder.layers.0", "encoder.layers.1"]], init="mean"))
    torch.testing.assert_close(network.encoder.layers[1].linear1.weight.detach(), (first + second) / 2)


def test_wrong_ties_are_one_line():
    with pytest.raises(InputError, match="groups is empty"):
        TieLayers(groups=[])
    with pytest.raises(InputError, match="init must be"):
        TieLayers(groups=[["a", "b"]], init="last")
    network, inputs = build("encoder")
    with pytest.raises(InputError, match="has no layer 'encoder.layers.7'"):
        compress(network, inputs, TieLayers(groups=[["encoder.layers.0", "encoder.layers.7"]]))


# The structure


def rebuilt_of(name, network):
    """From another start, by way of JSON and a strictly loaded state dict."""
    description = json.loads(json.dumps(structure_of(network)))
    rebuilt = rebuild_structure(build(name, seed=1)[0], description)
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    assert structure_of(rebuilt) == description
    return rebuilt


@torch.no_grad()
def frozen_outputs(network, inputs):
    """Products with a weight that learns take another kernel in PyTorch, even where no graph is built."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network(inputs)


TIE = {"groups": [["encoder.layers.0", "encoder.layers.1"]]}
CHANGES = {
    "factored": lambda: [LowRank(rank=0.25, only_if_smaller=False)],
    "shrunk, factored": lambda: [Shrink(), LowRank(rank=0.25, targets="*")],
    "factored, shrunk": lambda: [LowRank(rank=0.25, targets="Conv2d"), Shrink()],
    "shrunk, factored, shrunk": lambda: [Shrink(), LowRank(rank=0.25, targets="Conv2d"), Shrink()],
    "converted": lambda: [LowRank(rank=0.25, convert_attention=True)],
    "tied": lambda: [TieLayers(**TIE)],
    "tied, factored": lambda: [TieLayers(**TIE), LowRank(rank=0.25)],
    "factored, tied": lambda: [LowRank(rank=0.25), TieLayers(**TIE)],
    "converted, tied, shrunk": lambda: [
        LowRank(rank=0.25, convert_attention=True, targets="*_proj"), TieLayers(**TIE), Shrink()
    ],
    "tied, shrunk, factored": lambda: [TieLayers(**TIE), Shrink(), LowRank(rank=0.25, targets="*linear?")],
}  # fmt: skip
ONLY = {
    "factored, shrunk": ["conv"],
    "shrunk, factored, shrunk": ["conv"],
    **{key: ["encoder"] for key in CHANGES if "tied" in key or "converted" in key},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"), [(change, name) for change in CHANGES for name in ONLY.get(change, NETWORKS)]
)
@pytest.mark.parametrize("values", [None, "shared", "frozen", "hashed"])
def test_a_network_is_rebuilt_bit_for_bit(change, name, values):
    network, inputs = build(name)
    more = {
        None: [],
        "shared": [ShareWeights(k=8)],
        "frozen": [ShareWeights(k=8, finetune=False)],
        "hashed": [HashShare(ratio=4, targets="*", exclude="embedding" if name == "language" else ())],
    }[values]
    compress(network, inputs, *CHANGES[change](), *more)
    rebuilt = rebuilt_of(name, network)
    assert count_parameters(rebuilt) == count_parameters(network)
    frozen = [parameter.requires_grad for parameter in rebuilt.parameters()]
    assert frozen == [parameter.requires_grad for parameter in network.parameters()]
    plain = plain_copy(rebuilt)
    assert not is_computed(plain)
    again = rebuild_structure(build(name, seed=2)[0], plain_structure(structure_of(rebuilt))).eval()
    again.load_state_dict(plain.state_dict(), strict=True)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    expected = frozen_outputs(network, inputs)
    for other in (rebuilt, copy_network(network), plain, again):
        assert torch.equal(frozen_outputs(other, inputs), expected)


def test_baking_a_copy_leaves_the_network_its_weights():
    """`copy.deepcopy` has both share the class that has the computed weights as properties."""
    network, inputs = build("conv")
    compress(network, inputs, ShareWeights(k=8))
    expected = network(inputs)
    for copied in (copy_network(network), copy.deepcopy(network)):
        bake(copied)
        assert torch.equal(copied(inputs), expected)
        assert torch.equal(network(inputs), expected)
    other = copy_network(network)
    bake(network)
    assert torch.equal(other(inputs), expected)


def test_factored_feed_forward_layers_cannot_be_shrunk():
    network, inputs = build("encoder")
    with pytest.raises(
        InputError, match="linear1 of TransformerEncoderLayer is LowRankLinear, .* before it is factored"
    ):
        compress(network, inputs, LowRank(rank=0.25), Shrink())


def test_steps_are_read_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--steps", type=list[Step])
    config = """
    - class_path: distill_lightning.compression.steps.TieLayers
      init_args: {groups: [[encoder.layers.0, encoder.layers.1]], init: mean}
    - class_path: distill_lightning.compression.steps.LowRank
      init_args: {method: {Linear: svd}, rank: "params:0.5", targets: ["*.linear?", head], at: 0.5, finetune_epochs: 2}
    - class_path: distill_lightning.compression.steps.ShareWeights
      init_args: {k: {Linear: 8}, exclude: head}
    - class_path: distill_lightning.compression.steps.HashShare
      init_args: {ratio: 4, targets: head}
    """
    steps = parser.instantiate_classes(parser.parse_args([f"--steps={config}"])).steps
    assert [type(step) for step in steps] == [TieLayers, LowRank, ShareWeights, HashShare]
    assert steps[1].method == {"Linear": "svd"}
    assert (steps[1].rank, steps[1].at, steps[2].k) == ("params:0.5", 0.5, {"Linear": 8})
    assert parser.parse_args(["--steps+=LowRank", "--steps.rank=3"]).steps[0].init_args.rank == 3
