"""What changes a network's structure is tried: nothing crashes afterwards, and nothing returns something else."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import InputError
from distill_lightning.compression import Compressor, LowRank, PruneUnits, PruneWeights, preview
from distill_lightning.compression.access.snapshots import taken_back
from distill_lightning.compression.file.artefact import load_compressed, write_artefact
from distill_lightning.compression.shrink.channels import channel_groups, fixed_channels
from distill_lightning.compression.shrink.groups import Group, Member
from distill_lightning.compression.steps import Order, TrainedStep, trial, units
from distill_lightning.compression.steps.workpiece import Workpiece

HALF = PruneUnits(unit="channel", amount=0.5, scope="layer")
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name, and how they are put together."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        return self.run(self, inputs)


def conv(into, out):
    return nn.Conv2d(into, out, 3, padding=1)


def run(network, inputs, *, training=False):
    network = copy.deepcopy(network).train(training)
    with torch.no_grad():
        return network(*copy.deepcopy(inputs)) if isinstance(inputs, tuple) else network(inputs.clone())


def masked(network, inputs, step):
    """A copy with the units of every group masked that the step would remove, by the same choice."""
    network = copy.deepcopy(network)
    piece = Workpiece(network, inputs)
    families = units.find_families(piece, step.unit, targets=step.targets, exclude=step.exclude)
    scores = units.score_units(piece, families, "magnitude")
    kept = units.choose_units(families, scores, step.amount, scope=step.scope, relative=True)
    for name, mask in units.unit_masks(network, families, kept).kept.items():
        network.get_parameter(name).data.masked_fill_(~mask, 0)
    return network


def state_of(network):
    """Everything that is to stay: the objects, the values, the modes, the hooks and the attributes."""
    return [
        (
            module, type(module), module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks),
            {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, tuple))},
            [(name, id(one), one.requires_grad, one.tolist())
             for name, one in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]],
        )
        for module in network.modules()
    ]  # fmt: skip


# Sizes that are used as numbers


def scaled(net, images):
    features = net.a(images).flatten(2).transpose(1, 2)
    return net.head((net.b(features.mean(1)) * features.shape[-1] ** -0.5).relu())


def viewed_by_shape(net, images):
    left, right = net.a(images), net.b(images)
    return net.head((left + right.flatten(1).view(left.shape)).mean((2, 3)))


def viewed_by_size(net, images):
    first = net.a(images)
    return net.head(net.b(first.flatten(1).view(first.size())).mean((2, 3)))


def unpacked(net, images):
    first = net.a(images)
    batch, channels, high, wide = first.shape
    other = net.b(images)
    return net.head((first + other.reshape(batch, -1).view(batch, channels, high, wide)).mean((2, 3)))


SIZED = {
    "scaled": (scaled, lambda: {"a": conv(3, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 5)}),
    "view(h.shape)": (viewed_by_shape, lambda: {"a": conv(3, 8), "b": conv(3, 8), "head": nn.Linear(8, 5)}),
    "view(h.size())": (viewed_by_size, lambda: {"a": conv(3, 8), "b": conv(8, 8), "head": nn.Linear(8, 5)}),
    "unpacked": (unpacked, lambda: {"a": conv(3, 8), "b": conv(3, 8), "head": nn.Linear(8, 5)}),
}


@pytest.mark.parametrize(("forward", "layers"), SIZED.values(), ids=SIZED)
def test_sizes_that_are_used_as_numbers(forward, layers):
    network = Net(forward, **layers())
    step = replace(HALF, targets="*")
    try:
        channel_groups(network, IMAGES)
    except InputError:
        return  # all channels stay
    right = masked(network, IMAGES, step)
    Compressor(network, [step], IMAGES).apply()
    for training in (False, True):
        assert torch.allclose(run(network, IMAGES, training=training), run(right, IMAGES, training=training), atol=1e-6)
    # The size of one may not change; the channels of another may go.
    if forward is scaled:
        assert (network.a.out_channels, network.b.out_features) == (8, 4)


def test_the_channels_of_which_a_size_is_read_stay_and_say_so():
    network = Net(scaled, **SIZED["scaled"][1]())
    assert "their number" in fixed_channels(network, IMAGES)["a"]


GOOD = {
    "view of itself": lambda net, x: (h := net.a(x)).view(h.size(0), h.size(1), -1).mean(2),
    "view by its shape": lambda net, x: (h := net.a(x)).view(h.shape).mean((2, 3)),
    "a product of sizes": lambda net, x: (h := net.a(x).mean((2, 3))).view(h.shape[0], h.shape[1] * 1),
    "spatial sizes": lambda net, x: F.avg_pool2d(h := net.a(x), h.shape[2:]).view(h.shape[0], -1),
    "a view of the batch": lambda net, x: F.adaptive_avg_pool2d(net.a(x), 1).view(x.size(0), -1),
}


@pytest.mark.parametrize("forward", GOOD.values(), ids=GOOD)
def test_sizes_that_follow_the_channels_are_no_reason_to_stay(forward):
    network = Net(lambda net, x: net.head(forward(net, x)), a=conv(3, 8), head=nn.Linear(8, 5))
    right = masked(network, IMAGES, HALF)
    Compressor(network, [HALF], IMAGES).apply()
    assert network.a.out_channels == 4
    assert torch.allclose(run(network, IMAGES), run(right, IMAGES), atol=1e-6)


def test_a_view_after_a_convolution():
    def lenet(net, images):
        features = F.max_pool2d(net.a(images).relu(), 2)
        return net.head(features.view(features.size(0), -1))

    network = Net(lenet, a=conv(3, 8), head=nn.Linear(8 * 16, 5))
    right = masked(network, IMAGES, HALF)
    Compressor(network, [HALF], IMAGES).apply()
    assert network.head.in_features == 64
    assert torch.allclose(run(network, IMAGES), run(right, IMAGES), atol=1e-6)


# Subclasses


class Turned(nn.MultiheadAttention):
    """Attention with a forward of its own."""

    def forward(self, query, key, value, **options):
        output, weights = super().forward(query.flip(1), key, value, **options)
        return output.flip(1) + query, weights


class Renamed(nn.MultiheadAttention):
    """Attention that only has another constructor."""

    def __init__(self, size):
        super().__init__(size, 4, batch_first=True)


def attending(*layers):
    def forward(net, tokens):
        for layer in net.layers:
            tokens = layer(tokens, tokens, tokens)[0]
        return net.head(tokens)

    return Net(forward, layers=nn.ModuleList(layers), head=nn.Linear(16, 16))


TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


def test_attention_with_a_forward_of_its_own_stays():
    network = attending(Turned(16, 4, batch_first=True), Renamed(16))
    before = run(network, TOKENS)
    compressor = Compressor(network, [LowRank(rank=0.99, only_if_smaller=False, convert_attention=True)], TOKENS)
    compressor.apply()
    assert type(network.layers[0]) is Turned
    assert not isinstance(network.layers[1], nn.MultiheadAttention)
    assert (run(network, TOKENS) - before).abs().max() < 0.2 * before.abs().max()
    assert "layers.0: its class has its own forward(): left as it is" in compressor.piece.notes
    network = attending(Turned(16, 4, batch_first=True), Renamed(16))
    Compressor(network, [PruneUnits(unit="head", amount=0.5)], TOKENS).apply()
    assert type(network.layers[0]) is Turned
    assert network.layers[1].num_heads == 2
    with pytest.raises(InputError, match=r"no attention whose heads .*; layers\.0: its class has its own forward\(\)"):
        Compressor(attending(Turned(16, 4)), [PruneUnits(unit="head", amount=0.5)], TOKENS).apply()


class Doubled(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + F.linear(x, self.linear1.weight[:16])


class Centred(nn.TransformerEncoderLayer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.activation = lambda neurons: neurons - neurons.mean(-1, keepdim=True)
        self.activation_relu_or_gelu = 0


def encoder(*kinds):
    return nn.Sequential(*(kind(16, 4, 32, dropout=0.1, batch_first=True) for kind in kinds))


@pytest.mark.parametrize(
    ("kind", "reason"), [(Doubled, "its class has its own _ff_block()"), (Centred, "mixes neurons")]
)
def test_transformer_layers_that_compute_something_else_keep_their_neurons(kind, reason):
    network = encoder(kind, nn.TransformerEncoderLayer)
    compressor = Compressor(network, [PruneUnits(unit="neuron", amount=0.5)], TOKENS)
    compressor.apply()
    assert (network[0].linear1.out_features, network[1].linear1.out_features) == (32, 16)
    assert any(reason in note for note in compressor.piece.notes)
    run(network, TOKENS, training=True)


def test_an_activation_that_eval_mode_does_not_have():
    """PyTorch's fast path has chosen relu before the subclass sets another activation; conversion switches it off."""

    class Silu(nn.TransformerEncoderLayer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.activation = F.silu

    network = encoder(Silu)
    before = state_of(network)
    with pytest.raises(InputError, match=r"PruneUnits head: '0.self_attn' .* in eval mode its outputs are off by"):
        Compressor(network, [PruneUnits(unit="head", amount=0.5)], TOKENS).apply()
    assert state_of(network) == before


# Weights that are used functionally


def test_a_layer_whose_weight_is_read_is_not_factored():
    def tied(net, words):
        return F.linear(net.b(net.a(net.e(words))), net.e.weight)

    network = Net(tied, e=nn.Embedding(20, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    words = torch.arange(6).view(2, 3)
    compressor = Compressor(network, [LowRank(rank=4)], words)
    compressor.apply()
    assert type(network.e) is nn.Embedding
    assert network.a.rank == network.b.rank == 4
    assert run(network, words).shape == (2, 3, 20)
    assert "e: the network reads its 'weight' itself: left as it is" in compressor.piece.notes
    with pytest.raises(InputError, match=r"LowRank: the network reads 'weight' of 'e' itself: exclude it"):
        Compressor(network, [LowRank(rank=4, targets="e")], words).apply()


def test_a_convolution_whose_type_is_read():
    def typed(net, images):
        return net.head(net.b(net.a(images.to(net.a.weight.dtype))).mean((2, 3)))

    network = Net(typed, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5))
    compressor = Compressor(network, [LowRank(rank=2, only_if_smaller=False)], IMAGES)
    compressor.apply()
    assert type(network.a) is nn.Conv2d
    assert type(network.b) is not nn.Conv2d
    assert run(network, IMAGES).shape == (2, 5)


# Parts that run in training only


def auxiliary(net, images):
    features = net.a(images).relu()
    main = net.head(net.b(features).mean((2, 3)))
    return (main, net.aux(net.c(features).mean((2, 3)))) if net.training else main


def test_what_runs_in_training_only_is_shrunk_with_the_rest():
    network = Net(auxiliary, a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), head=nn.Linear(8, 5), aux=nn.Linear(6, 5))
    right = masked(network, IMAGES, HALF)
    Compressor(network, [HALF], IMAGES).apply()
    assert (network.a.out_channels, network.c.in_channels, network.c.out_channels) == (4, 4, 3)
    for one, other in zip(run(network, IMAGES, training=True), run(right, IMAGES, training=True), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# Weights that hooks compute


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    ],
)
def test_weights_that_old_hooks_compute(hook, call):
    network = nn.Sequential(hook(nn.Conv1d(3, 8, 3)), nn.Conv1d(8, 4, 3))
    for act in (lambda: Compressor(network, [HALF], torch.randn(2, 3, 9)), lambda: preview(network, HALF, IMAGES)):
        with pytest.raises(InputError, match=rf"'0': .*'weight'.*{call}\(layer, 'weight'\) first"):
            act()


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights_are_left_and_written(norm, tmp_path):
    def build():
        layer = nn.Conv1d(3, 8, 3)
        normed = getattr(nn.utils.parametrizations, norm)(layer)
        return nn.Sequential(normed, nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 4, 3))

    network, signal = build(), torch.randn(2, 3, 9)
    Compressor(network, [HALF], signal).apply()
    assert (network[0].out_channels, network[2].out_channels) == (8, 4)
    write_artefact(network, tmp_path / "network.dlpk")
    loaded = load_compressed(tmp_path / "network.dlpk", build())
    assert torch.equal(loaded(signal), run(network, signal))


