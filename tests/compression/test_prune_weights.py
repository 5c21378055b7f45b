"""The step that prunes weights: exact amounts, by every criterion, and zeros that stay in any training."""

import copy
import io
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from distill_lightning import InputError
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.steps import (
    LearnMask,
    Movement,
    Order,
    PruneUnits,
    PruneWeights,
    Sensitivity,
    SoftMovement,
)
from distill_lightning.compression.steps.schedules import Cubic, Iterative, OneShot, Threshold
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.hidden(self.norm(self.conv(images)).relu().flatten(1)).relu())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for parameter in self.encoder.layers[1].parameters():  # which begins as a copy of the first
            nn.init.normal_(parameter, std=0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.encoder(inputs).mean(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images():
    return [(drawn(6, 1, 4, 4, seed=seed), torch.arange(6) % 3) for seed in range(3)]


def sequences():
    return [(drawn(6, 5, 8, seed=seed), torch.arange(6) % 3) for seed in range(3)]


def tokens():
    return [(drawn(6, 5, seed=seed).mul(9).long().abs() % 7, torch.arange(6) % 3) for seed in range(3)]


NETWORKS = {"cnn": (Convolutional, images), "lstm": (Recurrent, tokens), "transformer": (Transformer, sequences)}
WEIGHTS = {
    "cnn": {"conv.weight", "hidden.weight", "head.weight"},
    "lstm": {"embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"},
    "transformer": {"head.weight"}
    | {
        f"encoder.layers.{layer}.{name}.weight".replace("in_proj.", "in_proj_")
        for layer in range(2)
        for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    },
}


def build(kind="cnn"):
    torch.manual_seed(3)
    return NETWORKS[kind][0]()


def compressor_of(network, *steps, kind="cnn", **options):
    batches = NETWORKS[kind][1]()
    return Compressor(network, steps, batches[0][0], **{"batches": batches, "bn_batches": 2, **options})


def applied(*steps, kind="cnn", **options):
    network = build(kind)
    compressor = compressor_of(network, *steps, kind=kind, **options)
    compressor.apply()
    return network, compressor


def train(compressor, make, *, epochs, first=0, optimizer=None, kind="cnn", accumulate=1, watch=lambda *_: None):
    """The loop of the class's docstring; gives the losses, step by step."""
    network, losses = compressor.network, []
    network.train()
    optimizer = optimizer or make(network.parameters())
    data = NETWORKS[kind][1]()
    for epoch in range(first, epochs):
        if compressor.begin_epoch(epoch, steps_per_epoch=len(data) // accumulate, optimizer=optimizer):
            optimizer = make(network.parameters())
        for number, (inputs, targets) in enumerate(data, start=1):
            loss = F.cross_entropy(network(inputs), targets) / accumulate
            loss.backward()
            losses.append(loss.item())
            if number % accumulate == 0:
                compressor.before_optimizer_step()
                optimizer.step()
                compressor.after_optimizer_step(optimizer)
                optimizer.zero_grad()
                watch(network, optimizer)
    return losses, optimizer


def zeros(network, paths):
    return sum(int((network.get_parameter(path) == 0).sum()) for path in paths)


def count(network, paths):
    return sum(network.get_parameter(path).numel() for path in paths)


def assert_zero_under(masks, network, optimizer):
    for path, kept in masks.kept.items():
        parameter = network.get_parameter(path)
        assert parameter[~kept].count_nonzero() == 0
        for name, value in optimizer.state[parameter].items():
            if name != "step":
                assert value[~kept].count_nonzero() == 0
                assert value[kept].count_nonzero() > 0


# amounts


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("amount", [0.3, 1 / 3, 0.6])
def test_the_weights_of_lowest_magnitude_go_exactly_so_many_and_no_bias_or_norm(kind, amount):
    dense = build(kind)
    network, compressor = applied(PruneWeights(amount=amount), kind=kind)
    assert set(compressor.masks.kept) == WEIGHTS[kind]
    wanted = round(amount * count(dense, WEIGHTS[kind]))
    assert compressor.masks.pruned == zeros(network, WEIGHTS[kind]) == wanted
    magnitudes = torch.cat([dense.get_parameter(path).abs().flatten() for path in compressor.masks.kept])
    limit = magnitudes.sort().values[wanted]
    for path in WEIGHTS[kind]:
        old, new = dense.get_parameter(path), network.get_parameter(path)
        assert torch.equal(new, torch.where(old.abs() < limit, 0.0, old))
    for name, parameter in network.named_parameters():
        assert name in WEIGHTS[kind] or torch.equal(parameter, dense.get_parameter(name))


def test_within_layers_and_by_patterns():
    network, _ = applied(PruneWeights(amount=0.5, scope="layer"))
    for path in WEIGHTS["cnn"]:
        assert zeros(network, [path]) == round(0.5 * count(network, [path]))
    network, compressor = applied(PruneWeights(amount={"conv": 0.25, "h*": 0.75, "head": 0.1}))
    amounts = {"conv.weight": 0.25, "hidden.weight": 0.75, "head.weight": 0.75}  # the first pattern that matches
    for path, amount in amounts.items():
        assert zeros(network, [path]) == round(amount * count(network, [path]))
    network, compressor = applied(PruneWeights(amount={"hidden": 0.5}))
    assert set(compressor.masks.kept) == {"hidden.weight"}
    with pytest.raises(InputError, match="'missing' matches none"):
        applied(PruneWeights(amount={"missing": 0.5}))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_weights_do_not_overshoot(value):
    network = build()
    with torch.no_grad():
        network.hidden.weight.fill_(value)
    compressor = compressor_of(network, PruneWeights(amount=0.3, targets="hidden"))
    compressor.apply()
    assert compressor.masks.pruned == round(0.3 * network.hidden.weight.numel())


def test_amount_zero_is_the_identity():
    for step in (
        PruneWeights(amount=0.0),
        PruneWeights(amount={"*": 0.0}),
        PruneWeights(schedule=Threshold(0.0)),
        PruneUnits(amount=0.0, unit="channel"),
    ):
        network, compressor = applied(step)
        assert compressor.masks.kept == {}
        for name, value in build().state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name
    network = build()
    losses, _ = train(
        compressor_of(network, LearnMask(Movement(0.0), finetune_epochs=2), epochs=2),
        OPTIMIZERS["sgd"],
        epochs=2,
    )
    assert losses == train(compressor_of(build(), epochs=2), OPTIMIZERS["sgd"], epochs=2)[0]
    # A conversion alone would change the outputs' last bits.
    for schedule in (OneShot(), Cubic()):
        step = PruneUnits(amount=0.0, unit="head", schedule=schedule, finetune_epochs=1)
        network = build("transformer")
        compressor = compressor_of(network, step, kind="transformer", epochs=1)
        train(compressor, OPTIMIZERS["sgd"], epochs=1, kind="transformer")
        compressor.finish()
        assert isinstance(network.encoder.layers[0].self_attn, nn.MultiheadAttention)


def test_a_second_step_counts_what_the_first_has_pruned():
    network, compressor = applied(PruneWeights(amount=0.4), PruneWeights(amount=0.6))
    assert compressor.masks.pruned == round(0.6 * count(network, WEIGHTS["cnn"]))
    first = applied(PruneWeights(amount=0.4))[1].masks
    for path, kept in compressor.masks.kept.items():
        assert not (kept & ~first.kept[path]).any()


@pytest.mark.parametrize("granularity", ["row", "block:2x4", "2:4"])
def test_rows_blocks_and_n_of_m(granularity):
    step = PruneWeights(amount=None if granularity == "2:4" else 0.5, granularity=granularity, scope="layer")
    network, compressor = applied(step)
    hidden = network.hidden.weight
    if granularity == "row":
        assert sorted((hidden == 0).sum(1).tolist()) == [0] * 4 + [128] * 4
    elif granularity == "2:4":
        assert ((hidden.view(8, 32, 4) == 0).sum(2) == 2).all()
        assert set(compressor.masks.kept) == {"hidden.weight", "head.weight"}  # one input is no multiple of four
        with pytest.raises(InputError, match="'conv' matches none"):
            applied(PruneWeights(granularity="2:4", targets="conv"))
    else:
        blocks = (hidden.view(4, 2, 32, 4) == 0).sum((1, 3))
        assert set(blocks.unique().tolist()) == {0, 8}
        assert (blocks == 8).sum() == 64


def test_a_threshold_prunes_what_is_below_it():
    network, _ = applied(PruneWeights(schedule=Threshold(0.05)))
    for path in WEIGHTS["cnn"]:
        old = build().get_parameter(path)
        assert torch.equal(network.get_parameter(path), torch.where(old.abs() < 0.05, 0.0, old))


# criteria


def naive_scores(criterion, network, path):
    weight = network.get_parameter(path)
    network.train(criterion == "snip")
    batches, total = images(), 0
    if criterion == "obd":
        batches = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    for inputs, targets in batches:
        grad = torch.autograd.grad(F.cross_entropy(network(inputs), targets), weight)[0]
        total += {
            "gradient": grad.abs(),
            "taylor": (grad * weight).abs(),
            "obd": grad.square() * weight.square(),
            "snip": grad * weight,
        }[criterion]
    return total.abs().detach()


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "obd", "snip"])
def test_criteria_of_the_data_agree_with_a_naive_ranking(criterion):
    _, compressor = applied(PruneWeights(amount=0.5, criterion=criterion, targets="hidden"))
    scores = naive_scores(criterion, build(), "hidden.weight")
    kept = compressor.masks.kept["hidden.weight"]
    assert scores[~kept].max() <= scores[kept].min()
    with pytest.raises(InputError, match=f"'{criterion}' needs calibration data: give batches"):
        applied(PruneWeights(amount=0.5, criterion=criterion), batches=None)


def test_random_is_a_control_of_its_own_draws():
    _, first = applied(PruneWeights(amount=0.5, criterion="random"))
    state = torch.random.get_rng_state()
    _, same = applied(PruneWeights(amount=0.5, criterion="random"))
    _, other = applied(PruneWeights(amount=0.5, criterion="random"), seed=1)
    overlap = sum(int((~first.masks.kept[path] & ~other.masks.kept[path]).sum()) for path in WEIGHTS["cnn"])
    assert all(torch.equal(first.masks.kept[path], same.masks.kept[path]) for path in WEIGHTS["cnn"])
    assert 0.4 < overlap / first.masks.pruned < 0.6
    torch.random.set_rng_state(state)


def layer_error(network):
    """What the hidden layer's output has lost, on the calibration data."""
    dense = build().eval()
    total = 0.0
    for inputs, _ in images():
        features = dense.norm(dense.conv(inputs)).relu().flatten(1)
        total += float((network.hidden(features) - dense.hidden(features)).square().sum())
    return total


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_optimal_brain_surgeon_loses_less_and_less(scope):
    errors = {}
    for criterion in ("random", "magnitude", "obs", "obs_update"):
        network, compressor = applied(PruneWeights(amount=0.5, criterion=criterion, scope=scope, targets="hidden"))
        assert compressor.masks.pruned == zeros(network, ["hidden.weight"]) == 512
        errors[criterion] = layer_error(network)
    assert errors["obs_update"] < errors["obs"] < errors["random"]
    assert errors["obs_update"] < 0.5 * errors["magnitude"]


@pytest.mark.parametrize(("granularity", "zeros_of_four"), [("2:4", 2), ("1:4", 3)])
def test_optimal_brain_surgeon_of_n_of_m(granularity, zeros_of_four):
    network, compressor = applied(PruneWeights(criterion="obs_update", granularity=granularity, targets="hidden"))
    assert ((network.hidden.weight.view(8, 32, 4) == 0).sum(2) == zeros_of_four).all()
    assert compressor.masks.pruned == zeros(network, ["hidden.weight"])
    plain, _ = applied(PruneWeights(granularity=granularity, targets="hidden"))
    assert layer_error(network) < 0.5 * layer_error(plain)


def test_optimal_brain_surgeon_moves_what_is_left_at_every_update():
    network = build()
    step = PruneWeights(amount=0.6, criterion="obs_update", schedule=Iterative(3), targets="hidden", finetune_epochs=3)
    compressor = compressor_of(network, step, epochs=3)
    found = []
    train(compressor, OPTIMIZERS["sgd"], epochs=3, watch=lambda *_: found.append(zeros(network, ["hidden.weight"])))
    assert [found[0], found[2], found[-1]] == [round(amount * 1024) for amount in (0.2, 0.4, 0.6)]


def test_optimal_brain_surgeon_leaves_out_what_does_not_run_as_a_layer():
    _, compressor = applied(PruneWeights(amount=0.5, criterion="obs_update", targets="Linear"), kind="transformer")
    assert set(compressor.masks.kept) == {path for path in WEIGHTS["transformer"] if "self_attn" not in path}


# schedules


def test_a_cubic_schedule_is_the_formula_at_every_update():
    network, found = build(), []
    step = PruneWeights(amount=0.8, schedule=Cubic(end=0.8, every=2), finetune_epochs=4)
    compressor = compressor_of(network, step, epochs=4)
    train(compressor, OPTIMIZERS["sgd"], epochs=4, watch=lambda *_: found.append(compressor.masks.pruned))
    total, last = count(network, WEIGHTS["cnn"]), 0.8 * 12
    for number, pruned in enumerate(found, start=1):
        passed = number // 2 * 2
        share = 0.8 if number >= last else 0.8 - 0.8 * (1 - passed / last) ** 3
        assert pruned == round(share * total)
    assert found[-1] == zeros(network, WEIGHTS["cnn"])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_iterative_amounts_are_never_compounded_and_nested(scope):
    network, found = build(), []
    step = PruneWeights(amount=0.5, schedule=Iterative(3), scope=scope, finetune_epochs=3)
    compressor = compressor_of(network, step, epochs=3)
    train(compressor, OPTIMIZERS["sgd"], epochs=3, watch=lambda *_: found.append(copy.deepcopy(compressor.masks)))
    amounts = [1 / 6, 1 / 6, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 2]
    for amount, masks in zip(amounts, found, strict=True):
        parts = [WEIGHTS["cnn"]] if scope == "global" else [{path} for path in WEIGHTS["cnn"]]
        for paths in parts:
            assert sum(int((~masks.kept[path]).sum()) for path in paths) == round(amount * count(network, paths))
    for before, after in itertools.pairwise(found):
        assert all(not (after.kept[path] & ~before.kept[path]).any() for path in before.kept)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_regrowth_brings_some_back_and_keeps_the_amount(scope):
    network, found = build(), []
    step = PruneWeights(amount=0.6, schedule=Iterative(3), scope=scope, regrow=0.2, finetune_epochs=3)
    compressor = compressor_of(network, step, epochs=3)
    train(compressor, OPTIMIZERS["sgd"], epochs=3, watch=lambda *_: found.append(copy.deepcopy(compressor.masks)))
    total = count(network, WEIGHTS["cnn"])
    for amount, masks in zip([0.2, 0.2, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6], found, strict=True):
        assert masks.pruned == pytest.approx(amount * total, abs=1 if scope == "global" else 3)
    for number in (2, 5):
        before, after = found[number - 1].kept, found[number].kept
        back = sum(int((after[path] & ~before[path]).sum()) for path in before)
        assert back == pytest.approx(0.2 * found[number - 1].pruned, abs=3)
    back = [network.get_parameter(path)[found[6].kept[path] & ~found[4].kept[path]] for path in WEIGHTS["cnn"]]
    assert torch.cat(back).count_nonzero() > 10  # they learn where the units that they feed are alive


# any training


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_state_are_zero_after_every_step(name, accumulate):
    network = build()
    step = PruneWeights(amount=0.6, schedule=Iterative(2), at=1, finetune_epochs=2)
    compressor = compressor_of(network, step, epochs=4)
    averaged = AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    moved = []

    def watch(_, optimizer):
        assert_zero_under(compressor.masks, network, optimizer)
        averaged.update_parameters(network)
        moved.append(network.hidden.weight.detach().clone())

    train(compressor, OPTIMIZERS[name], epochs=4, accumulate=accumulate, watch=watch)
    kept = compressor.masks.kept["hidden.weight"]
    assert (moved[-1] != moved[-2])[kept].all()
    assert averaged.module.hidden.weight[~kept].count_nonzero() > 0
    network.load_state_dict(averaged.module.state_dict())
    compressor.project()
    assert zeros(network, WEIGHTS["cnn"]) == round(0.6 * count(network, WEIGHTS["cnn"]))


def test_a_nan_under_the_mask_does_not_survive():
    network, compressor = applied(PruneWeights(amount=0.5))
    with torch.no_grad():
        network.hidden.weight[~compressor.masks.kept["hidden.weight"]] = torch.nan
    compressor.project()
    assert not network.hidden.weight.isnan().any()


RESUMED = {
    "cubic": PruneWeights(amount=0.6, schedule=Cubic(), criterion="taylor"),
    "iterative": PruneWeights(amount={"hidden": 0.6}, schedule=Iterative(4)),
    "rewound": PruneWeights(amount=0.6, schedule=Iterative(3), rewind=1),
    "movement": LearnMask(Movement(0.6)),
    "soft": LearnMask(SoftMovement(Threshold(0.45, end=1.0), penalty_weight=10.0)),
    "channels": PruneUnits(amount=0.5, unit="channel", schedule=Cubic()),
    "budget": PruneUnits(budget="params:0.5", unit="channel", schedule=Iterative(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_killed_resumes_bit_for_bit(name):
    def begun():
        step = replace(RESUMED[name], at=2, finetune_epochs=3)
        network = build()
        return network, compressor_of(network, step, epochs=5)

    network, whole = begun()
    expected, _ = train(whole, OPTIMIZERS["adam"], epochs=5)
    whole.finish()
    for until in (2, 3, 4):  # before the phase, in it
        partly_trained, first = begun()
        losses, optimizer = train(first, OPTIMIZERS["adam"], epochs=until)
        file = io.BytesIO()
        torch.save(
            [structure_of(partly_trained), partly_trained.state_dict(), first.state_dict(), optimizer.state_dict()],
            file,
        )
        file.seek(0)
        described, weights, state, moments = torch.load(file, weights_only=True)
        resumed, second = begun()
        rebuild_structure(resumed, described)
        resumed.load_state_dict(weights)
        second.load_state_dict(state)
        optimizer = OPTIMIZERS["adam"](resumed.parameters())
        optimizer.load_state_dict(moments)
        losses += train(second, OPTIMIZERS["adam"], epochs=5, first=until, optimizer=optimizer)[0]
        second.finish()
        assert losses == expected
        assert resumed.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in network.state_dict().items())
        assert second.masks.kept.keys() == whole.masks.kept.keys()
        assert all(torch.equal(mask, second.masks.kept[path]) for path, mask in whole.masks.kept.items())


def resume(name, path):
    state = torch.load(path, weights_only=True)
    network = rebuild_structure(build(), state["structure"])
    network.load_state_dict(state["network"])
    compressor = compressor_of(network, replace(RESUMED[name], at=2, finetune_epochs=3), epochs=5)
    compressor.load_state_dict(state["compressor"])
    optimizer = OPTIMIZERS["adam"](network.parameters())
    optimizer.load_state_dict(state["optimizer"])
    losses, _ = train(compressor, OPTIMIZERS["adam"], epochs=5, first=state["epoch"], optimizer=optimizer)
    compressor.finish()
    torch.save((losses, network.state_dict(), compressor.masks.state_dict()), path)


@pytest.mark.slow
def test_a_run_resumes_in_a_fresh_process(tmp_path, elsewhere):
    name, path = "cubic", tmp_path / "state.pt"
    network = build()
    whole = compressor_of(network, replace(RESUMED[name], at=2, finetune_epochs=3), epochs=5)
    expected, _ = train(whole, OPTIMIZERS["adam"], epochs=5)
    whole.finish()
    partly = build()
    first = compressor_of(partly, replace(RESUMED[name], at=2, finetune_epochs=3), epochs=5)
    losses, optimizer = train(first, OPTIMIZERS["adam"], epochs=3)
    state = {"structure": structure_of(partly), "network": partly.state_dict(), "compressor": first.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict(), "epoch": 3}, path)
    elsewhere(resume, name, path)
    rest, weights, masks = torch.load(path, weights_only=True)
    assert losses + rest == expected
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(mask, masks[key]) for key, mask in whole.masks.kept.items())


# lottery tickets


@pytest.mark.parametrize(("rewind", "epoch"), [("start", 0), (1, 1), (2, 2)])
def test_survivors_go_back_to_the_epoch_bit_for_bit(rewind, epoch):
    network, states, rewound = build(), {}, {}
    compressor = compressor_of(network, PruneWeights(amount=0.7, rewind=rewind, at=3, finetune_epochs=1), epochs=4)
    optimizer = OPTIMIZERS["adam"](network.parameters())
    network.train()
    for number in range(4):
        states[number] = copy.deepcopy(network.state_dict())
        again = compressor.begin_epoch(number, steps_per_epoch=3, optimizer=optimizer)
        assert again == (number == 3)
        if again:
            rewound = copy.deepcopy(network.state_dict())
            assert not optimizer.state
        for inputs, targets in images():
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
    masks = compressor.masks
    assert masks.pruned == round(0.7 * count(network, WEIGHTS["cnn"]))
    for name, value in states[epoch].items():
        kept = masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(rewound[name], value.masked_fill(~kept, 0)), name
    # The ticket is of the trained weights, not of those that it begins with.
    trained = torch.cat([states[3][path].abs().flatten() for path in masks.kept])
    kept = torch.cat([mask.flatten() for mask in masks.kept.values()])
    assert trained[~kept].max() <= trained[kept].min()


def test_iterative_tickets_go_back_at_every_round():
    network, found = build(), []
    step = PruneWeights(
        amount=0.75, schedule=Iterative(2, spacing="geometric"), rewind="start", at=1, finetune_epochs=2
    )
    compressor = compressor_of(network, step, epochs=3)

    def watch(trained, optimizer):
        found.append((copy.deepcopy(trained.state_dict()), compressor.masks.pruned, len(optimizer.state)))

    begun = copy.deepcopy(network.state_dict())
    train(compressor, OPTIMIZERS["adam"], epochs=3, watch=watch)
    # The second round begins after three of six steps, when half of what is left goes.
    state, pruned, moments = found[3 + 2]
    assert (pruned, moments) == (round(0.75 * count(network, WEIGHTS["cnn"])), 0)
    assert found[3 + 1][1] == round(0.5 * count(network, WEIGHTS["cnn"]))
    for name, value in begun.items():
        kept = compressor.masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(state[name], value.masked_fill(~kept, 0)), name


def test_every_round_of_iterative_tickets_begins_with_an_optimiser_of_its_own():
    """Rounds 2 and 3 are drawn in `update`, after the last step of the epoch before them."""

    def compressor_with(network):
        step = PruneWeights(amount=0.75, schedule=Iterative(3), rewind="start", at=1, finetune_epochs=6)
        return compressor_of(network, step, epochs=7)

    network = build()
    compressor, asked = compressor_with(network), []
    optimizer = OPTIMIZERS["adam"](network.parameters())
    for epoch in range(7):
        if epoch == 5:
            # What a run knows that is killed between the epochs.
            other = compressor_with(copy.deepcopy(network))
            other.load_state_dict(compressor.state_dict())
            assert other.begin_epoch(epoch, steps_per_epoch=3, optimizer=optimizer)
        asked.append(compressor.begin_epoch(epoch, steps_per_epoch=3, optimizer=optimizer))
        for inputs, targets in images():
            F.cross_entropy(network(inputs), targets).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
            optimizer.zero_grad()
    assert asked == [False, True, False, True, False, True, False]


def test_the_random_control_has_the_ticket_and_other_weights():
    networks = {}
    for rewind in ("start", "random"):
        network = build()
        compressor = compressor_of(network, PruneWeights(amount=0.7, rewind=rewind, at=1, finetune_epochs=1), epochs=2)
        train(compressor, OPTIMIZERS["sgd"], epochs=1)
        compressor.begin_epoch(1, steps_per_epoch=3)
        networks[rewind] = network, compressor.masks
    (ticket, masks), (control, same) = networks["start"], networks["random"]
    for path, kept in masks.kept.items():
        assert torch.equal(kept, same.kept[path])
        assert control.get_parameter(path)[~kept].count_nonzero() == 0
        assert (control.get_parameter(path) != ticket.get_parameter(path))[kept].all()


# scopes, targets and what is refused


def test_a_sensitivity_scope_spares_the_layer_that_cannot_bear_it():
    network = build()
    nn.init.normal_(network.head.weight, std=5.0, generator=torch.Generator().manual_seed(0))
    dense = copy.deepcopy(network).eval()
    batches = [(inputs, dense(inputs).argmax(1)) for inputs, _ in images()]  # its own answers, which pruning spoils
    compressor = compressor_of(network, PruneWeights(scope=Sensitivity(max_drop=0.1)), batches=batches)
    compressor.apply()
    amounts = compressor.masks.sparsities()
    losses = {}
    for path in WEIGHTS["cnn"]:
        for level in (None, *(number / 10 for number in range(1, 10))):
            tried = copy.deepcopy(dense)
            weight = tried.get_parameter(path)
            order = weight.detach().abs().flatten().argsort()
            weight.data.flatten()[order[: round((level or 0) * len(order))]] = 0
            losses[level] = sum(float(F.cross_entropy(tried(x), y)) for x, y in batches) / len(batches)
        within = [level for level in losses if level is not None and losses[level] - losses[None] <= 0.1]
        assert amounts[path] == pytest.approx(max(within, default=0), abs=1 / network.get_parameter(path).numel())
    assert len({round(amount, 1) for amount in amounts.values()}) > 1
    _, compressor = applied(PruneWeights(scope=Sensitivity(target=0.5, levels=[0.25, 0.5, 0.75]), criterion="taylor"))
    assert 0.5 <= compressor.masks.sparsity() <= 0.75
    for wrong in ({}, {"max_drop": 0.1, "target": 0.5}, {"max_drop": 0.1, "levels": [0.5, 0.3]}):
        with pytest.raises(InputError, match="Sensitivity"):
            Sensitivity(**wrong)


def test_a_step_that_would_hardly_do_anything_says_so():
    class Unknown(nn.Identity):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(40, 40))

    network = nn.Sequential(nn.Linear(4, 4), Unknown(), nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"would work on only 2% of Sequential's weights: name the layers"):
        Compressor(network, [PruneWeights(amount=0.5)], drawn(2, 4)).apply()
    Compressor(network, [PruneWeights(amount=0.5, targets="Linear")], drawn(2, 4)).apply()
    assert (network[0].weight == 0).sum() + (network[2].weight == 0).sum() == 16
    network, compressor = applied(PruneWeights(amount=0.5))
    name = type(network).__name__
    assert compressor.piece.notes == [f"PruneWeights works on 100% of {name}'s weights"]


