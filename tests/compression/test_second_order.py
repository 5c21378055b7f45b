"""Second-order pruning against brute force."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.mask.second_order import (
    inverse,
    layer_hessians,
    obs,
    prune_layers,
    sweep,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(samples, size, seed=0):
    return drawn(samples, size, seed=seed) @ drawn(size, size, seed=seed + 100)


def layer_error(new, weight, inputs):
    """Half the mean over samples of the squared change of the outputs."""
    return ((inputs @ (new - weight).T) ** 2).sum(1).mean().item() / 2


def regression(size=6, samples=50):
    """A linear regression at its optimum: inputs, and the layer whose loss there has no gradient."""
    inputs = correlated(samples, size)
    targets = inputs @ drawn(size, seed=5) + drawn(samples, seed=6)
    layer = nn.Linear(size, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.lstsq(inputs, targets[:, None]).solution.T)
    return layer, inputs, targets


def regression_loss(weight, inputs, targets):
    return ((inputs @ weight.flatten() - targets) ** 2).mean().item() / 2


def refitted(inputs, targets, position):
    """The best weights without one, by least squares on the other inputs."""
    others = [column for column in range(inputs.shape[1]) if column != position]
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    weight[others] = torch.linalg.lstsq(inputs[:, others], targets[:, None]).solution[:, 0]
    return weight


def naive_removal(row, inverted, position):
    """The surgeon's update: the others make up for one weight."""
    return row - row[position] / inverted[position, position] * inverted[:, position]


def test_obs_is_the_rise_of_the_loss_and_lands_on_the_refitted_weights():
    layer, inputs, targets = regression()
    begin = regression_loss(layer.weight, inputs, targets)
    scores = obs(layer, ["weight"], [(inputs, targets)], damping=0.0)["weight"][0]
    inverted = inverse(layer_hessians(layer, ["weight"], [(inputs, targets)])["weight"], damping=0.0)[0]
    for position in range(6):
        moved = naive_removal(layer.weight.detach()[0], inverted, position)
        assert abs(moved[position]) < 1e-14
        assert torch.allclose(moved, refitted(inputs, targets, position), rtol=1e-8)
        rise = regression_loss(moved, inputs, targets) - begin
        assert rise == pytest.approx(scores[position].item(), rel=1e-10)
        by_hand = layer.weight[0, position].item() ** 2 / (2 * inverted[position, position].item())
        assert scores[position].item() == pytest.approx(by_hand, rel=1e-12)


def test_obs_ranks_as_brute_force_and_never_loses_more_than_obd():
    layer, inputs, targets = regression()
    scores = obs(layer, ["weight"], [(inputs, targets)], damping=0.0)["weight"][0]
    diagonal = inputs.square().mean(0) * layer.weight.detach()[0] ** 2 / 2  # without an update
    losses = [regression_loss(refitted(inputs, targets, position), inputs, targets) for position in range(6)]
    assert scores.argsort().tolist() == sorted(range(6), key=losses.__getitem__)
    assert (scores <= diagonal).all()
    assert (scores < 0.9 * diagonal).any()


def naive_hessian(layer, inputs):
    """From what the convolution really multiplies, found by the gradient of its output in its weight."""
    size = layer.weight[0].numel()
    hessians = torch.zeros(layer.groups, size, size, dtype=torch.float64)
    outputs = F.conv2d(
        F.pad(inputs, layer._reversed_padding_repeated_twice, mode="constant"),
        layer.weight, None, layer.stride, 0, layer.dilation, layer.groups,
    )  # fmt: skip
    count = 0
    for sample, row, column in itertools.product(*map(range, (len(inputs), *outputs.shape[2:]))):
        count += 1
        for group in range(layer.groups):
            channel = group * layer.out_channels // layer.groups
            (grad,) = torch.autograd.grad(outputs[sample, channel, row, column], layer.weight, retain_graph=True)
            hessians[group] += torch.outer(grad[channel].flatten(), grad[channel].flatten())
    return hessians / count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "groups": 2},
        {"groups": 4, "stride": (1, 2)},
    ],
)
def test_a_convolutions_hessian_is_that_of_what_it_multiplies(options):
    layer = nn.Conv2d(4, 4, 3, **options).double()
    inputs = drawn(2, 4, 6, 5)
    found = layer_hessians(layer, ["weight"], [(inputs[:1], None), (inputs[1:], None)])["weight"]
    assert torch.allclose(found, naive_hessian(layer, inputs), rtol=1e-8)


