"""Masks keep pruned weights at zero whatever the optimiser does, and selection prunes exactly what it was asked to."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from distill_lightning import InputError
from distill_lightning.compression.mask.masks import Masks, lowest, regrow
from distill_lightning.compression.mask.selection import Granularity, choose, select, select_below


class Mixed(nn.Module):
    """A convolution, BatchNorm, an LSTM over the rows and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(16, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        features = self.norm(self.conv(images)).relu()
        hidden, _ = self.lstm(features.transpose(1, 2).flatten(2))
        return self.head(hidden[:, -1])


PATHS = ["conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def magnitudes(network, paths=PATHS):
    return {path: network.get_parameter(path).detach().abs() for path in paths}


def images(number):
    return drawn(6, 1, 4, 4, seed=number, dtype=torch.float32), torch.arange(6) % 3


def step(network, masks, optimizer, number, *, accumulate=1):
    optimizer.zero_grad()
    for part in range(accumulate):
        inputs, targets = images(100 * part + number)
        loss = F.cross_entropy(network(inputs), targets)
        loss.backward()
    masks.project_gradients(network)
    optimizer.step()
    masks.project(network)
    return loss.item()


def assert_zero_under(masks, network, optimizer=None):
    for path, kept in masks.kept.items():
        parameter = network.get_parameter(path)
        assert parameter[~kept].count_nonzero() == 0
        for name, value in optimizer.state[parameter].items() if optimizer else ():
            if name != "step":
                assert value[~kept].count_nonzero() == 0
                assert value[kept].count_nonzero() > 0


# what training does to pruned weights


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_state_stay_zero_and_the_others_move(name, accumulate):
    network = Mixed()
    optimizer = OPTIMIZERS[name](network.parameters())
    step(network, Masks(), optimizer, 0)  # momentum of weights that are then pruned
    masks = select(magnitudes(network), 0.6)
    masks.project(network)
    masks.project_optimizer(network, optimizer)
    before = copy.deepcopy(network)
    for number in range(1, 6):
        step(network, masks, optimizer, number, accumulate=accumulate)
        assert_zero_under(masks, network, optimizer)
    for path, kept in masks.kept.items():
        assert (network.get_parameter(path) != before.get_parameter(path))[kept].all()
    assert masks.sparsity() == pytest.approx(0.6, abs=0.01)


def test_without_projection_momentum_brings_pruned_weights_back():
    network = Mixed()
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    step(network, Masks(), optimizer, 0)
    masks = select(magnitudes(network), 0.6)
    masks.project(network)
    step(network, Masks(), optimizer, 1)
    with pytest.raises(AssertionError):
        assert_zero_under(masks, network)


def test_a_weight_that_is_kept_trains_as_without_masks():
    network = Mixed()
    plain = copy.deepcopy(network)
    masks = select(magnitudes(network), 0.0)
    one, other = (OPTIMIZERS["adamw"](net.parameters()) for net in (network, plain))
    masks.project_optimizer(network, one)
    for number in range(3):
        assert step(network, masks, one, number) == step(plain, Masks(), other, number)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_averaged_weights_have_exact_zeros_after_projection():
    network = Mixed()
    averaged = AveragedModel(network)  # begins before pruning, so it remembers what was pruned
    optimizer = OPTIMIZERS["adam"](network.parameters())
    averaged.update_parameters(network)
    masks = select(magnitudes(network), 0.5)
    masks.project(network)
    for number in range(3):
        step(network, masks, optimizer, number)
        averaged.update_parameters(network)
    with pytest.raises(AssertionError):
        assert_zero_under(masks, averaged.module)
    masks.project(averaged.module)
    assert_zero_under(masks, averaged.module)


def test_bf16_autocast_keeps_the_zeros():
    network = Mixed()
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    masks = select(magnitudes(network), 0.5)
    masks.project(network)
    for number in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(network(images(number)[0]), images(number)[1])
        loss.backward()
        masks.project_gradients(network)
        optimizer.step()
        masks.project(network)
    assert_zero_under(masks, network, optimizer)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_does_not_survive_under_the_mask(bad):
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    masks = Masks({"weight": torch.tensor([[True, False, True], [False, True, True]])})
    with torch.no_grad():
        for tensor in (network.weight, network.weight.grad, optimizer.state[network.weight]["momentum_buffer"]):
            tensor[0, 1] = bad
    masks.project(network)
    masks.project_gradients(network)
    masks.project_optimizer(network, optimizer)
    for tensor in (network.weight, network.weight.grad, optimizer.state[network.weight]["momentum_buffer"]):
        assert tensor[0, 1] == 0
        assert tensor[1, 0] == 0
        assert tensor.isfinite().all()
        assert tensor[0, 0] != 0


def test_the_network_keeps_its_keys_copies_pickles_and_its_parameters_themselves():
    network = Mixed()
    keys, same = list(network.state_dict()), [id(p) for p in network.parameters()]
    masks = select(magnitudes(network), 0.5)
    masks.project(network)
    network(images(0)[0]).sum().backward()
    assert list(network.state_dict()) == keys
    assert [id(p) for p in network.parameters()] == same
    expected = network.eval()(images(0)[0])
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images(0)[0]), expected)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit():
    network = Mixed()
    optimizer = OPTIMIZERS["adamw"](network.parameters())
    masks = select(magnitudes(network), 0.7)
    masks.project(network)
    step(network, masks, optimizer, 0)
    file = io.BytesIO()
    torch.save({"net": network.state_dict(), "opt": optimizer.state_dict(), "masks": masks.state_dict()}, file)
    losses = [step(network, masks, optimizer, number) for number in (1, 2)]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    fresh = Mixed()
    fresh.load_state_dict(saved["net"])
    other = OPTIMIZERS["adamw"](fresh.parameters())
    other.load_state_dict(saved["opt"])
    loaded = Masks()
    loaded.load_state_dict(saved["masks"])
    assert loaded.kept.keys() == masks.kept.keys()
    assert all(torch.equal(loaded.kept[path], kept) for path, kept in masks.kept.items())
    assert loaded.sparsity() == masks.sparsity()
    assert [step(fresh, loaded, other, number) for number in (1, 2)] == losses
    assert_zero_under(loaded, fresh, other)


