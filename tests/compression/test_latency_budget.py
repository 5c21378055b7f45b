"""Budgets of time; a clock that the test gives decides what takes how long."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression import Compressor, Cubic, PruneUnits, load_compressed, preview, write_artefact
from distill_lightning.compression.costs.latency import Clocks
from distill_lightning.compression.steps import unit_amounts
from distill_lightning.compression.structure.changes import structure_of

INPUTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Machine:
    """Time that passes only in networks: a second for each of their parameters, and for each call ``overhead``."""

    def __init__(self, overhead=0):
        self.now, self.calls, self.overhead = 0.0, [], overhead

    def build(self):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
        # A bound method would be copied with the network, and the machine with it.
        network.register_forward_pre_hook(lambda module, _: self.work(module))
        return network

    def work(self, network):
        self.calls.append(sizes(network))
        self.now += self.overhead + self.calls[-1]

    def compressor(self, step, **options):
        compressor = Compressor(self.build(), [step], INPUTS, **options)
        compressor.piece.clocks = Clocks(thread=lambda: self.now, wall=lambda: self.now)
        return compressor


def sizes(network):
    # By what the layers say: whatever reads its parameters' sizes while it runs keeps them.
    return sum(layer.out_features * (layer.in_features + 1) for layer in network if isinstance(layer, nn.Linear))


def left(network):
    return [layer.out_features for layer in network if isinstance(layer, nn.Linear)]


@cache
def pruned(count):
    """The network without a number of its 21 channels."""
    return Compressor(Machine().build(), [PruneUnits(amount=count / 21, unit="channel")], INPUTS).apply()


def naive(share, overhead=0):
    """The first of all amounts, from nothing on, whose network takes at most the share of the time, and the network."""
    limit = share * (sizes(pruned(0)) + overhead)
    return next((count / 21, pruned(count)) for count in range(22) if sizes(pruned(count)) + overhead <= limit)


@pytest.mark.parametrize(("share", "overhead"), [(0.5, 0), (0.7, 100), (1.0, 0)])
def test_the_smallest_amount_within_the_time_is_found_and_told(share, overhead):
    machine = Machine(overhead)
    compressor = machine.compressor(PruneUnits(budget=f"latency:{share}", unit="channel"))
    network = compressor.apply()
    amount, wanted = naive(share, overhead)
    assert left(network) == left(wanted)
    (note,) = [note for note in compressor.piece.notes if "latency" in note]
    assert f"amount={amount} is the smallest within the budget 'latency:{share}'" in note
    again = Compressor(machine.build(), [PruneUnits(amount=amount, unit="channel")], INPUTS).apply()
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))


def test_the_networks_take_turns_and_both_are_warmed_up():
    machine = Machine()
    network = machine.compressor(PruneUnits(budget="latency:0.5", unit="channel")).apply()
    dense = sizes(machine.build())
    turns = [pair for pair in zip(machine.calls, machine.calls[1:], strict=False) if pair[0] == dense != pair[1]]
    # The last two are the trial of what was found, in eval mode and in train mode.
    assert len(turns) % 60 == 2
    assert len(turns) >= 120
    assert (dense, sizes(network)) in turns


def test_what_was_found_is_in_the_structure_and_the_file(tmp_path):
    machine = Machine()
    network = machine.compressor(PruneUnits(budget="latency:0.5", unit="channel")).apply()
    (change,) = json.loads(json.dumps(structure_of(network)))["changes"]
    found = {"step": "PruneUnits channel", "budget": "latency:0.5", "amount": naive(0.5)[0]}
    assert change["amounts"] == [found]
    # A further step's entry holds the sizes of both, and what both have found.
    other = PruneUnits(budget="params:0.9", unit="channel")
    Compressor(network, [other], INPUTS).apply()
    (change,) = structure_of(network)["changes"]
    assert [one["budget"] for one in change["amounts"]] == ["latency:0.5", "params:0.9"]
    write_artefact(network, tmp_path / "network.dlpk")
    loaded = load_compressed(tmp_path / "network.dlpk", Machine().build())
    assert structure_of(loaded)["changes"] == [change]
    assert torch.equal(loaded(INPUTS), network.eval()(INPUTS))


def test_under_a_schedule_the_amount_is_that_of_the_beginning():
    machine, steps = Machine(), {"unit": "channel", "schedule": Cubic(), "finetune_epochs": 1}
    networks = []
    for step in (
        PruneUnits(budget="latency:0.5", **steps),
        PruneUnits(amount=naive(0.5)[0], **steps),
    ):
        compressor = machine.compressor(step, epochs=1)
        optimizer = torch.optim.SGD(compressor.network.parameters(), lr=0.5)
        compressor.begin_epoch(0, steps_per_epoch=3, optimizer=optimizer)
        # Whatever else takes time now, nothing is measured again.
        machine.overhead = 10_000
        for _ in range(3):
            optimizer.zero_grad()
            compressor.network(INPUTS).square().sum().backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
        networks.append(compressor.finish())
        machine.overhead = 0
        if step.budget is not None:
            assert any(f"amount={naive(0.5)[0]} is the smallest" in note for note in compressor.piece.notes)
    first, second = networks
    assert sizes(first) < sizes(machine.build())
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_an_amount_that_is_found_again_in_the_end_counts_what_has_left():
    machine = Machine()
    step = PruneUnits(budget="params:0.5", unit="channel", schedule=Cubic(end=0.5), finetune_epochs=1)
    compressor = machine.compressor(step, epochs=1)
    compressor.begin_epoch(0, steps_per_epoch=2)
    for _ in range(2):
        compressor.after_optimizer_step()
    network = compressor.finish()
    amount, wanted = naive(0.5)
    assert left(network) == left(wanted)
    assert any(f"amount={amount} is the smallest" in note for note in compressor.piece.notes)


def test_a_time_out_of_reach_says_how_much_is_left():
    message = r"budget 'latency:0.1' cannot be met: .* one channel left in each of 2 layers the network still takes 0.8"
    with pytest.raises(InputError, match=message):
        Machine(1000).compressor(PruneUnits(budget="latency:0.1", unit="channel")).apply()


def test_a_preview_says_what_would_be_enough(monkeypatch):
    monkeypatch.setattr(unit_amounts, "time_share", lambda before, after, _, **__: sizes(after) / sizes(before))
    machine = Machine()
    shown = preview(machine.build(), PruneUnits(budget="latency:0.5", unit="channel"), INPUTS)
    amount, wanted = naive(0.5)
    assert any(f"amount={amount} is the smallest" in note for note in shown.notes)
    assert [len(one.gone) for one in shown.units] == [12 - left(wanted)[0], 9 - left(wanted)[1]]
