"""The step that trains with a penalty: what is added to the gradient, and what is pruned in the end."""

import copy

import jsonargparse
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.shrink import axes
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.steps import (
    L0,
    LearnMask,
    Order,
    PruneUnits,
    PruneWeights,
    Regularise,
    Sensitivity,
    Step,
)
from distill_lightning.compression.steps.schedules import Cubic, Iterative
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of
from distill_lightning.networks import SmallResNet


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DATA = [(drawn(6, 1, 6, 6, seed=seed), torch.arange(6) % 3) for seed in range(2)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.lstm(inputs.flatten(1, 2))[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.layer(inputs.flatten(1, 2)).mean(1))


NETWORKS = {"cnn": lambda: SmallResNet(3, width=4), "lstm": Recurrent, "transformer": Attending}
MATRICES = [name for name, parameter in NETWORKS["cnn"]().named_parameters() if parameter.dim() > 1]


def build(kind="cnn"):
    torch.manual_seed(2)
    return NETWORKS[kind]()


def make(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def train(network, *steps, epochs, make=make, **options):
    compressor = Compressor(network, steps, DATA[0][0], epochs=epochs, batches=DATA, **options)
    optimizer = make(network.parameters())
    network.train()
    for epoch in range(epochs):
        if compressor.begin_epoch(epoch, steps_per_epoch=2, optimizer=optimizer):
            optimizer = make(network.parameters())
        for inputs, targets in DATA:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
    compressor.finish()
    return compressor


def naive_penalty(penalty, network):
    if penalty == "l1":
        return sum(network.get_parameter(name).abs().sum() for name in MATRICES)
    if penalty == "bn_gamma":
        return sum(m.weight.abs().sum() for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    return sum(row.norm() * row.numel() ** 0.5 for name in MATRICES for row in network.get_parameter(name).flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["l1", "group_lasso", "bn_gamma"])
def test_the_weighted_penalty_is_added_to_the_gradient(penalty):
    network, other = build(), build()
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01)  # noqa: E731  # as short as it is
    train(network, Regularise(penalty=penalty, weight=0.3, finetune_epochs=1), epochs=2, make=sgd, bn_batches=0)
    optimizer = sgd(other.parameters())
    for epoch in range(2):
        for inputs, targets in DATA:
            optimizer.zero_grad()
            loss = F.cross_entropy(other(inputs), targets)
            (loss + (0.3 * naive_penalty(penalty, other) if epoch == 0 else 0)).backward()
            optimizer.step()
    for name, value in other.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), value, atol=1e-5, rtol=1e-4)


def selection_groups(network, groups):
    """The same groups, unit by unit: parameters, dimensions and indices."""
    told = {}
    for group in groups:
        units = []
        for unit in range(group.size):
            parts = []
            for member in group.members:
                for tensor, dim, positions in axes.slices(network.get_submodule(member.path), member.axis):
                    name = f"{member.path}.{tensor}"
                    if name in dict(network.named_parameters()):
                        own = (member.channels[positions] == unit).nonzero().flatten().tolist()
                        parts += [(name, dim, torch.tensor(own))] if own else []
            units.append(parts)
        told[group.name] = units
    return told


def naive_group_lasso(network, groups):
    total = 0.0
    for units in groups.values():
        for parts in units:
            entries = torch.cat([network.get_parameter(n).index_select(dim, own).flatten() for n, dim, own in parts])
            total += entries.norm() * len(entries) ** 0.5
    return total