def test_masks_count_what_they_prune_and_say_so():
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])})
    assert (masks.total, masks.pruned, masks.sparsity()) == (6, 3, 0.5)
    assert masks.sparsities() == {"a": 0.75, "b": 0.0}
    assert repr(masks) == "Masks(2 parameters, 50.0% of 6 pruned)"
    assert Masks().sparsity() == 0


def test_given_masks_are_copied():
    given = torch.ones(2, dtype=torch.bool)
    masks = Masks({"a": given})
    given[0] = False
    assert masks.pruned == 0


def test_a_scalar_parameter_loses_its_momentum_but_not_its_step_count():
    network = nn.Module()
    network.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam(network.parameters())
    network.scale.square().backward()
    optimizer.step()
    Masks({"scale": torch.tensor(False)}).project_optimizer(network, optimizer)
    state = optimizer.state[network.scale]
    assert (state["step"].item(), state["exp_avg"].item(), state["exp_avg_sq"].item()) == (1, 0, 0)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "'weight' must be a bool tensor, True where weights stay, got torch.float32"),
        ({"weight": [True]}, "must be a bool tensor.*got list"),
        ({"weight": torch.ones(3, 2, dtype=torch.bool)}, r"has shape \(3, 2\), the parameter \(2, 3\)"),
        ({"wieght": torch.ones(2, 3, dtype=torch.bool)}, "no parameter 'wieght'; similar names: weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(InputError, match=message):
        Masks(kept).project(nn.Linear(3, 2))


# exact amounts


def naive(scores, amount):
    """Positions of the lowest, by a stable sort of everything but the last of the best of each."""
    flat, best = [], set()
    for score in scores.values():
        own = score.flatten().tolist()
        best.add(len(flat) + max(range(len(own)), key=lambda i: (own[i], i)))
        flat += own
    order = sorted(set(range(len(flat))) - best, key=lambda i: flat[i])
    return set(order[: round(amount * len(flat))])


def pruned_positions(masks):
    flat = torch.cat([kept.flatten() for kept in masks.kept.values()])
    return set((~flat).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("amount", [0.0, 0.123, 0.3, 1 / 3, 0.5, 0.9, 1.0])
def test_global_selection_is_the_stable_sort_and_exact(amount):
    scores = {"a": drawn(7, 5).abs(), "b": drawn(3, 4, seed=1).abs(), "c": drawn(11, seed=2).abs()}
    masks = select(scores, amount)
    assert pruned_positions(masks) == naive(scores, amount)
    assert masks.pruned == min(round(amount * 58), 58 - 3)


@pytest.mark.parametrize("amount", [0.0, 0.123, 0.3, 1 / 3, 0.5, 0.9, 1.0])
def test_selection_within_layers_is_exact_in_each(amount):
    scores = {"a": drawn(7, 5).abs(), "b": drawn(3, 4, seed=1).abs()}
    masks = select(scores, amount, scope="layer")
    for path, score in scores.items():
        assert pruned_positions(Masks({path: masks.kept[path]})) == naive({path: score}, amount)


def test_each_layer_has_its_own_ratio():
    scores = {"a": drawn(10, 10).abs(), "b": drawn(20, seed=1).abs()}
    masks = select(scores, {"a": 0.37, "b": 0.5})
    assert masks.sparsities() == {"a": pytest.approx(0.37), "b": 0.5}


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.77])
def test_ties_never_overshoot(value, amount):
    scores = {"a": torch.full((10, 10), value), "b": torch.full((30,), value)}
    assert select(scores, amount).pruned == round(amount * 130)


