"""RNN, GRU and LSTM without some of their hidden units give what they give with these units at zero."""

import copy
import io
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.recurrent import in_blocks, unit_groups
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.errors import InputError


class Sequences(nn.Module):
    """An RNN between two linear layers; ``run`` says what is read of it."""

    def __init__(self, kind, run, width=None, **options):
        super().__init__()
        hidden, directions = 6, 2 if options.get("bidirectional") else 1
        self.run = run
        self.embed = nn.Linear(5, 4)
        self.rnn = kind(4, hidden, batch_first=True, **options)
        self.head = nn.Linear(width or directions * hidden, 3)

    def forward(self, steps, state=None):
        output, state = self.rnn(self.embed(steps), state)
        return self.run(self, output, state)


def final(net, output, state):
    return net.head(output[:, -1])


KINDS = {
    "RNN": (nn.RNN, {}, 1e-6),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}, 1e-6),
    "GRU": (nn.GRU, {}, 1e-7),
    "LSTM": (nn.LSTM, {}, 1e-7),
}
SHAPES = [
    dict(zip(("num_layers", "bidirectional", "bias"), v, strict=True))
    for v in itertools.product((1, 2), (False, True), (True, False))
]
every_kind = pytest.mark.parametrize("name", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))


def choose(network, group, units=3):
    """Other units in each layer and direction."""
    rnn = network.get_submodule(group.name)
    count = group.size // rnn.hidden_size
    return in_blocks(network, group, [sorted(torch.randperm(rnn.hidden_size)[:units].tolist()) for _ in range(count)])


def masked(network, masks):
    network = copy.deepcopy(network)
    for name, stays in masks.items():
        network.get_parameter(name).data.masked_fill_(~stays, 0)
    return network


def gate_masks(network, group, keep):
    """The units' rows of every gate and the biases; the layers that read the units are left alone."""
    rnn = network.get_submodule(group.name)
    masks = {}
    for name, parameter in rnn.named_parameters():
        _, _, layer, *reverse = name.split("_")
        block = int(layer[1:]) * (2 if rnn.bidirectional else 1) + len(reverse)
        stays = [block * rnn.hidden_size + row % rnn.hidden_size in keep for row in range(len(parameter))]
        rows = torch.tensor(stays).view(-1, *[1] * (parameter.dim() - 1))
        masks[f"{group.name}.{name}"] = rows.expand(parameter.shape)
    return masks


@pytest.mark.slow
@every_kind
@every_shape
def test_shrunk_is_masked(name, shape):
    kind, options, error = KINDS[name]
    network = Sequences(kind, final, **options, **shape).eval()
    (group,) = unit_groups(network, torch.randn(1, 2, 5))
    keep = choose(network, group)
    whole, rows = masked(network, group.masks(network, keep)), masked(network, gate_masks(network, group, keep))
    shrink(network, {group: keep})
    assert network.rnn.hidden_size == 3
    for count, length in [(1, 4), (3, 9)]:
        steps = torch.randn(count, length, 5)
        for reference in (rows, whole):
            assert torch.allclose(network(steps), reference(steps), atol=max(error, 2e-7), rtol=0)
        assert torch.allclose(
            network.rnn(network.embed(steps))[0], units_of(rows, steps, group, keep), atol=error, rtol=0
        )


def units_of(reference, steps, group, keep):
    """The masked network's output without the masked units, which are zero at every step."""
    output = reference.rnn(reference.embed(steps))[0]
    last = [index - (group.size - output.shape[2]) for index in sorted(keep)]
    kept = [index for index in last if index >= 0]
    gone = [index for index in range(output.shape[2]) if index not in kept]
    assert torch.equal(output[..., gone], torch.zeros_like(output[..., gone]))
    return output[..., kept]


@every_kind
def test_shrunk_is_masked_in_float64(name):
    kind, options, _ = KINDS[name]
    network = Sequences(kind, final, num_layers=3, bidirectional=True, **options).double()
    (group,) = unit_groups(network, torch.randn(1, 2, 5, dtype=torch.float64))
    keep = choose(network, group)
    stays = torch.tensor([unit in keep for unit in range(6)])  # of layer 0 forward
    gates = network.rnn.weight_hh_l0.shape[0] // 6
    assert torch.equal(group.masks(network, keep)["rnn.weight_hh_l0"], stays.repeat(gates)[:, None] & stays)
    reference = masked(network, gate_masks(network, group, keep))
    shrink(network, {group: keep})
    steps = torch.randn(3, 7, 5, dtype=torch.float64)
    assert torch.allclose(network(steps), reference(steps), atol=1e-14, rtol=0)