def test_a_convolution_that_pads_with_its_own_rim_is_unfolded_so():
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False).double()
    inputs = drawn(2, 2, 5, 5)
    hessian = layer_hessians(layer, ["weight"], [(inputs, None)])["weight"][0]
    rows = layer.weight.detach().reshape(3, -1)
    energy = layer(inputs).square().mean((0, 2, 3))
    assert torch.allclose((rows @ hessian * rows).sum(1), energy, rtol=1e-10)


def test_a_linear_layers_hessian_counts_every_position_of_a_sequence():
    layer, inputs = nn.Linear(3, 2).double(), drawn(4, 5, 3)
    found = layer_hessians(layer, ["weight"], [(inputs[:1], None), (inputs[1:], None)])["weight"]
    rows = inputs.reshape(20, 3)
    assert torch.allclose(found[0], sum(torch.outer(row, row) for row in rows) / 20, rtol=1e-10)


# the sweep


def naive_sweep(weight, hessian, mask):
    """One column after the other with the exact inverse of what remains, eliminated step by step."""
    rows, inverted = weight.clone(), torch.linalg.inv(hessian)
    for column in range(weight.shape[1]):
        for row in range(weight.shape[0]):
            if not mask[row, column]:
                rows[row] -= rows[row, column] / inverted[column, column] * inverted[column]
                rows[row, column] = 0
        inverted = inverted - torch.outer(inverted[:, column], inverted[column]) / inverted[column, column]
    return rows.masked_fill(~mask, 0)


@pytest.mark.parametrize("block", [1, 3, 8, 128])
def test_the_sweep_is_the_step_by_step_elimination_in_any_blocks(block):
    weight, inputs = drawn(5, 8, seed=1), correlated(40, 8)
    hessian = inputs.T @ inputs / 40
    mask = drawn(5, 8, seed=2) > 0
    new, kept = sweep(weight, hessian[None], mask=mask, damping=0.0, block=block)
    assert torch.equal(kept, mask)
    assert new[~mask].count_nonzero() == 0
    assert torch.allclose(new, naive_sweep(weight, hessian, mask), rtol=1e-7, atol=1e-10)


def test_a_single_weight_in_the_first_column_is_the_surgeons():
    layer, inputs, targets = regression()
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[0, 0] = False
    hessian = layer_hessians(layer, ["weight"], [(inputs, targets)])["weight"]
    new, _ = sweep(layer.weight.detach(), hessian, mask=mask, damping=0.0)
    assert torch.allclose(new[0], refitted(inputs, targets, 0), rtol=1e-8)


