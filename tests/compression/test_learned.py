"""Learned masks: gradients by hand, exact numbers, and plain networks in the end."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.access.computed import describe_weights, rebuild_weights
from distill_lightning.compression.mask.learned import (
    HardConcrete,
    LearnedMask,
    SoftThreshold,
    TopK,
    bake_masks,
    learn,
    learned,
    set_amount,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.lstm = nn.LSTM(16, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        hidden, _ = self.lstm(self.conv(images).relu().transpose(1, 2).flatten(2))
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0][:, -1])


PATHS = ["conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight", "head.weight"]
OPTIONS = {TopK: {"amount": 0.4}, SoftThreshold: {"amount": 0.5, "initial": 0.1}, HardConcrete: {"initial": 0.6}}


def images(number=0):
    return torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(number))


def randomised(network):
    """Scores as after some training."""
    for mask in learned(network, LearnedMask).values():
        nn.init.normal_(mask.location if isinstance(mask, HardConcrete) else mask.scores, std=4)
    return network


@pytest.mark.parametrize("kind", [TopK, SoftThreshold])
def test_the_scores_gradient_is_that_of_the_masked_weight_times_the_weight(kind):
    network = nn.Linear(5, 4).double()
    mask = learn(network, ["weight"], kind, amount=0.5)["weight"]
    randomised(network)
    inputs = torch.randn(7, 5, dtype=torch.float64)
    effective = network.weight.detach().clone().requires_grad_()
    F.linear(inputs, effective, network.bias).square().sum().backward()
    network(inputs).square().sum().backward()
    original = network.parametrizations.weight.original
    assert torch.equal(mask.scores.grad, effective.grad * original)
    kept = mask.kept()
    assert 0 < kept.sum() < kept.numel()
    assert mask.scores.grad[~kept].count_nonzero() == (~kept).sum()
    assert torch.equal(original.grad, effective.grad * kept)


def test_a_score_falls_where_the_weight_moves_towards_zero():
    weight = nn.Parameter(torch.tensor([2.0, -2.0, 2.0, -2.0]))
    mask = TopK(weight)
    # The loss's gradient: descent shrinks the first two weights, and grows the others.
    (mask(weight) * torch.tensor([1.0, -1.0, -1.0, 1.0])).sum().backward()
    assert (-mask.scores.grad).tolist() == [-2, -2, 2, 2]


@pytest.mark.parametrize("amount", [0.0, 0.1, 1 / 3, 0.5, 0.95, 1.0])
def test_hard_movement_prunes_exactly_so_many_even_of_equal_scores(amount):
    mask = TopK(torch.ones(7, 9), amount=amount)
    assert (~mask.kept()).sum() == round(amount * 63)
    nn.init.normal_(mask.scores)
    kept = mask.kept()
    assert (~kept).sum() == round(amount * 63)
    if 0 < amount < 1:
        assert mask.scores[kept].min() > mask.scores[~kept].max()


def test_soft_movement_follows_its_threshold_and_its_penalty_pushes_down():
    mask = SoftThreshold(torch.ones(4), amount=0.6)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([0.0, 0.3, 0.5, 2.0]))  # sigmoids .5 .574 .622 .881
    assert mask.kept().tolist() == [False, False, True, True]
    mask.penalty().backward()
    assert (mask.scores.grad > 0).all()
    expected = sum(1 / (1 + math.exp(-score)) for score in (0.0, 0.3, 0.5, 2.0)) / 4
    assert mask.penalty().item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", OPTIONS)
def test_all_kinds_of_layers_train_through_their_masks(kind):
    network = Net()
    masks = learn(network, PATHS, kind, **OPTIONS[kind])
    assert learned(network, LearnedMask).keys() == set(PATHS)
    randomised(network)
    begin = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for number in range(2):
        optimizer.zero_grad()
        F.cross_entropy(network(images(number)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    for path, mask in masks.items():
        module, name = path.rsplit(".", 1)
        scores = "location" if kind is HardConcrete else "scores"
        key = f"{module}.parametrizations.{name}"
        for part in ("original", f"0.{scores}"):
            assert not torch.equal(network.state_dict()[f"{key}.{part}"], begin[f"{key}.{part}"])
        network.eval()
        kept = mask.kept().expand(getattr(network.get_submodule(module), name).shape)
        assert torch.equal(getattr(network.get_submodule(module), name) != 0, kept)
        network.train()


@pytest.mark.parametrize("kind", OPTIONS)
def test_baking_gives_a_plain_network_with_the_same_outputs_bit_for_bit(kind):
    network, plain = Net(), Net()
    learn(network, PATHS, kind, **OPTIONS[kind])
    randomised(network).eval()
    expected = network(images())
    masks = bake_masks(network.train())
    network.eval()
    assert torch.equal(network(images()), expected)
    plain.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(plain.eval()(images()), expected)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert not learned(network, LearnedMask)
    assert 0.1 < masks.sparsity() < 0.95
    masks.project(network)
    assert torch.equal(network(images()), expected)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_described_layer_is_rebuilt_and_loads_strictly(kind):
    options = OPTIONS[kind] | ({"per": "row"} if kind is HardConcrete else {})
    network, other = Net(), Net()
    learn(network, PATHS, kind, **options)
    randomised(network)
    for name in ("conv", "lstm", "attention", "head"):
        description = describe_weights(network.get_submodule(name))
        assert {type(value) for entry in description.values() for value in entry.values()} <= {str, float}
        assert rebuild_weights(other.get_submodule(name), description) is other.get_submodule(name)
    other.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(other.eval()(images()), network.eval()(images()))
    assert describe_weights(nn.Linear(2, 2)) == {}


def test_the_amount_of_all_layers_is_set_each_or_together():
    network = Net()
    masks = learn(network, ["conv.weight", "head.weight"], TopK)
    nn.init.constant_(masks["conv.weight"].scores, 5)
    set_amount(network, 0.5)
    assert [mask.kept().sum().item() for mask in masks.values()] == [18, 9]
    set_amount(network, 19 / 54, scope="global")
    assert sum((~mask.kept()).sum().item() for mask in masks.values()) == 19
    assert masks["head.weight"].kept().sum() == 1


# L0


def test_hard_concrete_gates_in_eval_mode_are_the_formula():
    weight = torch.randn(3, 4, dtype=torch.float64)
    gates = HardConcrete(weight).eval()
    nn.init.normal_(gates.location, std=4)
    naive = [
        [min(1.0, max(0.0, 1 / (1 + math.exp(-location)) * 1.2 - 0.1)) for location in row]
        for row in gates.location.tolist()
    ]
    assert torch.allclose(gates(weight), weight * torch.tensor(naive, dtype=torch.float64), rtol=1e-12)
    assert torch.equal(gates.kept(), torch.tensor(naive) > 0)
    assert 0 < gates.kept().sum() < 12


def test_gates_are_open_as_often_as_their_probability_says():
    gates = HardConcrete(torch.ones(20000), initial=0.3)
    assert gates.open_probability().unique().item() == pytest.approx(0.3, abs=1e-6)
    sampled = gates(torch.ones(20000))
    assert (sampled > 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (sampled == 1).any()
    assert 0 <= sampled.min() <= sampled.max() <= 1


def test_row_gates_go_together_and_carry_gradients():
    layer = nn.Conv2d(2, 5, 3)
    gates = learn(layer, ["weight"], HardConcrete, per="row", initial=0.5)["weight"]
    assert gates.location.shape == (5, 1, 1, 1)
    layer(torch.randn(1, 2, 4, 4)).square().sum().backward()
    assert gates.location.grad.count_nonzero() > 0
    nn.init.constant_(gates.location[:2], -9)
    assert bake_masks(layer).kept["weight"].flatten(1).float().mean(1).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", [TopK, SoftThreshold, HardConcrete])
def test_tied_weights_are_refused_and_a_layer_in_two_places_is_not(kind):
    network = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 7))
    network[3].weight = network[0].weight
    with pytest.raises(InputError, match=r"'0.weight' is a tied weight.*exclude its layers"):
        learn(network, ["1.weight", "0.weight"], kind)
    assert learned(network, LearnedMask) == {}
    twice = nn.Linear(5, 5)
    network = nn.Sequential(twice, nn.ReLU(), twice)
    mask = learn(network, ["0.weight"], TopK)["0.weight"]
    mask.amount = 1.0
    inputs = torch.randn(3, 5)
    assert torch.equal(network(inputs), twice.bias.expand(3, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learn(Net(), ["head.wait"], TopK), "no parameter 'head.wait'"),
        (
            lambda: learn(Net(), ["head.weight"], HardConcrete, per="column"),
            "per must be one of weight, row, got 'column'",
        ),
        (lambda: learn(Net(), ["head.weight"], HardConcrete, initial=1.0), "initial is a probability"),
        (lambda: learn(Net(), ["head.weight"], TopK, amount=1.2), "amount must be between 0 and 1, got 1.2"),
        (lambda: learn(Net(), ["head.weight"], SoftThreshold, amount=-1), "amount must be between 0 and 1, got -1"),
        (lambda: set_amount(Net(), 0.5), "Net has no movement pruning whose amount could be set"),
        (
            lambda: rebuild_weights(nn.Linear(2, 2), {"weight": {"family": "tt"}}),
            "weights of the family 'tt', which another version wrote",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