def test_group_lasso_of_channels_is_that_of_every_group():
    network = build()
    step = Regularise(penalty="group_lasso", granularity="channel", weight=2.0, finetune_epochs=1)
    compressor = Compressor(network, [step], DATA[0][0], epochs=1)
    compressor.begin_epoch(0, steps_per_epoch=2)
    groups = selection_groups(network, channel_groups(network, DATA[0][0]))
    wanted = 2.0 * naive_group_lasso(network, groups)
    torch.testing.assert_close(compressor.penalty(), wanted)
    weight = network.stage2[0].conv1.weight
    given, expected = (torch.autograd.grad(value, weight)[0] for value in (compressor.penalty(), wanted))
    torch.testing.assert_close(given, expected)
    with torch.no_grad():  # a unit that is zero everywhere
        for parts in groups["stage1.0.conv1"][:1]:
            for name, dim, own in parts:
                network.get_parameter(name).index_fill_(dim, own, 0)
    assert torch.autograd.grad(compressor.penalty(), network.stage1[0].conv1.weight)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_l1_prunes_what_falls_below_the_threshold_exactly(kind):
    network = build(kind)
    step = Regularise(penalty="l1", weight=0.05, threshold=0.05, finetune_epochs=5)
    compressor = train(network, step, epochs=5)
    assert 0.1 < compressor.masks.sparsity() < 1
    for path, kept in compressor.masks.kept.items():
        weight = network.get_parameter(path)
        assert (weight[~kept] == 0).all()
        assert (weight[kept].abs() >= 0.05).sum() >= kept.sum() - 1  # each matrix keeps its best weight
    weaker = train(build(kind), Regularise(penalty="l1", weight=0.0, threshold=0.05, finetune_epochs=5), epochs=5)
    assert weaker.masks.sparsity() < 0.8 * compressor.masks.sparsity()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [("cnn", "channel"), ("lstm", "hidden_unit"), ("transformer", "head"), ("transformer", "neuron")],
)
def test_group_lasso_empties_units_which_then_leave(kind, granularity):
    network = build(kind)
    step = Regularise(penalty="group_lasso", granularity=granularity, weight=0.02, threshold=0.15, finetune_epochs=8)
    train(network, step, epochs=8)
    assert sum(p.numel() for p in network.parameters()) < 0.9 * sum(p.numel() for p in build(kind).parameters())
    again = rebuild_structure(build(kind), structure_of(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(DATA[0][0]), network.eval()(DATA[0][0]))
    assert step.order is Order.STRUCTURE


def test_rows_of_small_weights_are_masked():
    network = build("lstm")
    step = Regularise(penalty="group_lasso", weight=0.05, threshold=0.1, finetune_epochs=8)
    compressor = train(network, step, epochs=8)
    assert 0 < compressor.masks.sparsity() < 1
    for path, kept in compressor.masks.kept.items():
        assert ((kept.sum(1) == 0) | (kept.sum(1) == kept.shape[1])).all()
        means = network.get_parameter(path).abs().mean(1)
        assert (means[kept[:, 0]] >= 0.1).sum() >= kept[:, 0].sum() - 1


@pytest.mark.slow
def test_slimming_removes_channels_of_small_scale():
    network = build()
    step = Regularise(penalty="bn_gamma", weight=0.2, threshold=0.85, targets=["*.conv1"], finetune_epochs=5)
    train(network, step, epochs=5)
    left = [block[0].conv1.out_channels for block in (network.stage1, network.stage2, network.stage3)]
    assert sum(left) < 28
    assert all(scale >= 0.85 for block in (network.stage1, network.stage2, network.stage3)
               for scale in block[0].norm1.weight.abs() if len(block[0].norm1.weight) > 1)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("per", ["weight", "row"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_l0_gates_close_and_leave_masks(kind, per):
    network = build(kind)
    names = [name for name, _ in network.named_parameters()]
    step = LearnMask(L0(5.0, per=per), finetune_epochs=60)
    before = {}

    def watch(moment, _):
        if moment == "before":
            before["gates"] = copy.deepcopy(structure_of(network)["layers"])

    compressor = train(network, step, epochs=60, watch=watch, make=lambda p: torch.optim.Adam(p, lr=0.05))
    assert [name for name, _ in network.named_parameters()] == names
    assert before["gates"]
    assert structure_of(network)["layers"] == {}
    assert 0.5 < compressor.masks.sparsity() <= 1
    for path, kept in compressor.masks.kept.items():
        assert network.get_parameter(path)[~kept].count_nonzero() == 0
        if per == "row":
            assert ((kept.flatten(1).sum(1) == 0) | kept.flatten(1).all(1)).all()


@pytest.mark.slow
def test_weight_zero_is_ordinary_training_bit_for_bit():
    plain = build()
    train(plain, epochs=2)
    penalties = [Regularise(penalty=name, weight=0.0, finetune_epochs=2) for name in ("l1", "group_lasso", "bn_gamma")]
    for step in (*penalties, LearnMask(L0(0.0), finetune_epochs=2)):
        network = build()
        train(network, step, epochs=2)
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        Regularise(penalty="l1", weight=0.05, finetune_epochs=4),
        LearnMask(L0(0.05), finetune_epochs=4),
        Regularise(penalty="bn_gamma", weight=0.05, finetune_epochs=4),
    ],
    ids=lambda step: step.title,
)
def test_a_run_that_was_killed_goes_on(step):
    def begun():
        network = build()
        return network, Compressor(network, [step], DATA[0][0], epochs=4, batches=DATA)

    def go_on(network, compressor, optimizer, epochs):
        network.train()
        for epoch in epochs:
            torch.manual_seed(epoch)  # of the gates
            if compressor.begin_epoch(epoch, steps_per_epoch=2, optimizer=optimizer):
                optimizer = make(network.parameters())
            for inputs, targets in DATA:
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()
                compressor.before_optimizer_step()
                optimizer.step()
                compressor.after_optimizer_step(optimizer)
        return optimizer

    network, whole = begun()
    go_on(network, whole, make(network.parameters()), range(4))
    whole.finish()
    partly, first = begun()
    optimizer = go_on(partly, first, make(partly.parameters()), range(2))
    resumed, second = begun()
    rebuild_structure(resumed, structure_of(partly)).load_state_dict(partly.state_dict())
    second.load_state_dict(first.state_dict())
    moments = make(resumed.parameters())
    moments.load_state_dict(optimizer.state_dict())
    go_on(resumed, second, moments, range(2, 4))
    second.finish()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "l2", "weight": 1.0}, "penalty must be one of l1"),
        ({"penalty": "l1", "weight": -1.0}, "must not be negative"),
        ({"penalty": "l1", "weight": 1.0, "granularity": "channel"}, "needs granularity weight"),
        ({"penalty": "group_lasso", "weight": 1.0, "granularity": "layer"}, "needs granularity row or channel"),
        ({"penalty": "l0", "weight": 1.0}, "penalty must be one of l1"),
        ({"penalty": "l1", "weight": 1.0, "threshold": -0.1}, "Regularise: threshold must not be negative"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        Regularise(**options)
    assert "\n" not in str(caught.value)


def test_it_needs_training_and_something_to_penalise():
    with pytest.raises(InputError, match="a penalty has an effect only while the network trains"):
        Compressor(build(), [Regularise(penalty="l1", weight=0.1)], DATA[0][0]).apply()
    with pytest.raises(InputError, match="has no BatchNorm"):
        train(build("lstm"), Regularise(penalty="bn_gamma", weight=0.1, finetune_epochs=1), epochs=1)
    assert Regularise(penalty="l1", weight=0.1).order is None
    assert LearnMask(L0(0.1)).order is Order.MASKS
    assert Regularise(penalty="l1", weight=0.1, threshold=0.1).order is Order.MASKS
    assert Regularise(penalty="bn_gamma", weight=0.1, threshold=0.1).order is Order.STRUCTURE


def test_steps_are_read_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--steps", type=list[Step])
    text = """
    - class_path: distill_lightning.compression.steps.PruneUnits
      init_args: {amount: {"stage1*": 0.5}, unit: channel, targets: [stage1], at: 0.5, finetune_epochs: 1}
    - class_path: distill_lightning.compression.steps.PruneWeights
      init_args:
        scope: {class_path: distill_lightning.compression.steps.Sensitivity, init_args: {target: 0.5}}
    - class_path: distill_lightning.compression.steps.PruneWeights
      init_args:
        amount: 0.6
        rewind: 2
        schedule: {class_path: distill_lightning.compression.steps.schedules.Iterative, init_args: {rounds: 3}}
    - class_path: distill_lightning.compression.steps.PruneWeights
      init_args:
        amount: 0.6
        schedule: {class_path: distill_lightning.compression.steps.schedules.Cubic, init_args: {every: 5}}
        regrow: 0.1
    - class_path: distill_lightning.compression.steps.Regularise
      init_args: {penalty: l1, weight: 0.001, threshold: 0.01}
    """
    given = parser.parse_args([f"--steps={text}"])
    first, second, third, fourth, fifth = parser.instantiate_classes(given).steps
    assert (first.amount, first.unit, first.at) == ({"stage1*": 0.5}, "channel", 0.5)
    assert isinstance(second.scope, Sensitivity)
    assert (third.rewind, third.schedule.rounds, type(third.schedule)) == (2, 3, Iterative)
    assert (fourth.schedule.every, type(fourth.schedule), fourth.regrow) == (5, Cubic, 0.1)
    assert (type(fifth), fifth.threshold) == (Regularise, 0.01)
    assert [type(step) for step in (first, second, third)] == [PruneUnits, PruneWeights, PruneWeights]