def test_ties_at_the_threshold_alone_are_exact():
    scores = {"a": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0])}
    kept = select(scores, 0.5).kept["a"].tolist()
    assert kept == [False, False, False, False, True, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lowest_is_exact_in_any_type(dtype):
    scores = drawn(1000).to(dtype)
    for count in (0, 1, 500, 1000):
        assert lowest(scores, count).sum() == count


def test_amounts_are_final_not_compounded():
    network = nn.Linear(40, 25)
    masks = None
    for amount in (0.3, 0.5, 0.8):
        masks = select({"weight": network.weight.detach().abs()}, amount, previous=masks)
        masks.project(network)
        assert masks.pruned == round(amount * 1000)


def test_what_was_pruned_stays_pruned_without_regrowth_and_competes_with_it():
    before = Masks({"a": torch.tensor([True, True, False, False])})
    scores = {"a": torch.tensor([1.0, 2.0, 9.0, 8.0])}
    assert select(scores, 0.75, previous=before).kept["a"].tolist() == [False, True, False, False]
    assert select(scores, 0.25, previous=before).kept["a"].tolist() == [True, True, False, False]
    assert select(scores, 0.5).kept["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_one_unit_of_each_layer_stays(scope):
    scores = {"a": torch.tensor([0.1, 0.3, 0.2]), "b": torch.arange(5.0, 105.0)}
    masks = select(scores, 1.0, scope=scope)
    assert [kept.nonzero()[:, 0].tolist() for kept in masks.kept.values()] == [[1], [99]]
    assert select(scores, 0.5, scope="global").kept["a"].tolist() == [False, True, False]
    assert select(scores, 0.5, scope="global").pruned == round(0.5 * 103)


def test_units_that_are_gone_do_not_return_for_a_smaller_amount():
    gone = {"a": torch.tensor([True, False, True, False])}
    assert choose({"a": torch.arange(4.0)}, 0.25, gone=gone)["a"].tolist() == [False, True, False, True]


def test_a_layer_that_is_gone_altogether_stays_gone():
    before = Masks({"a": torch.zeros(3, dtype=torch.bool)})
    assert select({"a": torch.ones(3), "b": torch.ones(3)}, 0.5, previous=before).kept["a"].sum() == 0


# granularities


def test_rows_go_as_a_whole_by_their_mean_or_sum():
    score = torch.tensor([[1.0, 1.0], [9.0, 0.0], [2.0, 2.0], [0.5, 4.0]])
    wide = torch.tensor([[1.5] * 8, [0.1] * 8])
    assert select({"a": score}, 0.5, granularity="row").kept["a"].all(1).tolist() == [False, True, False, True]
    means = select({"a": score, "b": wide}, 0.5, granularity="row", reduce="mean")
    assert means.kept["b"].all(1).tolist() == [True, False]
    sums = select({"a": score, "b": wide}, 0.5, granularity="row", reduce="sum")
    assert sums.kept["b"].all(1).tolist() == [True, False]
    assert sums.kept["a"].all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (4, 3, 3, 3), (9,)])