def test_tied_weights_are_pruned_once():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    network[2].weight = network[0].weight
    compressor = Compressor(network, [PruneWeights(amount=0.5)], drawn(2, 4))
    compressor.apply()
    assert list(compressor.masks.kept) == ["0.weight"]
    assert (network[2].weight == 0).sum() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"amount": 0.5, "granularity": "2:4"}, "exactly one of"),
        ({"amount": 0.5, "schedule": Threshold(0.1)}, "exactly one of"),
        ({"amount": 1.5}, "between 0 and 1"),
        ({"amount": {"a": -0.5}}, "between 0 and 1"),
        ({"amount": {}}, "between 0 and 1"),
        ({"amount": 0.5, "granularity": "channels"}, "granularity must be"),
        ({"amount": 0.5, "granularity": "channel"}, "granularity must be"),
        ({"amount": 0.5, "granularity": "4x8"}, "granularity must be"),
        ({"amount": 0.5, "criterion": "size"}, "criterion must be one of magnitude"),
        ({"amount": 0.5, "criterion": "bn_scale"}, "criterion must be one of magnitude"),
        ({"amount": 0.5, "criterion": "movement"}, "criterion must be one of magnitude"),
        ({"criterion": "obs_update", "schedule": Threshold(0.1)}, "needs an amount"),
        ({"amount": 0.5, "scope": "all"}, "scope must be"),
        ({"granularity": "2:4", "schedule": Cubic()}, "needs OneShot"),
        ({"amount": 0.5, "regrow": 0.5}, "several updates"),
        ({"amount": 0.5, "regrow": 1.0, "schedule": Cubic()}, "below 1"),
        ({"amount": 0.5, "rewind": "start", "schedule": Cubic()}, "OneShot or Iterative"),
        ({"amount": 0.5, "rewind": "begin"}, "rewind must be an epoch"),
        ({"amount": 0.5, "rewind": -1}, "rewind must be an epoch"),
        ({"scope": Sensitivity(max_drop=0.1), "amount": 0.5}, "exactly one of"),
        ({"scope": "layer", "schedule": Threshold(0.1)}, "has no effect with a Threshold"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        PruneWeights(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        LearnMask(Movement(0.5)),
        LearnMask(SoftMovement()),
        PruneWeights(amount=0.5, schedule=Cubic()),
        PruneWeights(schedule=Threshold(0.1, end=0.5)),
        PruneWeights(amount=0.5, rewind="start"),
    ],
    ids=repr,
)
def test_what_needs_training_says_so(step):
    with pytest.raises(InputError, match=rf"step 1 \({step.title}\): .*train"):
        applied(step)
    with pytest.raises(InputError, match="give it finetune_epochs"):
        compressor_of(build(), step, epochs=2)