# What can be refused is refused before the first epoch

LATE = {
    "heads of a CNN": (PruneUnits(unit="head", amount=0.5), nn.ReLU()),
    "channels of a softmax": (HALF, nn.Softmax(1)),
}


@pytest.mark.parametrize(("step", "norm"), LATE.values(), ids=LATE)
def test_refused_before_the_dense_epochs(step, norm):
    network = nn.Sequential(conv(3, 8), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    compressor = Compressor(network, [step], IMAGES, epochs=4, dense_epochs=3)
    with pytest.raises(InputError, match=r"no attention|no channels"):
        compressor.begin_epoch(0, steps_per_epoch=1)


def test_the_rehearsal_changes_nothing():
    network = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    before = state_of(network)
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    compressor = Compressor(network, [HALF, PruneWeights(amount=0.5)], IMAGES, epochs=4, dense_epochs=3)
    assert not compressor.begin_epoch(0, steps_per_epoch=1)
    assert state_of(network) == before
    assert not compressor.piece.notes
    assert torch.equal(torch.rand(1), drawn)


# The trial alone


@dataclass(frozen=True, kw_only=True)
class Wrong(TrainedStep):
    """Takes channels away from one layer only, or from the output."""

    order = Order.STRUCTURE
    layer: int = 0

    def act(self, piece):
        layer = piece.network[self.layer]
        layer.weight = nn.Parameter(layer.weight[:2].detach())
        layer.bias = nn.Parameter(layer.bias[:2].detach())
        piece.network[0].register_forward_hook(lambda *_: None)
        piece.network[1].running_mean.add_(1)
        piece.network.eval()
        piece.changed = True


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(0, r"in eval mode the network no longer runs \(RuntimeError"), (5, r"had the shape \(2, 4\), and has \(2, 2\)")],
)
def test_a_step_that_is_wrong_is_taken_back(layer, reason):
    network = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    network[2].eval()
    network[0].weight.requires_grad_(False)
    calls = []
    handle = network[0].register_forward_hook(lambda *_: calls.append(1))
    before = state_of(network)
    with pytest.raises(InputError, match=rf"^Wrong: the network cannot be changed so: .*{reason}[^\n]*$"):
        Compressor(network, [Wrong(layer=layer)], IMAGES).apply()
    assert state_of(network) == before
    calls.clear()
    handle.remove()
    network(IMAGES)
    assert not calls


