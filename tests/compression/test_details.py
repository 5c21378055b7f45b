"""What a report shows of single layers."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning.compression import (
    Compressor,
    LowRank,
    MixedPrecision,
    PruneUnits,
    PruneWeights,
    Quantize,
    Sensitivity,
    ShareWeights,
)
from distill_lightning.compression.report.details import details_of, draw_details


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


INPUTS = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [(INPUTS, torch.arange(32) % 3)]


def compressed(*steps):
    compressor = Compressor(network(), steps, INPUTS, batches=BATCHES)
    compressor.apply()
    return compressor, details_of(compressor.network, compressor.piece, {})


def test_a_dense_network_has_none():
    assert compressed()[1] == {}
    assert draw_details({}) == {}


def test_sensitivity_is_the_loss_with_only_one_layer_pruned():
    levels = [0.25, 0.75]
    _, details = compressed(PruneWeights(scope=Sensitivity(max_drop=0.1, levels=levels)))
    assert list(details["sensitivity"]) == ["0.weight", "2.weight", "4.weight"]
    told = details["sensitivity"]["2.weight"]
    assert told["levels"] == levels
    assert told["dense"] == pytest.approx(float(F.cross_entropy(network()(INPUTS), BATCHES[0][1])))
    pruned = network()
    with torch.no_grad():
        smallest = pruned[2].weight.abs().flatten().argsort()[: round(0.75 * 16 * 12)]
        pruned[2].weight.view(-1)[smallest] = 0
        assert told["losses"][1] == pytest.approx(float(F.cross_entropy(pruned(INPUTS), BATCHES[0][1])))


def test_spectra_are_those_of_the_dense_weights_with_the_chosen_rank():
    _, details = compressed(LowRank(rank=3, targets="2"))
    told = details["spectra"]["2"]
    assert told["rank"] == 3
    assert torch.allclose(torch.tensor(told["values"]), torch.linalg.svdvals(network()[2].weight), atol=1e-5)


def test_shared_values_and_bits():
    _, details = compressed(ShareWeights(k=4))
    told = details["codebook"]["0.weight"]
    assert len(told["levels"]) == 4
    assert sum(told["histogram"]["counts"]) + told["histogram"]["zeros"] == network()[0].weight.numel()
    assert details["bits"]["0.weight"] == {"bits": 2, "size": 128}
    _, details = compressed(Quantize(bits=MixedPrecision(ratio=0.2)))
    assert len({told["bits"] for told in details["bits"].values()}) > 1


def test_a_codebook_keeps_a_histogram_in_which_zeros_are_apart():
    """By hand: each entry is counted in the bin of its place in the range, and pruned ones are not."""
    compressor, details = compressed(PruneWeights(amount=0.75), ShareWeights(k=4))
    pruned = network()[2].weight.detach()
    told = details["codebook"]["2.weight"]["histogram"]
    everything = torch.cat(
        [parameter.flatten() for name, parameter in network().named_parameters() if "weight" in name]
    )
    threshold = everything.abs().quantile(0.75)
    kept = [float(value) for value in pruned.flatten() if abs(value) > threshold]
    low, high = min(kept), max(kept)
    expected = [0] * 80
    for value in kept:
        expected[min(int((value - low) / (high - low) * 80), 79)] += 1
    assert told == {"zeros": pruned.numel() - len(kept), "low": low, "high": high, "counts": expected}
    assert len(json.dumps(details["codebook"])) < 3000
    assert compressor.network[2].weight.count_nonzero() == len(kept)


def test_the_codebook_of_an_earlier_report_is_drawn():
    codebook = {"0.weight": {"weights": [0.0, 0.5, -0.5, 0.25], "levels": [-0.5, 0.0, 0.5]}}
    (axes,) = draw_details({"codebook": codebook})["codebook.png"].axes
    assert axes.get_title() == "0.weight: 3 values, 25% zeros"
    assert sum(bar.get_height() for bar in axes.patches) == 3


def test_details_are_plain_and_drawn():
    _, details = compressed(
        PruneWeights(scope=Sensitivity(max_drop=0.1, levels=[0.25])), Quantize(bits={"*": 4, "0": 2})
    )
    _, factored = compressed(LowRank(rank=3, targets="2"))
    details |= factored | {"sparsity": {"0.weight": [0.0, 0.5, 0.9]}}
    figures = draw_details(json.loads(json.dumps(details)))
    assert set(figures) == {"sparsity.png", "sensitivity.png", "spectra.png", "codebook.png", "bits.png"}
    assert figures["spectra.png"].axes[0].get_legend_handles_labels()[1] == ["2: rank 3 of 12"]


def test_every_step_has_a_figure_of_its_own_levels_and_dense_loss():
    levels = [0.25, 0.5]
    _, details = compressed(
        PruneUnits(unit="channel", scope=Sensitivity(max_drop=0.1, levels=levels)),
        PruneWeights(scope=Sensitivity(max_drop=0.1)),
    )
    figures = draw_details(json.loads(json.dumps(details)))
    first, second = figures["sensitivity.png"].axes[0], figures["sensitivity_2.png"].axes[0]
    units, weights = details["sensitivity"]["0"], details["sensitivity"]["0.weight"]
    assert first.lines[0].get_xdata().tolist() == levels
    assert first.lines[-1].get_ydata()[0] == units["dense"]
    assert second.lines[0].get_xdata().tolist() == weights["levels"] != levels
    assert second.lines[-1].get_ydata()[0] == weights["dense"]
