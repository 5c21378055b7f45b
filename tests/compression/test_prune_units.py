"""The step that prunes channels, hidden units, neurons, heads and layers: what is masked is what leaves."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.mask import criteria
from distill_lightning.compression.mask.lottery import copy_state
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.recurrent import unit_groups
from distill_lightning.compression.steps import PruneUnits, PruneWeights, Sensitivity
from distill_lightning.compression.steps.schedules import Cubic, Iterative, Threshold
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of
from distill_lightning.networks import SmallResNet


class Recurrent(nn.Module):
    def __init__(self, layers=2, *, bidirectional=True):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(16 if bidirectional else 8, 3)

    def forward(self, inputs):
        return self.head(self.lstm(inputs)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 12)
        layer = nn.TransformerEncoderLayer(12, 4, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():  # whose layers begin as copies of one
            nn.init.normal_(parameter, std=0.4)
        self.head = nn.Linear(12, 3)

    def forward(self, inputs):
        return self.head(self.encoder(self.embed(inputs)).mean(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def resnet():
    network = SmallResNet(3, width=8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


NETWORKS = {"cnn": resnet, "lstm": Recurrent, "transformer": Transformer}
SHAPES = {"cnn": (1, 8, 8), "lstm": (5, 6), "transformer": (5, 6)}
KINDS = [
    ("cnn", "channel"),
    ("lstm", "hidden_unit"),
    ("transformer", "head"),
    ("transformer", "neuron"),
    ("transformer", "layer"),
]
MASKABLE = KINDS[:-1]


def build(kind):
    torch.manual_seed(3)
    return NETWORKS[kind]()


def data(kind):
    return [(drawn(6, *SHAPES[kind], seed=seed), torch.arange(6) % 3) for seed in range(2)]


def make(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)


def compressor_of(kind, network, *steps, **options):
    batches = data(kind)
    return Compressor(network, steps, batches[0][0], **{"batches": batches, "bn_batches": 0, **options})


def applied(kind, *steps, **options):
    network = build(kind)
    compressor = compressor_of(kind, network, *steps, **options)
    compressor.apply()
    return network, compressor


def train(kind, compressor, *, epochs, first=0, watch=lambda *_: None):
    network = compressor.network.train()
    optimizer = make(network.parameters())
    for epoch in range(first, epochs):
        if compressor.begin_epoch(epoch, steps_per_epoch=2, optimizer=optimizer):
            optimizer = make(network.parameters())
        for inputs, targets in data(kind):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            compressor.before_optimizer_step()
            optimizer.step()
            compressor.after_optimizer_step(optimizer)
            watch(network, optimizer)


def sizes(network):
    return sum(parameter.numel() for parameter in network.parameters())


def assert_rebuilds(kind, network):
    """A network built anew takes the description and the weights, strictly, and gives the same, for other sizes too."""
    description = json.loads(json.dumps(structure_of(network)))
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    # Nothing keeps its old size, not even in the storage.
    assert (
        len(file.getvalue())
        < 4 * sum(v.numel() for v in network.state_dict().values()) + 600 * len(network.state_dict()) + 4000
    )
    again = rebuild_structure(NETWORKS[kind](), description)
    again.load_state_dict(torch.load(file, weights_only=True), strict=True)
    extra = [drawn(1, *SHAPES[kind]), drawn(3, *SHAPES[kind], seed=1)]
    extra += [drawn(2, 1, 12, 12)] if kind == "cnn" else [drawn(2, 3, 6)]
    for inputs in extra:
        assert torch.equal(again.eval()(inputs), network.eval()(inputs))


# amounts and shapes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), KINDS)
@pytest.mark.parametrize("criterion", ["magnitude", "random", "gradient", "taylor", "obd", "snip"])
def test_units_leave_the_tensors_and_the_network_can_be_rebuilt(kind, granularity, criterion):
    network, compressor = applied(kind, PruneUnits(amount=0.5, unit=granularity, criterion=criterion))
    assert compressor.masks.kept == {}
    assert sizes(network) < 0.9 * sizes(build(kind))
    assert_rebuilds(kind, network)
    assert network.head.out_features == 3


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_the_share_leaves(scope):
    network, _ = applied("cnn", PruneUnits(amount=0.5, unit="channel", scope=scope))
    before = channel_groups(build("cnn"), drawn(1, 1, 8, 8))
    left = {group.name: group.size for group in channel_groups(network, drawn(1, 1, 8, 8))}
    if scope == "layer":
        assert left == {group.name: group.size // 2 for group in before}
    else:
        assert sum(left.get(group.name, 1) for group in before) == sum(group.size for group in before) // 2
    network, _ = applied("lstm", PruneUnits(amount=0.25, unit="hidden_unit"))
    assert network.lstm.hidden_size == 6
    network, _ = applied("transformer", PruneUnits(amount=0.5, unit="head", scope="layer"))
    assert [layer.self_attn.num_heads for layer in network.encoder.layers] == [2, 2, 2]
    network, _ = applied("transformer", PruneUnits(amount=0.25, unit="neuron", scope="layer"))
    assert [layer.linear1.out_features for layer in network.encoder.layers] == [12, 12, 12]
    network, _ = applied("transformer", PruneUnits(amount=1 / 3, unit="layer"))
    assert len(network.encoder.layers) == 2


def test_half_of_the_channels_is_a_quarter_of_the_parameters():
    network, _ = applied("cnn", PruneUnits(amount=0.5, unit="channel", scope="layer"))
    assert 0.2 < sizes(network) / sizes(build("cnn")) < 0.3


@pytest.mark.slow
def test_a_resnet18_with_half_of_its_channels_has_the_published_size():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    Compressor(network, [PruneUnits(amount=0.5, unit="channel", scope="layer")], drawn(1, 3, 64, 64)).apply()
    assert sizes(network) == 3_055_880  # torch-pruning's README
    with torch.inference_mode():
        assert network.eval()(drawn(3, 3, 64, 64)).shape == network(drawn(3, 3, 96, 80)).shape == (3, 1000)


def test_one_unit_stays_in_every_layer():
    network, _ = applied("cnn", PruneUnits(amount=1.0, unit="channel"))
    assert all(module.out_channels == 1 for module in network.modules() if isinstance(module, nn.Conv2d))
    assert_rebuilds("cnn", network)
    assert applied("transformer", PruneUnits(amount=1.0, unit="layer"))[0].encoder.num_layers == 1


def test_the_layer_of_least_worth_leaves():
    network = build("transformer")
    with torch.no_grad():
        for parameter in network.encoder.layers[1].parameters():
            parameter.mul_(0.1)
    first, _, third = network.encoder.layers
    compressor_of("transformer", network, PruneUnits(amount=1 / 3, unit="layer")).apply()
    assert list(network.encoder.layers) == [first, third]


def naive_channel_scores(network, group):
    """The mean absolute weight of all matrix entries that leave with a channel, one by one."""
    scores = []
    for unit in range(group.size):
        total, number = 0.0, 0
        for member in group.members:
            weight = getattr(network.get_submodule(member.path), "weight", None)
            if weight is None or weight.dim() < 2:
                continue
            for position, channel in enumerate(member.channels.tolist()):
                if channel == unit:
                    part = weight.select(0 if member.axis == "out" else 1, position)
                    total, number = total + float(part.abs().sum()), number + part.numel()
        scores.append(total / number)
    return torch.tensor(scores)


def test_the_channels_of_least_magnitude_leave():
    dense = build("cnn")
    groups = channel_groups(dense, drawn(1, 1, 8, 8))
    scores = {group.name: naive_channel_scores(dense, group) for group in groups}
    # In competition with those of their own layer, because larger layers have smaller weights.
    scores = {name: score / score.mean() for name, score in scores.items()}
    limit = torch.cat(list(scores.values())).sort().values
    wanted = {name: int((score >= limit[len(limit) // 2]).sum()) for name, score in scores.items()}
    network, _ = applied("cnn", PruneUnits(amount=0.5, unit="channel"))
    left = {group.name: group.size for group in channel_groups(network, drawn(1, 1, 8, 8))}
    assert all(left.get(name, 1) == max(count, 1) for name, count in wanted.items())
    group = groups[0]
    kept = scores[group.name].topk(wanted[group.name]).indices.sort().values
    filters = dense.get_submodule(group.name).weight[kept, :1]
    assert torch.equal(network.get_submodule(group.name).weight[:, :1], filters)


def test_hidden_units_of_least_taylor_score_leave_each_layer_and_direction():
    dense = build("lstm")
    (group,) = unit_groups(dense, drawn(1, 5, 6))
    names = [name for name, _ in dense.lstm.named_parameters(prefix="lstm")] + ["head.weight"]
    scores = group.scores(dense, criteria.taylor(dense, names, data("lstm"), F.cross_entropy)).view(4, 8)
    network, _ = applied("lstm", PruneUnits(amount=0.5, unit="hidden_unit", criterion="taylor"))
    for block, suffix in enumerate(("_l0", "_l0_reverse", "_l1", "_l1_reverse")):
        kept = scores[block].topk(4).indices.sort().values
        bias = getattr(dense.lstm, f"bias_ih{suffix}").view(4, 8)[:, kept].flatten()
        assert torch.equal(getattr(network.lstm, f"bias_ih{suffix}"), bias)


def test_bn_scale_is_the_norms_and_refuses_channels_without_one():
    network = build("cnn")
    network.stem[1].weight.data[:4] = 1e-3
    compressor_of(
        "cnn", network, PruneUnits(amount=0.5, unit="channel", criterion="bn_scale", targets="stage1.0.conv1")
    ).apply()
    scales = build("cnn").stage1[0].norm1.weight.abs()
    assert torch.equal(network.stage1[0].norm1.weight, scales[scales.topk(4).indices.sort().values])
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(InputError, match="'bn_scale': '0' has no BatchNorm"):
        Compressor(mlp, [PruneUnits(amount=0.5, unit="channel", criterion="bn_scale")], drawn(1, 4)).apply()


def test_a_multiple_stays():
    network, _ = applied("cnn", PruneUnits(amount=0.6, unit="channel", round_to=4))
    left = [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(count % 4 == 0 for count in left)
    assert sizes(network) < 0.6 * sizes(build("cnn"))


def test_patterns_targets_and_exclude_choose_groups():
    network, _ = applied("cnn", PruneUnits(amount={"stage1*": 0.5, "stage3*": 0.25}, unit="channel"))
    assert network.stage1[0].conv1.out_channels == 4
    assert network.stage2[0].conv1.out_channels == 16
    assert network.stage3[0].conv1.out_channels == 24
    network, _ = applied("cnn", PruneUnits(amount=0.5, unit="channel", targets="stage1"))
    assert (network.stage1[0].conv1.out_channels, network.stage2[0].conv1.out_channels) == (4, 16)
    network, _ = applied("cnn", PruneUnits(amount=0.5, scope="layer", unit="channel", exclude="stage1"))
    assert (network.stage1[0].conv1.out_channels, network.stage2[0].conv1.out_channels) == (8, 8)
    with pytest.raises(InputError, match="'stage9' matches none"):
        applied("cnn", PruneUnits(amount=0.5, unit="channel", targets="stage9"))


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["macs:0.8", "params:0.6"])
def test_a_budget_is_met_by_the_smallest_amount(budget):
    measure, share = budget.split(":")
    inputs, chosen = data("cnn")[0][0], {"unit": "channel", "targets": ["stage2.0.conv1", "stage3.0.conv1"]}
    cost = sizes if measure == "params" else lambda network: count_macs(network, inputs).dense
    network, _ = applied("cnn", PruneUnits(budget=budget, **chosen))
    limit = float(share) * cost(build("cnn"))
    assert cost(network) <= limit
    costs = (cost(applied("cnn", PruneUnits(amount=n / 48, **chosen))[0]) for n in range(48))
    assert cost(network) == next(value for value in costs if value <= limit)


def test_a_budget_out_of_reach_says_so():
    with pytest.raises(InputError, match="budget 'params:0.001' cannot be met"):
        applied("cnn", PruneUnits(budget="params:0.001", unit="channel"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), KINDS)
def test_a_sensitivity_scope(kind, granularity):
    step = PruneUnits(scope=Sensitivity(target=0.4, levels=[0.25, 0.5]), unit=granularity)
    network, _ = applied(kind, step)
    assert sizes(network) < sizes(build(kind))
    assert_rebuilds(kind, network)
    step = PruneUnits(scope=Sensitivity(max_drop=-100.0), unit=granularity)  # none can bear it
    network, _ = applied(kind, step)
    assert sizes(network) == sizes(build(kind))


# masked and shrunk


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), MASKABLE)
@pytest.mark.parametrize("schedule", [Cubic(), Iterative(2), Threshold(0.12, end=0.5)])
def test_what_was_masked_leaves_and_the_outputs_stay(kind, granularity, schedule):
    network = build(kind)
    amount = None if isinstance(schedule, Threshold) else 0.5
    if granularity in ("head", "neuron") and amount is None:
        schedule = Threshold(0.32, end=0.5)
    if granularity == "hidden_unit" and amount is None:
        schedule = Threshold(0.18, end=0.5)
    step = PruneUnits(amount=amount, unit=granularity, schedule=schedule, finetune_epochs=2)
    compressor = compressor_of(kind, network, step, epochs=2)

    def watch(trained, optimizer):
        for path, kept in compressor.masks.kept.items():
            parameter = trained.get_parameter(path)
            assert parameter[~kept].count_nonzero() == 0
            assert optimizer.state[parameter]["momentum_buffer"][~kept].count_nonzero() == 0

    train(kind, compressor, epochs=2, watch=watch)
    assert compressor.masks.pruned > 0
    masked, full = [network.eval()(inputs) for inputs, _ in data(kind)], sizes(network)
    compressor.finish()
    assert sizes(network) < full
    assert compressor.masks.kept == {}
    for (inputs, _), before in zip(data(kind), masked, strict=True):
        torch.testing.assert_close(network.eval()(inputs), before, atol=1e-5, rtol=1e-5)
    assert_rebuilds(kind, network)
    if amount is not None:
        once = applied(kind, PruneUnits(amount=0.5, unit=granularity))[0]
        assert sizes(network) == pytest.approx(sizes(once), rel=0.3)


def test_amounts_of_masked_units_follow_the_schedule():
    network, found = build("lstm"), []
    step = PruneUnits(amount=0.5, unit="hidden_unit", schedule=Iterative(4), finetune_epochs=4)
    compressor = compressor_of("lstm", network, step, epochs=4)

    def watch(trained, _):
        rows = trained.lstm.bias_ih_l1.view(4, 8)
        found.append(int((rows == 0).all(0).sum()))

    train("lstm", compressor, epochs=4, watch=watch)
    # Two steps an epoch; each quarter of the eight begins a quarter of them.
    assert found == [1, 2, 2, 3, 3, 4, 4, 4]
    compressor.finish()
    assert network.lstm.hidden_size == 4


@pytest.mark.slow
def test_a_budget_under_a_schedule_is_met_in_the_end():
    network = build("cnn")
    step = PruneUnits(budget="params:0.4", unit="channel", schedule=Cubic(), finetune_epochs=2, criterion="taylor")
    compressor = compressor_of("cnn", network, step, epochs=2)
    train("cnn", compressor, epochs=2)
    compressor.finish()
    assert 0.3 * sizes(build("cnn")) < sizes(network) <= 0.4 * sizes(build("cnn"))


@pytest.mark.slow
def test_the_whole_phase_needs_another_optimiser_when_units_leave():
    network = build("cnn")
    step = PruneUnits(amount=0.5, unit="channel", schedule=Cubic(), finetune_epochs=1)
    compressor = compressor_of("cnn", network, step, epochs=2)
    optimizer = make(network.parameters())
    assert not compressor.begin_epoch(0, steps_per_epoch=1, optimizer=optimizer)
    compressor.after_optimizer_step(optimizer)
    assert compressor.begin_epoch(1, steps_per_epoch=1, optimizer=optimizer)
    once = compressor_of("cnn", build("cnn"), PruneUnits(amount=0.5, unit="channel"), epochs=1)
    assert once.begin_epoch(0, steps_per_epoch=1, optimizer=None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), KINDS)
def test_one_shot_leaves_the_sizes_alone_while_training_goes_on(kind, granularity):
    network = build(kind)
    compressor = compressor_of(kind, network, PruneUnits(amount=0.5, unit=granularity, finetune_epochs=2), epochs=2)
    train(kind, compressor, epochs=2)
    compressor.finish()
    once = applied(kind, PruneUnits(amount=0.5, unit=granularity))[0]
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in once.state_dict().items()}
    assert compressor.masks.kept == {}


def test_masks_of_a_penalty_before_shrink_with_the_weights():
    network = build("cnn")
    compressor = compressor_of("cnn", network, PruneUnits(amount=0.5, unit="channel", targets="stage1.0.conv1"))
    kept = torch.rand(network.stage1[0].conv1.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    compressor.masks.kept["stage1.0.conv1.weight"] = kept
    compressor.masks.kept["stage3.0.conv1.weight"] = torch.ones(32, 16, 3, 3, dtype=torch.bool)
    compressor.project()
    compressor.apply()
    (path,) = compressor.masks.kept  # the one that masks nothing is dropped
    weight = network.get_parameter(path)
    assert compressor.masks.kept[path].shape == weight.shape == (4, 8, 3, 3)
    assert torch.equal(weight != 0, compressor.masks.kept[path])


def test_batch_norm_is_measured_anew_after_the_shrinking():
    means = {}
    for batches in (0, 2):
        step = PruneUnits(amount=0.5, unit="channel", targets="stage1.0.conv1")
        network, _ = applied("cnn", step, bn_batches=batches)
        means[batches] = network.stage1[0].norm1.running_mean
    # Of batches of equal size the mean is that of all.
    convolved = network.stage1[0].conv1
    features = []
    for part, _ in data("cnn"):
        hidden = F.conv2d(part, network.stem[0].weight, padding=1)
        norm = network.stem[1]
        hidden = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True).relu()
        features.append(convolved(hidden).mean((0, 2, 3)))
    torch.testing.assert_close(means[2], torch.stack(features).mean(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(means[0], means[2], atol=1e-2)


# attention


def test_attention_is_converted_for_heads_alone():
    network, _ = applied("transformer", PruneUnits(amount=0.5, unit="head"))
    assert all(isinstance(layer.self_attn, Attention) for layer in network.encoder.layers)
    network, _ = applied("transformer", PruneUnits(amount=0.5, unit="neuron"))
    assert all(isinstance(layer.self_attn, nn.MultiheadAttention) for layer in network.encoder.layers)


def test_several_structural_steps_one_after_the_other():
    steps = [PruneUnits(amount=0.5, unit=kind, scope="layer") for kind in ("head", "neuron")]
    steps += [PruneUnits(amount=1 / 3, unit="layer"), PruneWeights(amount=0.5)]
    network, compressor = applied("transformer", *steps)
    assert sizes(network) < 0.45 * sizes(build("transformer"))
    assert_rebuilds("transformer", network)
    assert compressor.masks.sparsity() == pytest.approx(0.5, abs=0.001)


# lottery tickets that are smaller


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), KINDS)
def test_a_shrunk_ticket_is_the_shrunk_beginning(kind, granularity):
    network = build(kind)
    begun = copy_state(network)
    step = PruneUnits(amount=0.5, unit=granularity, rewind="start", at=1, finetune_epochs=1)
    compressor = compressor_of(kind, network, step, epochs=2)
    train(kind, compressor, epochs=1)
    trained = copy.deepcopy(network)
    assert compressor.begin_epoch(1, steps_per_epoch=2, optimizer=make(network.parameters()))
    # The same units of the trained network's choice, taken out of the network that was.
    Compressor(trained, [PruneUnits(amount=0.5, unit=granularity)], data(kind)[0][0], bn_batches=0).apply()
    assert {n: v.shape for n, v in trained.state_dict().items()} == {
        n: v.shape for n, v in network.state_dict().items()
    }
    old = torch.cat([value.flatten() for value in begun.values() if value.is_floating_point()])
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            assert torch.isin(value.flatten(), old).all(), name
    assert any(not torch.equal(v, trained.state_dict()[n]) for n, v in network.state_dict().items())


def test_iterative_tickets_of_heads_go_back_through_the_conversion():
    network = build("transformer")
    step = PruneUnits(
        amount=0.5, unit="head", schedule=Iterative(2), rewind="start", at=1, finetune_epochs=2, scope="layer"
    )
    compressor = compressor_of("transformer", network, step, epochs=3)
    train("transformer", compressor, epochs=3)
    compressor.finish()
    assert [layer.self_attn.num_heads for layer in network.encoder.layers] == [2, 2, 2]
    assert_rebuilds("transformer", network)


def test_a_snapshot_of_another_structure_is_refused_in_one_line():
    network = build("cnn")
    steps = [
        PruneUnits(amount=0.5, unit="channel", at=1, finetune_epochs=1),
        PruneWeights(amount=0.5, rewind="start", finetune_epochs=1),
    ]
    with pytest.raises(InputError, match="give it rewind=2 or later") as caught:
        compressor_of("cnn", network, *steps, epochs=3)
    assert "\n" not in str(caught.value)


def test_networks_without_such_units_are_refused():
    for kind, granularity in (("cnn", "head"), ("cnn", "neuron"), ("cnn", "hidden_unit"), ("lstm", "layer")):
        with pytest.raises(InputError) as caught:
            applied(kind, PruneUnits(amount=0.5, unit=granularity))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "channel"}, "exactly one of"),
        ({"amount": 0.5, "budget": "macs:0.5", "unit": "channel"}, "exactly one of"),
        ({"amount": 0.5, "unit": "channels"}, "unit must be one of channel"),
        ({"budget": "time:0.5", "unit": "channel"}, "budget must be a share of the cost such as 'macs:0.5'"),
        ({"amount": 0.5, "criterion": "bn_scale", "unit": "neuron"}, "set unit='channel'"),
        ({"amount": 0.5, "criterion": "movement", "unit": "channel"}, "criterion must be one of magnitude"),
        ({"amount": 0.5, "criterion": "obs", "unit": "head"}, "criterion must be one of magnitude"),
        ({"amount": 0.5, "unit": "layer", "schedule": Cubic()}, "no mask skips a layer"),
        ({"amount": 0.5, "unit": "head", "round_to": 4}, "round_to .* set unit='channel'"),
        ({"amount": 0.5, "unit": "channel", "round_to": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        PruneUnits(**options)
    assert "\n" not in str(caught.value)