def wrong_groups(*members):
    """In place of tracing, which knows better."""
    group = Group(
        members[0].partition(":")[0], "channels", 8,
        tuple(Member(*member.split(":"), torch.arange(8)) for member in members),
    )  # fmt: skip
    return lambda *_: [group]


def test_the_trial_stands_beneath_the_rules_of_tracing(monkeypatch):
    monkeypatch.setattr(units, "channel_groups", wrong_groups("b:out", "head:in"))
    network = Net(scaled_at_the_end, c=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5))
    before = state_of(network)
    message = (
        r"^PruneUnits channel: 'b' cannot be changed so: in eval mode its outputs are off by 0\.[0-9]+ of the largest "
        r"one: exclude it$"
    )
    with pytest.raises(InputError, match=message):
        Compressor(network, [replace(HALF, targets="b")], IMAGES).apply()
    assert state_of(network) == before
    # Whoever previews is told the same.
    with pytest.raises(InputError, match=message):
        preview(network, replace(HALF, targets="b"), IMAGES)


def scaled_at_the_end(net, images):
    features = net.b(net.c(images)).mean((2, 3))
    return net.head(features * features.shape[-1] ** -0.5)


def test_the_trial_sees_train_mode(monkeypatch):
    network = Net(auxiliary, a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), head=nn.Linear(8, 5), aux=nn.Linear(6, 5))
    network.a = nn.Sequential(network.a, nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    monkeypatch.setattr(units, "channel_groups", wrong_groups("a.0:out", "a.2:channels", "b:in"))
    # BatchNorm in train mode has one number per channel of one image.
    with pytest.raises(InputError, match=r"^PruneUnits channel: 'a.0' .*in train mode the network no longer runs"):
        Compressor(network, [replace(HALF, targets="a.0")], IMAGES[:1]).apply()


def test_a_network_that_does_not_run_on_the_example_inputs_is_not_tried():
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    compressor = Compressor(network, [LowRank(rank=2)], torch.randn(2, 7))
    compressor.apply()
    assert any("does not run on the example inputs, so no change was tried" in note for note in compressor.piece.notes)


def test_the_trial_names_the_layer_that_is_wrong():
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    inputs = torch.randn(3, 16)
    piece = Workpiece(network, inputs)

    def change(changed, paths):
        for path in paths:
            changed.get_submodule(path).weight.data.mul_(1 if path == "0" else 1.001)

    with pytest.raises(InputError, match=r"^a step: '2' cannot be changed so: .* off by 0\.00"):
        trial.try_change(piece, "a step", ["0", "2"], change=change, expect=lambda *_: None)
    trial.try_change(piece, "a step", ["0"], change=change, expect=lambda *_: None)


class InTraining(nn.Module):
    """Nothing in eval mode, and in train mode for two samples only, as BatchNorm."""

    def forward(self, features):
        if self.training and len(features) < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        return features if self.training else features * 0


@pytest.mark.parametrize("last", [nn.Identity, InTraining])
def test_rounding_is_no_fault_and_dropout_is_off(last):
    """In float32 the two ways to sum differ by more than is allowed; in float64 they are the same."""
    network = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 4), last())
    with torch.no_grad():
        network[2].weight.copy_(torch.randn(4, 64) * 1e-3)
        network[2].weight[:, 32:] = -network[2].weight[:, :32]
        network[0].weight[32:] = network[0].weight[:32]
        network[0].bias.fill_(1e6)

    def change(changed, _):
        order = torch.randperm(64)
        changed[0].weight.data, changed[0].bias.data = changed[0].weight[order], changed[0].bias[order]
        changed[2].weight.data = changed[2].weight[:, order]

    piece = Workpiece(network, torch.randn(3 if last is nn.Identity else 1, 64))
    trial.try_change(piece, "a step", ["0"], change=change, expect=lambda *_: None)