@pytest.mark.parametrize("amount", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_the_sweep_prunes_exactly_so_many(amount, block):
    weight, inputs = drawn(7, 10, seed=1), correlated(60, 10)
    new, kept = sweep(weight, (inputs.T @ inputs / 60)[None], amount=amount, block=block)
    assert (~kept).sum() == round(amount * 70)
    assert torch.equal(new == 0, ~kept)
    if amount == 0:
        assert torch.equal(new, weight)


def test_ties_do_not_overshoot_in_a_sweep():
    _, kept = sweep(torch.ones(4, 6), torch.eye(6)[None], amount=0.3, block=2)
    assert (~kept).sum() == round(0.3 * 24)


def test_the_sweep_loses_less_than_magnitude_and_its_update_less_than_none():
    lost = {"sweep": 0.0, "magnitude, updated": 0.0, "magnitude": 0.0}
    for seed in range(5):
        # Inputs of different sizes, about which magnitude knows nothing.
        inputs = (drawn(200, 12, seed=seed) + drawn(200, 1, seed=seed + 10)) * torch.logspace(-1, 1, 12)
        weight, hessian = drawn(16, 12, seed=seed + 20), (inputs.T @ inputs / 200)[None]
        mask = weight.abs() > weight.abs().flatten().median()
        lost["sweep"] += layer_error(sweep(weight, hessian, amount=0.5)[0], weight, inputs)
        lost["magnitude, updated"] += layer_error(sweep(weight, hessian, mask=mask)[0], weight, inputs)
        lost["magnitude"] += layer_error(weight.masked_fill(~mask, 0), weight, inputs)
    assert lost["sweep"] < 0.5 * lost["magnitude, updated"]
    assert lost["magnitude, updated"] < lost["magnitude"]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
@pytest.mark.parametrize("block", [1, 4, 6, 128])
def test_the_sweep_prunes_n_of_m(n, m, block):
    weight, inputs = drawn(6, 16, seed=1), correlated(80, 16)
    new, kept = sweep(weight, (inputs.T @ inputs / 80)[None], granularity=f"{n}:{m}", block=block)
    assert (kept.view(6, -1, m).sum(2) == n).all()
    assert torch.equal(new == 0, ~kept)
    cut = torch.zeros_like(weight).view(6, -1, m)
    best = weight.view(6, -1, m).abs().topk(n).indices
    cut = cut.scatter(-1, best, weight.view(6, -1, m).gather(-1, best)).view(6, 16)
    assert layer_error(new, weight, inputs) < layer_error(cut, weight, inputs)


def test_grouped_convolutions_are_swept_each_group_by_its_own_inputs():
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    inputs = drawn(3, 4, 6, 6)
    hessian = layer_hessians(layer, ["weight"], [(inputs, None)])["weight"]
    mask = drawn(6, 2, 3, 3, seed=3) > 0
    new, _ = sweep(layer.weight.detach(), hessian, mask=mask)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        alone, _ = sweep(layer.weight.detach()[rows], hessian[group : group + 1], mask=mask[rows])
        assert torch.allclose(new[rows], alone, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sweep_keeps_the_weights_type_and_works_on_convolutions(dtype):
    weight = drawn(4, 2, 3, 3).to(dtype)
    new, kept = sweep(weight, torch.eye(18)[None], amount=0.5)
    assert (new.dtype, new.shape, kept.shape) == (dtype, weight.shape, weight.shape)
    # Without correlation nothing can make up for anything.
    assert torch.allclose(new[kept], weight[kept])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        features = self.norm(self.conv(images)).relu().flatten(2)
        return self.head(self.encoder(features).mean(1))


PATHS = ["conv.weight", "encoder.linear1.weight", "head.weight"]


def network_of():
    torch.manual_seed(0)
    return Net().double().eval()


def test_layers_of_a_network_are_pruned_in_place_and_nothing_else():
    network, batches = network_of(), [(drawn(16, 1, 6, 6, seed=number), None) for number in range(3)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masks = prune_layers(network, PATHS, batches, amount=0.5)
    assert isinstance(masks, Masks)
    for path in PATHS:
        assert masks.sparsities()[path] == 0.5
        assert torch.equal(network.get_parameter(path) == 0, ~masks.kept[path])
    assert [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])] == PATHS


def test_the_outputs_stay_nearer_than_with_the_same_mask_alone():
    network, batches = network_of(), [(drawn(16, 1, 6, 6, seed=number), None) for number in range(3)]
    inputs = torch.cat([inputs for inputs, _ in batches])
    weight, expected = network.head.weight.detach().clone(), network(inputs)
    masks = prune_layers(network, ["head.weight"], batches, amount=0.5)
    updated = (network(inputs) - expected).square().mean()
    with torch.no_grad():
        network.head.weight.copy_(weight)
    masks.project(network)
    assert updated < (network(inputs) - expected).square().mean()
    again = prune_layers(network, ["head.weight"], batches, masks=masks)
    assert torch.equal(again.kept["head.weight"], masks.kept["head.weight"])


def test_collecting_leaves_modes_buffers_and_hooks_as_they_were():
    network = Net().double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    layer_hessians(network, PATHS, [(drawn(4, 1, 6, 6), None)])
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def batch():
    return [(drawn(4, 1, 6, 6), None)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: obs(Net().double(), ["norm.weight"], batch()),
            "'norm.weight' is a parameter of BatchNorm2d: only",
        ),
        (
            lambda: obs(Net().double(), ["head.bias"], batch()),
            "'head.bias' is a parameter of Linear: only Linear and Conv2d",
        ),
        (lambda: obs(Net().double(), ["encoder.self_attn.out_proj.weight"], batch()), "did not run on the calibration"),
        (lambda: obs(Net().double(), ["head.weight"], []), "did not run on the calibration data"),
        (lambda: inverse(torch.zeros(1, 2, 2)), "singular with damping=0.01: raise it, or give more data"),
        (lambda: inverse(torch.ones(1, 2, 2), damping=-1), "damping must not be negative, got -1"),
        (lambda: sweep(torch.ones(2, 2), torch.eye(2)[None]), "exactly one of an amount, a granularity such as"),
        (lambda: sweep(torch.ones(2, 4), torch.eye(4)[None], amount=0.5, granularity="2:4"), "exactly one"),
        (lambda: sweep(torch.ones(2, 2), torch.eye(2)[None], amount=1.5), "between 0 and 1, got 1.5"),
        (lambda: sweep(torch.ones(2, 2), torch.eye(2)[None], granularity="2:4"), "2 columns are not a multiple of 4"),
        (
            lambda: sweep(torch.ones(2, 2), torch.eye(2)[None], granularity="row"),
            "OBS prunes single weights or n of m, not granularity 'row'",
        ),
        (lambda: prune_layers(Net().double(), PATHS, batch(), masks=Masks()), "there is no mask for 'conv.weight'"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