def test_an_epoch_that_has_not_been_cannot_be_gone_back_to():
    compressor = compressor_of(build(), PruneWeights(amount=0.5, rewind=3, at=1, finetune_epochs=2), epochs=3)
    with pytest.raises(InputError, match="epoch 3 did not begin before"):
        train(compressor, OPTIMIZERS["sgd"], epochs=3)


def test_masks_come_after_structure():
    assert PruneWeights(amount=0.5).order is Order.MASKS
    assert PruneUnits(amount=0.5, unit="head").order is Order.STRUCTURE
    applied(PruneUnits(amount=0.5, unit="channel"), PruneWeights(amount=0.5))
    with pytest.raises(InputError, match="cannot come after"):
        applied(PruneWeights(amount=0.5), PruneUnits(amount=0.5, unit="channel"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_step_can_be_used_again(name):
    step = replace(RESUMED[name], at=1, finetune_epochs=2)
    found = []
    for _ in range(2):
        network = build()
        compressor = compressor_of(network, step, epochs=3)
        losses, _ = train(compressor, OPTIMIZERS["adam"], epochs=3)
        compressor.finish()
        found.append(losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("amount", ["", [], "0.5", True, {"head": "much"}])
@pytest.mark.parametrize("step", [PruneWeights, partial(PruneUnits, unit="channel")])
def test_an_amount_that_is_no_number_is_refused(step, amount):
    with pytest.raises(InputError, match="amount must be a number, or one for each pattern of layers, got"):
        step(amount=amount)
