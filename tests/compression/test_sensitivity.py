"""What each layer loses alone, and the amounts that follow."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.mask.sensitivity import amounts_within, scan
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.values.allocation import allocate_bits
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme

LAYERS = ["0.weight", "2.weight", "4.weight"]
LEVELS = [0.25, 0.5, 0.75, 1.0]
IMAGES = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def closeness(reference):
    """Minus the mean squared distance from what another network gives."""
    wanted = reference.eval()(IMAGES).detach()

    def evaluate(network):
        with torch.no_grad():
            return -float((network.eval()(IMAGES) - wanted).square().mean())

    return evaluate


def naive_pruned(weight, amount):
    flat = weight.detach().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda place: abs(flat[place]))
    for place in order[: round(amount * len(flat))]:
        flat[place] = 0.0
    return torch.tensor(flat, dtype=weight.dtype).reshape(weight.shape)


def prune_lowest(network, path, amount):
    weight = network.get_parameter(path)
    weight.data.copy_(naive_pruned(weight, amount))


def test_curves_are_those_of_a_naive_loop():
    network = build()
    evaluate = closeness(build())
    curves = scan(network, LAYERS, LEVELS, change=prune_lowest, evaluate=evaluate)
    assert list(curves) == LAYERS
    for layer in LAYERS:
        assert list(curves[layer]) == LEVELS
        for level in LEVELS:
            changed = build()
            changed.get_parameter(layer).data.copy_(naive_pruned(changed.get_parameter(layer), level))
            assert curves[layer][level] == evaluate(changed)


def test_the_network_and_the_random_states_are_left_as_they_were():
    network = build()
    network(IMAGES).sum().backward()
    network[0].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    objects = [id(parameter) for parameter in network.parameters()]
    draws = []

    def evaluate(copied):
        copied.train()
        draws.append((float(torch.rand(())), random.random(), np.random.rand()))  # noqa: NPY002
        with torch.no_grad():
            return float(copied(IMAGES).sum())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    first = scan(network, LAYERS, LEVELS, change=prune_lowest, evaluate=evaluate)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])  # noqa: NPY002
    assert len(set(draws)) == 1
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    assert [module.training for module in network.modules()] == modes
    assert [id(parameter) for parameter in network.parameters()] == objects
    # Every evaluation drew the same dropout, so the order of the layers says nothing.
    backwards = scan(network, LAYERS[::-1], LEVELS[::-1], change=prune_lowest, evaluate=evaluate)
    assert backwards == first


def test_an_evaluation_that_fails_gives_the_random_state_back():
    def evaluate(network):
        torch.rand(3)
        raise RuntimeError("no data")

    network = build()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no data"):
        scan(network, LAYERS, LEVELS, change=prune_lowest, evaluate=evaluate)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_planted_useless_layer_gets_the_largest_amount():
    class Planted(nn.Module):
        """A branch whose outgoing weights are zero, beside one that matters."""

        def __init__(self):
            super().__init__()
            self.used, self.useless = nn.Linear(6, 20), nn.Linear(6, 20)
            self.out, self.nothing = nn.Linear(20, 3), nn.Linear(20, 3, bias=False)
            nn.init.zeros_(self.nothing.weight)

        def forward(self, images):
            return self.out(self.used(images).relu()) + self.nothing(self.useless(images).relu())

    torch.manual_seed(0)
    network = Planted()
    layers = ["used.weight", "useless.weight", "out.weight", "nothing.weight"]
    levels = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    evaluate = closeness(copy.deepcopy(network))
    curves = scan(network, layers, levels, change=prune_lowest, evaluate=evaluate)
    assert set(curves["useless.weight"].values()) == set(curves["nothing.weight"].values()) == {0.0}
    counts = {layer: network.get_parameter(layer).numel() for layer in layers}
    for options in ({"max_drop": 0.0}, {"max_drop": 1e-3}, {"target": 0.55}):
        amounts = amounts_within(curves, counts, dense=evaluate(network), **options)
        assert amounts["useless.weight"] == amounts["nothing.weight"] == 1.0
        assert amounts["used.weight"] < 1
        assert amounts["out.weight"] < 1


def test_bits_are_levels_too_and_give_what_allocate_bits_takes():
    network = build()

    def change(copied, layer, bits):
        quantize_weights(copied.get_submodule(layer), scheme=Scheme(int(bits)))

    evaluate = closeness(build())
    curves = scan(network, ["0", "2", "4"], [2, 4, 8], change=change, evaluate=evaluate)
    for layer in curves:
        assert curves[layer][8] > curves[layer][4] > curves[layer][2]
    counts = {layer: network.get_submodule(layer).weight.numel() for layer in curves}
    errors = {layer: {int(bits): -score for bits, score in scores.items()} for layer, scores in curves.items()}
    chosen = allocate_bits(errors, counts, budget=sum(counts.values()) // 2)
    assert set(chosen) == set(curves)


# Amounts


CURVES = {
    "a": {0.2: 0.90, 0.5: 0.88, 0.8: 0.70},
    "b": {0.2: 0.91, 0.5: 0.60, 0.8: 0.10},
    "c": {0.2: 0.50, 0.5: 0.89, 0.8: float("nan")},
}
COUNTS = {"a": 100, "b": 1000, "c": 10}


def naive_amounts(drop, curves=CURVES, dense=0.9):
    amounts = {}
    for layer, levels in curves.items():
        amounts[layer] = 0.0
        for level, score in levels.items():
            if dense - score <= drop and level > amounts[layer]:
                amounts[layer] = level
    return amounts


def share(amounts, counts):
    return sum(counts[layer] * amounts[layer] for layer in counts) / sum(counts.values())


def test_amounts_are_the_largest_levels_within_the_drop():
    assert amounts_within(CURVES, COUNTS, dense=0.9, max_drop=0.05) == {"a": 0.5, "b": 0.2, "c": 0.5}
    assert amounts_within(CURVES, COUNTS, dense=0.9, max_drop=0.0) == {"a": 0.2, "b": 0.2, "c": 0.0}
    assert amounts_within(CURVES, COUNTS, dense=0.9, max_drop=-0.005) == {"a": 0.0, "b": 0.2, "c": 0.0}
    # A score that is NaN is never within.
    assert amounts_within(CURVES, COUNTS, dense=0.9, max_drop=float("inf")) == {"a": 0.8, "b": 0.8, "c": 0.5}
    for drop in np.linspace(-0.1, 1, 100).tolist():
        assert amounts_within(CURVES, COUNTS, dense=0.9, max_drop=drop) == naive_amounts(drop)


def test_a_target_takes_the_smallest_drop_that_reaches_it():
    generator = np.random.default_rng(0)
    for trial, target in itertools.product(range(20), (0.0, 0.1, 0.35, 0.5, 0.65, 0.8)):
        dense = 0.9
        curves = {
            name: {level: dense - float(generator.normal(level**2 / 3, 0.05)) for level in (0.1, 0.3, 0.5, 0.7, 0.9)}
            for name in "abcd"
        }
        counts = {name: int(generator.integers(1, 1000)) for name in "abcd"}
        found = amounts_within(curves, counts, dense=dense, target=target)
        assert share(found, counts) >= target, trial
        # Among all drops of the curves, tried one after another, no smaller one is enough.
        drops = sorted(dense - score for levels in curves.values() for score in levels.values())
        enough = [naive_amounts(drop, curves, dense) for drop in [-np.inf, *drops]]
        wanted = next(amounts for amounts in enough if share(amounts, counts) >= target)
        assert found == wanted


def test_larger_targets_and_drops_never_give_any_layer_less():
    for option, values in (("max_drop", np.linspace(0, 1, 30)), ("target", np.linspace(0, 0.79, 30))):
        found = [amounts_within(CURVES, COUNTS, dense=0.9, **{option: float(value)}) for value in values]
        for smaller, larger in itertools.pairwise(found):
            assert all(smaller[layer] <= larger[layer] for layer in CURVES)


def test_what_cannot_be_scanned_or_reached_is_one_line():
    network = build()
    options = {"change": prune_lowest, "evaluate": lambda _: 0.0}
    for action, words in (
        (lambda: scan(network, [], LEVELS, **options), "layers"),
        (lambda: scan(network, ["0.weight", "0.weight"], LEVELS, **options), "layers"),
        (lambda: scan(network, LAYERS, [], **options), "levels"),
        (lambda: scan(network, LAYERS, [0.5, 0.5], **options), "levels"),
        (lambda: Sensitivity(max_drop=0.1, target=0.1), "either max_drop or target"),
        (lambda: Sensitivity(target=1.1), "between 0 and 1"),
        (lambda: amounts_within(CURVES, COUNTS, dense=0.9, target=0.9), "out of reach.* 0.797"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            action()
        assert "\n" not in str(refused.value)


def test_a_loss_that_is_not_finite_is_refused():
    network, batches = build(), [(torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.long))]
    piece = Workpiece(network, batches[0][0], draw=lambda: batches)
    with pytest.raises(InputError, match="scope Sensitivity: the loss on the calibration data is nan"):
        Sensitivity(max_drop=0.1).amounts(piece, COUNTS, prune_lowest)