def test_an_lstm_step_by_step():
    """The shrunk layer against its equations, with weights taken from the large one entry by entry."""
    network = Sequences(nn.LSTM, final).double()
    rnn, kept = copy.deepcopy(network.rnn), [1, 2, 5]
    (group,) = unit_groups(network, torch.randn(1, 2, 5, dtype=torch.float64))
    shrink(network, {group: kept})
    steps = torch.randn(1, 5, 4, dtype=torch.float64)
    h, c = [0.0] * 3, [0.0] * 3
    for step in steps[0]:
        gates = []
        for gate in range(4):
            rows = [gate * 6 + unit for unit in kept]
            gates.append([
                sum(rnn.weight_ih_l0[row, i].item() * step[i].item() for i in range(4))
                + sum(rnn.weight_hh_l0[row, kept[j]].item() * h[j] for j in range(3))
                + rnn.bias_ih_l0[row].item() + rnn.bias_hh_l0[row].item()
                for row in rows
            ])  # fmt: skip
        i, f, o = ([1 / (1 + math.exp(-value)) for value in gates[number]] for number in (0, 1, 3))
        c = [f[u] * c[u] + i[u] * math.tanh(gates[2][u]) for u in range(3)]
        h = [o[u] * math.tanh(c[u]) for u in range(3)]
    output, (h_n, c_n) = network.rnn(steps)
    assert torch.allclose(output[0, -1], torch.tensor(h, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(h_n[0, 0], torch.tensor(h, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(c_n[0, 0], torch.tensor(c, dtype=torch.float64), atol=1e-14)


READERS = {
    "every step": (lambda n, o, s: n.head(o), 12),
    "last state of both": (lambda n, o, s: n.head(torch.cat([s[0][-2], s[0][-1]], dim=1)), 12),
    "last state of one": (lambda n, o, s: n.head(s[0][-1]), 6),
    "mean": (lambda n, o, s: n.head(o.mean(1)), 12),
    "all steps in a row": (lambda n, o, s: n.head(o.flatten(1)), 24),
    "first layer's state": (lambda n, o, s: n.head(torch.tanh(s[0][0])), 6),
    "state returned": (lambda n, o, s: (n.head(o[:, -1]), s), 12),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_are_found(name):
    run, width = READERS[name]
    network = Sequences(nn.LSTM, run, width, num_layers=2, bidirectional=True).eval()
    steps = torch.randn(3, 2, 5)
    (group,) = unit_groups(network, steps[:1])
    keep = choose(network, group)
    reference = masked(network, gate_masks(network, group, keep))
    shrink(network, {group: keep})
    assert network.head.in_features == width // 2
    logits, wanted = (value[0] if isinstance(value, tuple) else value for value in (network(steps), reference(steps)))
    assert torch.allclose(logits, wanted, atol=2e-7, rtol=0)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_given_state_is_sliced_by_the_caller(kind):
    network = Sequences(kind, lambda n, o, s: (n.head(o), s), num_layers=2, bidirectional=True)
    steps = torch.randn(3, 4, 5)
    states = torch.randn(2, 4, 3, 6)  # h and c, a block each, samples, units
    given = (states[0], states[1]) if kind is nn.LSTM else states[0]
    (group,) = unit_groups(network, (steps, given))
    keep = choose(network, group)
    units = torch.tensor(keep).view(4, 1, 3) % 6
    # The masked network's removed units start at zero, and without gates and biases they stay there.
    hidden = torch.ones(4, 1, 6).scatter(2, units, 0.0).bool()
    reference = masked(network, group.masks(network, keep))
    zeroed = states.masked_fill(hidden, 0)
    wanted, wanted_state = reference(steps, (zeroed[0], zeroed[1]) if kind is nn.LSTM else zeroed[0])
    shrink(network, {group: keep})
    sliced = states.gather(3, units.expand(2, 4, 3, 3))
    logits, state = network(steps, (sliced[0], sliced[1]) if kind is nn.LSTM else sliced[0])
    assert torch.allclose(logits, wanted, atol=2e-7, rtol=0)
    first, wanted_first = (s[0] if kind is nn.LSTM else s for s in (state, wanted_state))
    assert torch.allclose(first, wanted_first.gather(2, units.expand(4, 3, 3)), atol=2e-7, rtol=0)


def test_one_rnn_reads_another_and_a_linear_layer_reads_channels():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 4)
            self.lower = nn.GRU(4, 6, batch_first=True, bidirectional=True)
            self.upper = nn.LSTM(12, 8, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 3)

        def forward(self, steps):
            return self.head(self.upper(self.lower(self.embed(steps))[0])[0][:, -1])

    network = Two()
    steps = torch.randn(3, 4, 5)
    lower, upper = unit_groups(network, steps)
    (embed,) = channel_groups(network, steps)
    assert [(str(m)) for m in embed.members] == ["embed:out", "lower:in"]
    assert [(str(m)) for m in lower.members] == ["lower:units", "upper:in"]
    keep = {lower: choose(network, lower), upper: choose(network, upper, 4), embed: [0, 3]}
    masks = {}
    for group, kept in keep.items():
        for name, stays in group.masks(network, kept).items():
            masks[name] = masks[name] & stays if name in masks else stays
    reference = masked(network, masks)
    shrink(network, keep)
    assert (network.lower.input_size, network.upper.input_size, network.head.in_features) == (2, 6, 8)
    assert torch.allclose(network(steps), reference(steps), atol=2e-7, rtol=0)


@pytest.mark.slow
@every_kind
@every_shape
def test_rebuilt_trained_and_saved(name, shape):
    kind, options, _ = KINDS[name]
    network = Sequences(kind, final, **options, **shape)
    count, before = sizes(network)
    steps = torch.randn(4, 6, 5)
    (group,) = unit_groups(network, steps)
    shrink(network, {group: choose(network, group)})
    again = set_sizes(Sequences(kind, final, **options, **shape), json.loads(json.dumps(sizes_of(network))))
    assert again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(again(steps), network(steps))
    assert str(again) == str(network)
    small, after = sizes(network)
    assert abs(after - before * small / count) < 0.01 * before + 300 * len(network.state_dict())
    for tensor in network.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(network(steps), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    copy.deepcopy(network)(steps)


def sizes(network):
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return sum(tensor.numel() for tensor in network.state_dict().values()), len(file.getvalue())


def test_what_cannot_be_traced_is_one_line():
    class Packed(Sequences):
        def forward(self, steps):
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(steps), [4, 2], batch_first=True)
            return self.head(self.rnn(packed)[1][0][-2:].transpose(0, 1).flatten(1))

    network = Packed(nn.LSTM, final, num_layers=2, bidirectional=True)
    steps = torch.randn(2, 4, 5)
    with pytest.raises(InputError, match="no RNN, GRU or LSTM that can be shrunk"):
        unit_groups(network, steps)


UNFIT = {
    "its own state": lambda n, o, s: n.head(n.rnn(o[:, :, :4], s)[0]),
    "returned": lambda n, o, s: o,
    "directions added": lambda n, o, s: n.head((o[..., :6] + o[..., 6:]).repeat(1, 1, 2)),
    "added to channels": lambda n, o, s: n.head(o + n.wide(o)),
    "normalised": lambda n, o, s: n.head(F.layer_norm(o, (12,))),
}


@pytest.mark.parametrize("name", UNFIT)
def test_units_of_unknown_use_stay(name):
    network = Sequences(nn.LSTM, UNFIT[name], bidirectional=True)
    network.wide = nn.Linear(12, 12)
    with pytest.raises(InputError, match="no RNN, GRU or LSTM that can be shrunk"):
        unit_groups(network, torch.randn(1, 2, 5))
    if name == "added to channels":
        assert [group.name for group in channel_groups(network, torch.randn(1, 2, 5))] == ["embed"]


def test_units_stay_where_the_network_makes_the_initial_state():
    class Own(Sequences):
        def forward(self, steps):
            output, _ = self.rnn(self.embed(steps), torch.zeros(1, 1, 6))
            return self.head(output)

    with pytest.raises(InputError, match="no RNN, GRU or LSTM that can be shrunk"):
        unit_groups(Own(nn.GRU, final), torch.randn(1, 2, 5))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_cannot_be_used_is_one_line():
    network = Sequences(nn.LSTM, final, num_layers=2)
    state = copy.deepcopy(network.state_dict())
    (group,) = unit_groups(network, torch.randn(1, 2, 5))
    with pytest.raises(InputError, match=r"same number of units, got \[2, 1\]"):
        shrink(network, {group: [0, 1, 6]})
    with pytest.raises(InputError, match="nothing would stay|same number"):
        shrink(network, {group: [0]})
    with pytest.raises(InputError, match="rnn has 2 layers times directions, got units for 1"):
        in_blocks(network, group, [[0]])
    with pytest.raises(InputError, match=r"units are below 6, got \[6\]"):
        in_blocks(network, group, [[0], [6]])
    projected = Sequences(nn.LSTM, final, 2, proj_size=2)
    with pytest.raises(InputError, match="no RNN, GRU or LSTM"):
        unit_groups(projected, torch.randn(1, 2, 5))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
