"""The steps ShareWeights and HashShare, at once and in training."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.access.computed import bake, computed, original_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.steps import HashShare, LowRank, Order, ShareWeights, TrainedStep
from distill_lightning.compression.structure.changes import plain_copy, rebuild_structure, structure_of


def build(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    return network, torch.randn(16, 2, 8, 8)


class Words(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.table = nn.Embedding(40, 16, padding_idx=0)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 40, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(self.rnn(self.table(words))[0])


@dataclass(frozen=True, kw_only=True)
class PruneSome(TrainedStep):
    """A share of each weight, the smallest."""

    order = Order.MASKS

    def act(self, piece):
        kept = {}
        for path in ("0", "3"):
            weight = piece.network.get_parameter(f"{path}.weight").detach()
            kept[f"{path}.weight"] = weight.abs() > weight.abs().quantile(0.75)
        piece.prune(Masks(kept))


def weights_of(network):
    return {
        f"{path}.{name}": getattr(layer, name).detach().clone()
        for path, layer in network.named_modules()
        if "parametrizations" not in path
        for name in weight_names(layer)
    }


def train(compressor, inputs, targets, make, *, epochs, steps=5, watch=None):
    network = compressor.network
    optimizer = make(network.parameters())
    for epoch in range(epochs):
        if compressor.begin_epoch(epoch, steps_per_epoch=steps, optimizer=optimizer):
            optimizer = make(network.parameters())
        if watch:
            watch(epoch, network)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs).flatten(0, -2), targets.flatten()).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
    return compressor.finish()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.002, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", [2, 7, 16])
def test_each_weight_has_k_values_before_and_after_training_and_the_same_members(optimizer, k):
    network, inputs = build()
    compressor = Compressor(network, [ShareWeights(k=k, finetune_epochs=2)], inputs, epochs=3, dense_epochs=1)
    seen = {}

    def watch(epoch, network):
        seen[epoch] = weights_of(network)

    train(compressor, inputs, torch.arange(16) % 5, OPTIMIZERS[optimizer], epochs=3, watch=watch)
    for name, weight in weights_of(network).items():
        assert len(seen[0][name].unique()) > 16
        assert len(seen[1][name].unique()) == len(weight.unique()) == k
        assert not torch.equal(seen[1][name], weight)
        members, before = weight.unique(return_inverse=True)[1], seen[1][name].unique(return_inverse=True)[1]
        pairs = set(zip(before.flatten().tolist(), members.flatten().tolist(), strict=True))
        assert len(pairs) == k


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_zeros_of_pruned_weights_stay_without_masks(optimizer):
    network, inputs = build()
    steps = [PruneSome(finetune_epochs=1), ShareWeights(k=8, finetune_epochs=2)]
    compressor = Compressor(network, steps, inputs, epochs=3)
    zeros = {}

    def watch(epoch, network):
        zeros[epoch] = {name: weight == 0 for name, weight in weights_of(network).items()}

    train(compressor, inputs, torch.arange(16) % 5, OPTIMIZERS[optimizer], epochs=3, watch=watch)
    assert not compressor.masks.kept
    assert any("keeps the zeros of 2 pruned weights" in note for note in compressor.piece.notes)
    for name, weight in weights_of(network).items():
        assert torch.equal(weight == 0, zeros[0][name])
        assert len(weight.unique()) == 8
        assert (int((weight == 0).sum()) == 0) == (name == "5.weight")


def test_the_gradient_of_a_value_is_the_sum_of_its_members():
    network, inputs = build()
    Compressor(network, [ShareWeights(k=5)], inputs).apply()
    plain = bake(copy_network(network))
    for one in (network, plain):
        one(inputs).square().mean().backward()
    for path in ("0", "3", "5"):
        layer = network.get_submodule(path)
        codebook = computed(layer)["weight"]
        values = codebook.values(original_of(layer, "weight"))
        gradient = plain.get_submodule(path).weight.grad
        expected = [sum(gradient[codebook.indices == index].tolist()) for index in range(len(values))]
        found = layer.parametrizations["weight"].original.grad
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_frozen_values_stay_and_everything_else_learns():
    network, inputs = build()
    compressor = Compressor(network, [ShareWeights(k=4, finetune=False, finetune_epochs=2)], inputs, epochs=2)
    seen = {}

    def watch(epoch, network):
        seen[epoch] = weights_of(network), network[5].bias.detach().clone()

    train(compressor, inputs, torch.arange(16) % 5, OPTIMIZERS["sgd"], epochs=2, watch=watch)
    assert all(torch.equal(weight, seen[0][0][name]) for name, weight in weights_of(network).items())
    assert not torch.equal(network[5].bias, seen[0][1])
    rebuilt = rebuild_structure(build()[0], json.loads(json.dumps(structure_of(network))))
    assert [p.requires_grad for p in rebuilt.parameters()] == [p.requires_grad for p in network.parameters()]
    assert not rebuilt[0].parametrizations["weight"].original.requires_grad


def test_as_many_values_as_a_pattern_says():
    network, inputs = build()
    compressor = Compressor(network, [ShareWeights(k={"5": 3, "Conv2d": 9})], inputs)
    compressor.apply()
    assert [len(weight.unique()) for weight in weights_of(network).values()] == [9, 9, 3]
    network, _ = build()
    Compressor(network, [ShareWeights(k={"0": 3})], inputs).apply()
    assert computed(network[0])
    assert not computed(network[3])
    with pytest.raises(InputError, match="no pattern of k matches '3'"):
        Compressor(build()[0], [ShareWeights(k={"0": 3}, targets="Conv2d")], inputs).apply()
    with pytest.raises(InputError, match="matches none of"):
        Compressor(build()[0], [ShareWeights(k={"Conv2d": 3, "headd": 4})], inputs).apply()


def test_with_enough_values_the_outputs_stay_bit_for_bit():
    network, inputs = build()
    with torch.no_grad():
        for weight in (network[0].weight, network[3].weight, network[5].weight):
            weight.copy_((weight * 20).round() / 20)
    network.eval()
    expected = network(inputs)
    Compressor(network, [ShareWeights(k=256)], inputs).apply()
    assert torch.equal(network(inputs), expected)


def test_a_padding_stays_zero_and_a_layer_of_zeros_may_still_learn():
    torch.manual_seed(0)
    network = Words()
    nn.init.zeros_(network.out.weight)
    words = torch.randint(0, 40, (8, 5))
    compressor = Compressor(network, [ShareWeights(k=6, finetune_epochs=2)], words, epochs=2)
    train(compressor, words, words, OPTIMIZERS["adam"], epochs=2)
    assert not network.table.weight[0].any()
    assert network.out.weight.any()
    assert {len(weight.unique()) for name, weight in weights_of(network).items() if name != "out.weight"} == {6}


def test_tied_and_computed_weights_are_left_out_with_a_reason_or_refused_by_name():
    words = torch.randint(0, 40, (8, 5))
    network = Words(tied=True)
    compressor = Compressor(network, [ShareWeights(k=4)], words)
    compressor.apply()
    assert network.out.weight is network.table.weight
    notes = "\n".join(compressor.piece.notes)
    assert "out: it shares a weight with another layer (table.weight and out.weight)" in notes
    for step in (ShareWeights(k=4, targets="out"), HashShare(targets="out")):
        with pytest.raises(InputError, match="'out': it shares a weight"):
            Compressor(Words(tied=True), [step], words).apply()
    network, inputs = build()
    Compressor(network, [ShareWeights(k=4, targets="0"), ShareWeights(k=9)], inputs).apply()
    assert [len(weight.unique()) for weight in weights_of(network).values()] == [4, 9, 9]
    with pytest.raises(InputError, match="'0': its weights are computed already"):
        Compressor(network, [HashShare(targets="0")], inputs).apply()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShareWeights(k=0), "k must be 1 to 256"),
        (lambda: ShareWeights(k=257), "k must be 1 to 256"),
        (lambda: ShareWeights(k={"a": 3.5}), "k must be 1 to 256"),
        (lambda: ShareWeights(k={}), "k is empty"),
        (lambda: ShareWeights(init="farthest"), "init must be"),
        (lambda: HashShare(ratio=0.5), "ratio is the number of weights per value"),
    ],
)
def test_wrong_options_are_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_orders_that_make_no_sense_are_refused():
    network, inputs = build()
    for values in (ShareWeights(), HashShare()):
        with pytest.raises(InputError, match="cannot come after step 1"):
            Compressor(network, [values, LowRank(rank=2)], inputs)
        with pytest.raises(InputError, match="cannot come after step 1"):
            Compressor(network, [values, PruneSome()], inputs)


# HashShare


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hashed_weights_train_and_remain_few_values_of_two_signs(optimizer):
    network, inputs = build()
    compressor = Compressor(network, [HashShare(ratio=8, finetune_epochs=2)], inputs, epochs=2)
    seen = {}

    def watch(epoch, network):
        seen[epoch] = weights_of(network)

    train(compressor, inputs, torch.arange(16) % 5, OPTIMIZERS[optimizer], epochs=2, watch=watch)
    for name, weight in weights_of(network).items():
        assert len(weight.abs().unique()) <= round(weight.numel() / 8)
        assert not torch.equal(weight, seen[0][name])
    places = [computed(network.get_submodule(path))["weight"].places for path in ("0", "3")]
    assert places[0].tolist() != places[1][: len(places[0])].tolist()
    rebuilt = rebuild_structure(build(seed=3)[0], json.loads(json.dumps(structure_of(network)))).eval()
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    for other in (rebuilt, plain_copy(rebuilt), copy.deepcopy(rebuilt)):
        assert torch.equal(other(inputs), network.eval()(inputs))


def test_pruned_weights_and_paddings_cannot_be_hashed():
    network, inputs = build()
    with pytest.raises(InputError, match="'0.weight' is pruned, and hashed weights have no zeros"):
        Compressor(network, [PruneSome(), HashShare()], inputs).apply()
    network, words = Words(), torch.randint(0, 40, (8, 5))
    compressor = Compressor(network, [HashShare()], words)
    compressor.apply()
    assert not network.table.weight[0].any()
    assert any(note.startswith("table: it is an embedding with a padding") for note in compressor.piece.notes)
    with pytest.raises(InputError, match="'table': it is an embedding with a padding"):
        Compressor(Words(), [HashShare(targets="table")], words).apply()


def test_a_run_goes_on_in_a_fresh_network_bit_for_bit():
    for steps in ([ShareWeights(k=6, finetune_epochs=2)], [LowRank(rank=0.4), HashShare(ratio=4, finetune_epochs=2)]):
        torch.manual_seed(1)
        network, inputs = build()
        targets = torch.arange(16) % 5
        compressor = Compressor(network, steps, inputs, epochs=2)
        optimizer = OPTIMIZERS["adam"](network.parameters())

        def go(compressor, optimizer, epoch):
            network = compressor.network
            if compressor.begin_epoch(epoch, steps_per_epoch=3, optimizer=optimizer):
                optimizer = OPTIMIZERS["adam"](network.parameters())
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()  # noqa: B023
                compressor.before_optimizer_step()
                optimizer.step()
                compressor.after_optimizer_step(optimizer)
            return optimizer

        optimizer = go(compressor, optimizer, 0)
        saved = copy.deepcopy(
            (structure_of(network), network.state_dict(), compressor.state_dict(), optimizer.state_dict())
        )
        go(compressor, optimizer, 1)
        fresh = rebuild_structure(build(seed=5)[0], saved[0])
        fresh.load_state_dict(saved[1], strict=True)
        other = Compressor(fresh, steps, inputs, epochs=2)
        other.load_state_dict(saved[2])
        resumed = OPTIMIZERS["adam"](fresh.parameters())
        resumed.load_state_dict(saved[3])
        go(other, resumed, 1)
        for one, two in zip(network.state_dict().values(), fresh.state_dict().values(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("step", [ShareWeights, HashShare])
def test_values_are_new_parameters_for_the_optimiser(step):
    """Also where nothing but the shapes would tell: without biases, the order of the parameters stays."""
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 5, bias=False)), torch.randn(4, 8)
    compressor = Compressor(network, [step(finetune_epochs=1)], inputs, epochs=2, dense_epochs=1)
    before = list(network.parameters())
    network(inputs).sum().backward()
    assert not compressor.begin_epoch(0, steps_per_epoch=1)
    assert compressor.begin_epoch(1, steps_per_epoch=1)
    assert not {id(parameter) for parameter in before} & {id(parameter) for parameter in network.parameters()}
    assert all(parameter.grad is None for parameter in network.parameters())
