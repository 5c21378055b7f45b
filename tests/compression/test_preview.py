"""What steps would take out of a network, without touching it."""

import copy

import pytest
import torch
from torch import nn

from distill_lightning import InputError, SmallCNN
from distill_lightning.compression import (
    L0,
    Compressor,
    Cubic,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    ShareWeights,
    SoftMovement,
    Threshold,
    TieLayers,
    preview,
)
from distill_lightning.compression.access.computed import computed_in
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CHANNELS = PruneUnits(unit="channel", amount=0.5, scope="layer")


def batches():
    return [(IMAGES, torch.tensor([0, 1]))]


def rows_of(network, *steps, **options):
    return {row.layer: row for row in preview(network, steps, IMAGES, **options).rows}


@pytest.mark.parametrize(
    "step",
    [
        CHANNELS,
        PruneWeights(amount=0.9),
        PruneWeights(amount=0.9, schedule=Cubic(), finetune_epochs=3),
        LowRank(rank="params:0.5"),
        LearnMask(Movement(0.5), finetune_epochs=2),
        ShareWeights(k=4),
        Quantize(weight_bits=4, act_bits=8),
    ],
    ids=lambda step: step.title,
)
def test_nothing_is_touched(step):
    torch.manual_seed(1)
    network = SmallCNN(10)
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    preview(network, step, IMAGES, batches=batches())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert list(network.state_dict()) == list(before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_counts_are_those_of_the_compressed_network():
    network = SmallCNN(10)
    steps = [CHANNELS, LowRank(rank="params:0.5", targets="features.*")]
    shown = preview(network, steps, IMAGES)
    dense = sum(row.macs[0] for row in shown.rows)
    one = IMAGES[:1]
    compressed = copy.deepcopy(network)
    Compressor(compressed, steps, IMAGES).apply()
    assert dense == count_macs(network, one).dense
    assert sum(row.macs[1] for row in shown.rows) == count_macs(compressed, one).dense
    norms = sum(p.numel() for m in compressed.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(row.parameters[1] for row in shown.rows) == count_parameters(compressed).stored - norms


def test_layers_are_told_before_and_after():
    rows = rows_of(SmallCNN(10), CHANNELS)
    assert (rows["features.0"].before, rows["features.0"].after) == ("Conv2d 24x1x3x3", "Conv2d 12x1x3x3")
    assert rows["features.0"].parameters == (216, 108)
    assert rows["head"].after == "Linear 10x48"
    assert rows_of(SmallCNN(10), PruneWeights(amount=0.75, scope="layer"))["head"].after == "Linear 10x96 75% zeros"
    assert rows_of(SmallCNN(10), Quantize(weight_bits=4))["head"].after == "Linear 10x96 4 bit"
    rows = rows_of(SmallCNN(10), LowRank(rank=3, targets="head", method="svd"))
    assert (rows["head"].after, rows["head"].parameters) == ("LowRankLinear 3x96 10x3", (970, 10 + 3 * 106))


class Softmaxed(nn.Module):
    """Channels that meet an operation which no channel may leave, tied weights, and a shared first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.free = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, images):
        return self.head(self.free(self.second(self.first(images)).softmax(1)).relu().flatten(1))


def test_what_is_left_alone_has_its_reason():
    rows = rows_of(Softmaxed(), PruneUnits(unit="channel", amount=0.5))
    assert rows["second"].reason == "its channels stay: they go through softmax()"
    assert rows["head"].after == "Linear 3x12"
    rows = rows_of(SmallCNN(10), PruneWeights(amount=0.5, targets="head"))
    assert rows["features.0"].reason == "not among the targets"
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 1))
    assert "groups=2" in rows_of(network, LowRank(rank=1, method="tucker2"))["1"].reason


def test_heads_layers_and_ties_add_up():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 3))
    inputs = torch.randn(2, 5, 8)
    for steps in ([PruneUnits(unit="head", amount=0.5, scope="layer")], [PruneUnits(unit="layer", amount=1 / 3)]):
        shown = preview(network, steps, inputs)
        compressed = copy.deepcopy(network)
        Compressor(compressed, steps, inputs).apply()
        norms = sum(p.numel() for m in compressed.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
        assert sum(row.parameters[1] for row in shown.rows) == count_parameters(compressed).stored - norms
    tied = preview(network, [TieLayers(groups=[["0.layers.0", "0.layers.1"]])], inputs)
    assert any("parameters" in note for note in tied.notes)


def test_missing_data_is_asked_for_and_lottery_tickets_need_no_epoch():
    with pytest.raises(InputError, match="criterion 'taylor' needs calibration data"):
        preview(SmallCNN(10), PruneWeights(amount=0.5, criterion="taylor"), IMAGES)
    ticket = PruneWeights(amount=0.5, rewind=3, finetune_epochs=2)
    assert "zeros" in rows_of(SmallCNN(10), ticket)["features.8"].after
    assert rows_of(SmallCNN(10), PruneWeights(amount=0.5, criterion="taylor"), batches=batches)["head"]


def test_it_prints_as_a_table():
    text = str(preview(SmallCNN(10), [CHANNELS], IMAGES))
    assert text.splitlines()[0].split("  ")[0] == "layer"
    assert "10,368 -> 2,592" in text
    layers, units = text.split("\n\n")
    assert layers.splitlines()[-1].startswith("total")
    assert units.splitlines()[0].startswith("layer")


CHOSEN = "how much is pruned is chosen in training"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (LearnMask(L0(0.01), finetune_epochs=1), CHOSEN),
        (LearnMask(SoftMovement(), finetune_epochs=1), CHOSEN),
        (PruneWeights(schedule=Threshold(0.01), finetune_epochs=1), CHOSEN),
        (PruneUnits(unit="channel", schedule=Threshold(0.01, end=1.0), finetune_epochs=1), CHOSEN),
        (Regularise(penalty="l1", weight=0.1, threshold=0.01, finetune_epochs=1), CHOSEN),
        (Regularise(penalty="bn_gamma", weight=0.1, threshold=0.01, finetune_epochs=1), CHOSEN),
        (Regularise(penalty="l1", weight=0.1, finetune_epochs=1), "trained with a penalty"),
        (Regularise(penalty="bn_gamma", weight=0.1, finetune_epochs=1), "trained with a penalty"),
        (Regularise(penalty="group_lasso", granularity="channel", weight=0.1), "trained with a penalty"),
        (LearnMask(Movement(0.5), finetune_epochs=1), ""),
        (Regularise(penalty="l1", weight=0.0, finetune_epochs=1), "not changed by these steps"),
    ],
)
def test_what_depends_on_the_training_is_told(step, reason):
    torch.manual_seed(0)
    network = SmallCNN(10)
    assert rows_of(network, step)["features.0"].reason == reason
    # A layer that an earlier step has replaced, and those that are not named.
    rows = rows_of(network, LowRank(rank=3, targets="head"), LearnMask(L0(0.01), targets="head.*"))
    assert rows["head"].reason == CHOSEN
    assert rows["features.0"].reason == "not among the targets"


def test_heads_of_a_threshold_depend_on_the_training():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for step in (
        PruneUnits(unit="head", schedule=Threshold(0.01)),
        PruneUnits(unit="head", schedule=Threshold(0.01, end=1.0)),
        Regularise(penalty="group_lasso", granularity="head", weight=0.1),
    ):
        rows = {row.layer: row.reason for row in preview(network, step, torch.randn(2, 5, 8)).rows}
        assert rows["layers.0.self_attn"] == (CHOSEN if isinstance(step, PruneUnits) else "trained with a penalty")
        assert rows["layers.0.linear1"] == "not changed by these steps"


def test_the_units_that_would_leave_are_listed_before_they_leave():
    torch.manual_seed(0)
    network, before = SmallCNN(10), SmallCNN(10)
    before.load_state_dict(network.state_dict())
    shown = preview(network, [CHANNELS], IMAGES)
    compressed = copy.deepcopy(network)
    Compressor(compressed, [CHANNELS], IMAGES).apply()
    assert [one.layer for one in shown.units] == ["features.0", "features.4", "features.8"]
    for one in shown.units:
        stays = [unit for unit in range(one.size) if unit not in one.gone]
        # What the next layer reads of each unit is what has stayed.
        kept = before.get_submodule(one.layer).weight[stays]
        assert compressed.get_submodule(one.layer).weight.shape[0] == len(kept)
        assert torch.equal(compressed.get_submodule(one.layer).weight[:, :1], kept[:, _read(shown, one)][:, :1])
    first = shown.units[0]
    assert (first.unit, first.size, len(first.gone)) == ("channel", 24, 12)
    assert first.others == ("features.1", "features.4")
    lines = shown.units_table()
    assert lines[0] == ["layer", "units", "leave", "which", "with slices of"]
    assert lines[1][:3] == ["features.0", "24 channels", "12"]
    assert str(shown).endswith("features.9, head")
    assert preview(network, [PruneWeights(amount=0.5)], IMAGES).units_table() == []


def _read(shown, one):
    """The input channels that stay of a layer whose own units leave."""
    above = [other for other in shown.units if one.layer in other.others]
    return [unit for unit in range(above[0].size) if unit not in above[0].gone] if above else [0]


def test_heads_neurons_and_layers_are_listed_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for unit, amount, gone in (("head", 0.5, 1), ("neuron", 0.25, 4)):
        shown = preview(network, PruneUnits(unit=unit, amount=amount, scope="layer"), torch.randn(2, 5, 8))
        assert [(one.unit, len(one.gone)) for one in shown.units] == [(unit, gone)] * 3
    (one,) = preview(network, PruneUnits(unit="layer", amount=1 / 3), torch.randn(2, 5, 8)).units
    assert (one.layer, one.size, len(one.gone), one.others) == ("", 3, 1, ())


@pytest.mark.parametrize(
    "mask", [Movement(0.5, scope="layer"), SoftMovement(Threshold(0.5)), L0(0.01), L0(0.01, per="row")]
)
def test_a_learned_mask_shows_what_it_would_take_at_present(mask):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    inputs = torch.randn(2, 6)
    compressor = Compressor(network, [LearnMask(mask, finetune_epochs=2)], inputs, epochs=2)
    compressor.begin_epoch(0, steps_per_epoch=4)
    for entry in computed_in(network).values():
        for learned in entry.parameters():
            nn.init.normal_(learned, std=3)
    compressor.begin_epoch(1, steps_per_epoch=4)
    for _ in range(3):
        compressor.after_optimizer_step()
    before = copy.deepcopy(network.state_dict())
    rows = {row.layer: row for row in preview(network, [], inputs).rows}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    zeros = {"0": network.eval()[0].weight == 0, "2": network[2].weight == 0}
    assert any(zero.any() for zero in zeros.values())
    for path, zero in zeros.items():
        share = float(zero.double().mean())
        assert rows[path].after == (f"{rows[path].before} {share:.0%} zeros" if share else "")
        assert rows[path].reason == "as its learned mask is at present"
    assert rows["0"].before == "Linear 8x6"
    # What comes after the phase is shown on top of it.
    rows = {row.layer: row for row in preview(network, [Quantize(weight_bits=4)], inputs).rows}
    assert rows["0"].after.startswith("Linear 8x6 4 bit")
