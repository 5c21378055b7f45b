"""Scores against what they claim to estimate."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.access.calibration import calibrating
from distill_lightning.compression.mask import criteria
from distill_lightning.testing import TinyNet


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """With BatchNorm and dropout, so that modes matter."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.two = nn.Linear(6, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, inputs):
        return self.two(self.drop(self.norm(self.one(inputs)).tanh()))


PATHS = ["one.weight", "norm.weight", "two.weight"]


def network_of():
    torch.manual_seed(0)
    network = Net().double()
    nn.init.uniform_(network.norm.weight, 0.5, 2)
    nn.init.uniform_(network.norm.running_var, 0.5, 2)
    return network


def batches_of(*sizes):
    return [(drawn(size, 4, seed=number), torch.arange(size) % 3) for number, size in enumerate(sizes)]


def naive_gradients(network, batches, path, *, training=False):
    """Of each batch, by backward on a copy."""
    found = []
    for inputs, targets in batches:
        copied = copy.deepcopy(network).train(training)
        copied.zero_grad()
        F.cross_entropy(copied(inputs), targets).backward()
        found.append(copied.get_parameter(path).grad)
    return found


def test_magnitudes_are_absolute_values():
    network = network_of()
    with torch.no_grad():
        network.norm.weight[0] = -3
    scores = criteria.magnitude(network, PATHS)
    assert torch.equal(scores["one.weight"], network.one.weight.abs())
    assert scores["norm.weight"][0] == 3


def test_random_scores_are_uniform_and_the_seeds_alone():
    network = nn.Linear(200, 100)
    state = torch.random.get_rng_state()
    score = criteria.random(network, ["weight"], seed=1)["weight"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (score.shape, score.dtype) == (network.weight.shape, torch.float32)
    assert torch.equal(criteria.random(network, ["weight"], seed=1)["weight"], score)
    assert not torch.equal(criteria.random(network, ["weight"], seed=2)["weight"], score)
    assert score.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0 <= score.min() < 0.01 < 0.99 < score.max() <= 1


@pytest.mark.parametrize("sizes", [(6,), (6, 6, 3)])
def test_gradient_and_taylor_are_the_means_of_absolute_values_over_batches(sizes):
    network, batches = network_of(), batches_of(*sizes)
    gradient = criteria.gradient(network, PATHS, batches, F.cross_entropy)
    taylor = criteria.taylor(network, PATHS, iter(batches), F.cross_entropy)
    for path in PATHS:
        weight = network.get_parameter(path).detach()
        naive = sum(size * g.abs() for size, g in zip(sizes, naive_gradients(network, batches, path), strict=True))
        assert torch.allclose(gradient[path], naive / sum(sizes), rtol=1e-10)
        assert torch.allclose(taylor[path], naive / sum(sizes) * weight.abs(), rtol=1e-10)


def test_the_taylor_score_of_a_vanishing_weight_is_the_change_of_the_loss():
    network, batches = network_of().eval(), batches_of(6)
    ratios = []
    for size in (1e-2, 1e-4):
        with torch.no_grad():
            network.one.weight[2, 1] = size
        score = criteria.taylor(network, ["one.weight"], batches, F.cross_entropy)["one.weight"][2, 1]
        with_it = F.cross_entropy(network(batches[0][0]), batches[0][1])
        with torch.no_grad():
            network.one.weight[2, 1] = 0
        ratios.append((score / (with_it - F.cross_entropy(network(batches[0][0]), batches[0][1])).abs()).item())
    assert abs(ratios[1] - 1) < 1e-3
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1)


def test_obd_is_the_mean_square_of_every_samples_gradient():
    network, batches = network_of(), batches_of(4, 2)
    scores = criteria.obd(network, PATHS, batches, F.cross_entropy)
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    for path in PATHS:
        fisher = sum(g**2 for g in naive_gradients(network, samples, path)) / 6
        assert torch.allclose(scores[path], fisher * network.get_parameter(path) ** 2 / 2, rtol=1e-10)


@pytest.mark.slow
def test_obds_fisher_is_the_hessian_at_the_optimum_of_a_likelihood():
    # Logistic regression whose labels are drawn from its own probabilities: E[g^2] is the Hessian's diagonal.
    network = nn.Linear(2, 2, bias=False).double()
    inputs = drawn(4000, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -0.5], [0.3, 0.8]]))
    probabilities = network(inputs).softmax(1).detach()
    targets = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    scores = criteria.obd(network, ["weight"], [(inputs, targets)], F.cross_entropy)["weight"]
    hessian = torch.autograd.functional.hessian(
        lambda weight: F.cross_entropy(inputs @ weight.reshape(2, 2).T, targets), network.weight.detach().flatten()
    )
    expected = hessian.diagonal().reshape(2, 2) * network.weight.detach() ** 2 / 2
    assert torch.allclose(scores, expected, rtol=0.1)