@pytest.mark.parametrize("block", [(2, 3), (4, 4), (1, 5)])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_blocks_are_all_or_nothing_exactly_so_many_and_the_lowest(shape, block, reduce):
    score = drawn(*shape).abs()
    masks = select({"a": score}, 0.4, granularity=f"block:{block[0]}x{block[1]}", reduce=reduce)
    matrix, kept = score.reshape(shape[0], -1), masks.kept["a"].reshape(shape[0], -1)
    values, alive = [], []
    for row in range(0, matrix.shape[0], block[0]):
        for column in range(0, matrix.shape[1], block[1]):
            part = (slice(row, row + block[0]), slice(column, column + block[1]))
            assert kept[part].all() or not kept[part].any()
            values.append(getattr(matrix[part], reduce)().item())
            alive.append(kept[part].all().item())
    assert alive.count(False) == round(0.4 * len(alive))
    assert max(v for v, stays in zip(values, alive, strict=True) if not stays) < min(
        v for v, stays in zip(values, alive, strict=True) if stays
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("shape", [(5, 8), (3, 8, 3, 3), (4, 4, 5)])
@pytest.mark.parametrize("equal", [True, False])
def test_n_of_m_keeps_the_best_n_of_every_m_inputs(n, m, shape, equal):
    score = torch.ones(shape) if equal else drawn(*shape).abs()
    kept = select({"a": score}, None, granularity=f"{n}:{m}").kept["a"]
    for index in (
        torch.cartesian_prod(*[torch.arange(size) for size in (shape[0], *shape[2:], shape[1] // m)])
        .view(-1, len(shape))
        .tolist()
    ):
        row, *rest, group = index
        part = (row, slice(group * m, (group + 1) * m), *rest)
        assert kept[part].sum() == n
        assert score[part][kept[part]].min() >= score[part].topk(n).values[-1]


def test_n_of_m_keeps_to_masks_before():
    before = Masks({"a": torch.tensor([[True, False, False, False, True, True, True, True]])})
    kept = select({"a": torch.arange(8.0)[None]}, None, granularity="2:4", previous=before).kept["a"]
    assert kept.tolist() == [[True, False, False, False, False, False, True, True]]


@pytest.mark.parametrize("text", ["weights", "block", "block:0x2", "block:2", "4:2", "4:4", "0:4", ":4", "2:4 "])
def test_unknown_granularities_are_refused(text):
    with pytest.raises(InputError, match="granularity must be 'weight', 'row', 'block:4x8' or '2:4'"):
        Granularity.parse(text)


def test_a_threshold_prunes_what_is_below_and_leaves_one():
    scores = {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "b": torch.tensor([0.1, 0.3, 0.2])}
    masks = select_below(scores, 2.0)
    assert masks.kept["a"].tolist() == [[False, True], [True, True]]
    assert masks.kept["b"].tolist() == [False, True, False]
    assert select_below(scores, 0.2).kept["b"].tolist() == [False, True, True]
    rows = select_below({"a": scores["a"]}, 2.0, granularity="row", previous=masks)
    assert rows.kept["a"].tolist() == [[False, True], [True, True]]
    with pytest.raises(InputError, match="so there is no threshold"):
        select_below(scores, 1.0, granularity="2:4")


# regrowth


def test_regrowth_takes_exactly_the_most_promising():
    masks = Masks({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([False, True, False, False])})
    scores = {"a": torch.tensor([[9.0, 1.0], [5.0, 2.0]]), "b": torch.tensor([4.0, 9.0, 0.0, 3.0])}
    grown = regrow(masks, scores, 0.5)
    assert masks.pruned - grown.pruned == round(0.5 * 6)
    assert grown.kept["a"].tolist() == [[True, False], [True, False]]
    assert grown.kept["b"].tolist() == [True, True, False, True]
    assert regrow(masks, scores, 0.0).pruned == 6
    assert regrow(masks, scores, 1.0).pruned == 0
    assert regrow(Masks(), {}, 0.5).total == 0
    assert regrow(masks, {path: torch.zeros_like(score) for path, score in scores.items()}, 0.5).pruned == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: select(s, 1.1), "amount is a share of all units, between 0 and 1, got 1.1"),
        (lambda s: select(s, float("nan")), "between 0 and 1, got nan"),
        (lambda s: select(s, None), "granularity 'weight' needs an amount"),
        (lambda s: select(s, 0.5, granularity="2:4"), "fixes the amount: leave amount out"),
        (lambda s: select(s, None, granularity="2:4"), r"shape \(2, 3\), are not a multiple of 4"),
        (lambda s: select(s, 0.5, scope="net"), "scope must be one of global, layer, got 'net'"),
        (lambda s: select(s, 0.5, reduce="max"), "reduce must be one of mean, sum, got 'max'"),
        (lambda s: select(s, {"b": 0.5}), "amount has no entry for 'a'"),
        (lambda s: select({"a": s["a"] * float("nan")}, 0.5), "the scores of 'a' hold NaN"),
        (lambda s: select({}, 0.5), "no scores are given"),
        (
            lambda s: select(s, 0.5, previous=Masks({"a": torch.ones(2, dtype=torch.bool)})),
            "previous mask of 'a' has shape",
        ),
        (lambda s: choose({"a": torch.ones(2)}, -0.1), "got -0.1"),
        (lambda s: regrow(Masks({"a": torch.zeros(2, 3, dtype=torch.bool)}), s, 2), "between 0 and 1, got 2"),
        (lambda s: regrow(Masks({"b": torch.zeros(2, dtype=torch.bool)}), s, 0.5), "'b' has no scores of its shape"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call({"a": torch.ones(2, 3)})
    assert "\n" not in str(caught.value)


# an empty step


def test_amount_zero_is_the_identity():
    network = Mixed()
    before = copy.deepcopy(network.state_dict())
    for granularity in ("weight", "row", "block:2x2"):
        masks = select(magnitudes(network), 0.0, granularity=granularity)
        assert masks.pruned == 0
        masks.project(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
