"""Penalties against loops."""

import math

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.mask import penalties
from distill_lightning.compression.mask.learned import HardConcrete, SoftThreshold, learn
from distill_lightning.testing import TinyNet

PATHS = ["features.0.weight", "features.3.weight", "head.weight"]


def test_l1_is_the_sum_of_absolute_weights_with_their_signs_as_gradient():
    network = TinyNet().double()
    value = penalties.l1(network, PATHS)
    assert value.item() == pytest.approx(
        sum(abs(w) for path in PATHS for w in network.get_parameter(path).flatten().tolist()), rel=1e-12
    )
    value.backward()
    assert torch.equal(network.head.weight.grad, network.head.weight.sign())
    assert network.head.bias.grad is None


def test_group_lasso_is_the_loop_over_rows():
    network = TinyNet().double()
    naive = 0.0
    for path in PATHS:
        for row in network.get_parameter(path):
            naive += math.sqrt(row.numel()) * math.sqrt(sum(w * w for w in row.flatten().tolist()))
    assert penalties.group_lasso(network, PATHS).item() == pytest.approx(naive, rel=1e-12)


def test_rows_that_are_zero_have_no_gradient_that_is_no_number():
    network = nn.Linear(3, 2)
    nn.init.zeros_(network.weight)
    (penalties.group_lasso(network, ["weight"]) + penalties.l1(network, ["weight"])).backward()
    assert network.weight.grad.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_bn_gamma_is_the_sum_of_the_scales():
    network = TinyNet()
    with torch.no_grad():
        network.features[1].weight[0] = -2.5
    assert penalties.bn_gamma(network).item() == 3 + 2.5 + 8
    with pytest.raises(InputError, match="bn_gamma: TinyNet has no BatchNorm with a scale: use group_lasso"):
        penalties.bn_gamma(TinyNet(norm="group"))


def test_l0_is_the_expected_number_of_weights():
    network = TinyNet()
    learn(network, PATHS[:1], HardConcrete, initial=0.25)
    learn(network, PATHS[2:], HardConcrete, initial=0.5, per="row")
    value = penalties.l0(network)
    assert value.item() == pytest.approx(0.25 * 36 + 0.5 * 24, rel=1e-5)
    value.backward()
    assert all(mask.grad.min() > 0 for name, mask in network.named_parameters() if "location" in name)
    with pytest.raises(InputError, match="l0: TinyNet has no gates"):
        penalties.l0(TinyNet())


def test_soft_movements_penalty_is_the_mean_over_layers():
    network = TinyNet()
    learn(network, PATHS[:1], SoftThreshold, initial=0.0)
    learn(network, PATHS[2:], SoftThreshold, initial=math.log(3))
    assert penalties.soft_movement(network).item() == pytest.approx((0.5 + 0.75) / 2)
    with pytest.raises(InputError, match="soft_movement: TinyNet has no scores"):
        penalties.soft_movement(TinyNet())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: penalties.l1(TinyNet(), ["head.wait"]), "no parameter 'head.wait'"),
        (lambda: penalties.group_lasso(TinyNet(), []), "no parameter is named"),
    ],
)
def test_penalties_of_nothing_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_penalties_train_weights_towards_zero():
    network = TinyNet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = penalties.group_lasso(network, PATHS).item()
    for _ in range(5):
        optimizer.zero_grad()
        (penalties.group_lasso(network, PATHS) + penalties.bn_gamma(network)).backward()
        optimizer.step()
    assert penalties.group_lasso(network, PATHS).item() < 0.9 * before