def test_snip_is_the_share_of_the_whole_gradient_in_train_mode():
    network, batches = network_of(), batches_of(6, 3)
    network.drop.p = 0.0
    scores = criteria.snip(network, PATHS, batches, F.cross_entropy)
    naive = {}
    for path in PATHS:
        one, other = naive_gradients(network, batches, path, training=True)
        naive[path] = ((6 * one + 3 * other) / 9 * network.get_parameter(path)).abs().detach()
    total = sum(score.sum() for score in naive.values())
    for path in PATHS:
        assert torch.allclose(scores[path], naive[path] / total, rtol=1e-10)
    assert sum(score.sum() for score in scores.values()).item() == pytest.approx(1)


CRITERIA = [criteria.gradient, criteria.taylor, criteria.obd, criteria.snip]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_everything_as_it_was(criterion, training):
    network = network_of().train(training)
    network.norm.eval()
    network.two.weight.requires_grad_(requires_grad=False)
    network.one.weight.grad = torch.ones_like(network.one.weight)
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        scores = criterion(network, PATHS, batches_of(6), F.cross_entropy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes
    assert not network.two.weight.requires_grad
    assert network.norm.weight.requires_grad
    assert network.one.weight.grad.unique().tolist() == [1]
    assert network.norm.weight.grad is None
    assert all(not score.requires_grad and score.shape == network.get_parameter(p).shape for p, score in scores.items())
    assert scores["two.weight"].count_nonzero() > 0


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_scores_of_recurrent_and_attention_weights(criterion):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(5, 1, 7, batch_first=True, dropout=0.0)
            self.head = nn.Linear(5, 3)

        def forward(self, inputs):
            return self.head(self.encoder(self.lstm(inputs)[0])[:, -1])

    network = Reader().double()
    paths = ["lstm.weight_hh_l0", "encoder.self_attn.in_proj_weight", "encoder.linear1.weight"]
    scores = criterion(network, paths, [(drawn(3, 6, 4), torch.tensor([0, 1, 2]))], F.cross_entropy)
    assert all(score.isfinite().all() and score.count_nonzero() > 0 for score in scores.values())


def test_a_parameter_without_effect_scores_zero():
    scores = criteria.taylor(network_of(), ["idle.weight", "two.weight"], batches_of(4), F.cross_entropy)
    assert scores["idle.weight"].count_nonzero() == 0
    with pytest.raises(InputError, match="the loss depends on none of idle.weight"):
        criteria.snip(network_of(), ["idle.weight"], batches_of(4), F.cross_entropy)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, one, other):
        return self.head(one if other is None else one + other)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_networks_with_several_inputs_are_given_tuples(criterion):
    network, (inputs, targets) = Two().double(), batches_of(5)[0]
    pair = criterion(network, ["head.weight"], [((inputs, inputs), targets)], F.cross_entropy)
    single = criterion(network.head, ["weight"], [(2 * inputs, targets)], F.cross_entropy)
    assert torch.allclose(pair["head.weight"], single["weight"], rtol=1e-10)
    without = criterion(network, ["head.weight"], [((inputs, None), targets)], F.cross_entropy)
    alone = criterion(network.head, ["weight"], [(inputs, targets)], F.cross_entropy)
    assert torch.allclose(without["head.weight"], alone["weight"], rtol=1e-10)


@pytest.mark.parametrize(
    ("paths", "batches", "loss", "message"),
    [
        (["one.wait"], 1, F.cross_entropy, "Net has no parameter 'one.wait'; similar names: one.weight"),
        ([], 1, F.cross_entropy, "no parameter is named"),
        (PATHS, 0, F.cross_entropy, "there is no calibration batch"),
        (PATHS, 1, lambda output, _: output, "must be a finite scalar"),
        (PATHS, 1, lambda output, _: output.sum() / 0, "must be a finite scalar, got"),
    ],
)
def test_what_cannot_be_scored_is_refused(paths, batches, loss, message):
    with pytest.raises(InputError, match=message):
        criteria.taylor(network_of(), paths, batches_of(4)[:batches], loss)


def test_tied_parameters_are_named_once():
    network = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    network[1].weight = network[0].weight
    assert criteria.magnitude(network, ["1.weight"])["1.weight"].shape == (3, 3)
    with pytest.raises(InputError, match="'1.weight' and '0.weight' are one tied parameter: name it once"):
        criteria.magnitude(network, ["0.weight", "1.weight"])


def test_an_error_in_a_forward_leaves_the_network_as_it_was():
    network = TinyNet()
    before = torch.backends.mha.get_fastpath_enabled()

    def failing():
        with calibrating(network):
            assert not network.training
            assert not torch.backends.mha.get_fastpath_enabled()
            network.features[1].running_mean.fill_(7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert network.training
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert network.features[1].running_mean.count_nonzero() == 0