class Enlarging(nn.Module):
    """Returns the rounding of what it gets, as BatchNorm does of equal samples."""

    def forward(self, features):
        return (features * 1e16).sin()


def test_where_rounding_decides_only_shapes_are_compared():
    network = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), Enlarging())

    def reorder(changed, _):
        order = torch.randperm(16)
        changed[0].weight.data, changed[0].bias.data = changed[0].weight[order], changed[0].bias[order]
        changed[1].weight.data = changed[1].weight[:, order]

    piece = Workpiece(network, torch.randn(3, 8))
    trial.try_change(piece, "a step", ["0"], change=reorder, expect=lambda *_: None)
    assert any("for every rounding of its inputs: only their shapes were compared" in note for note in piece.notes)


def test_samples_that_train_mode_needs_beside_are_others():
    for part, other in (
        (torch.randn(1, 3, 2, 2), lambda part: part.flip([1, 2, 3])),
        (torch.arange(6).view(1, 6), lambda part: part.flip(1)),
        (torch.tensor([[True, False]]), lambda part: part),
        (torch.tensor([5]), lambda part: part),
    ):
        assert torch.equal(trial._with_others(part), torch.cat([part, other(part)]))
    first, second = trial._with_others(torch.zeros(1, 3, 2, 2))
    assert (first != second).all()
    assert torch.equal(trial._with_others(torch.tensor(2.0)), torch.tensor(2.0))


def test_a_network_is_taken_back_only_if_something_is_raised():
    network = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    before = state_of(network)

    def fail():
        with taken_back(network):
            network[0].weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
            network[1].bias.data = torch.zeros(7)
            network[0] = nn.Identity()
            network.new = 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state_of(network) == before
    assert network[0]._flat_weights[0] is network[0].weight_ih_l0
    assert not hasattr(network, "new")
    with taken_back(network):
        network.new = 1
    assert network.new == 1
