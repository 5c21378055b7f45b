"""Attention whose heads can be removed: first equal to PyTorch's, then to itself with heads masked."""

import copy
import io
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning.compression.shrink.attention import Attention, convert_attention
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.sizes import layer_sizes, resize_layer, set_sizes, sizes_of
from distill_lightning.compression.shrink.transformer import head_groups, neuron_groups, remove_layers
from distill_lightning.errors import InputError

SAMPLES, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 8, 4


def lively(attention):
    """PyTorch begins with biases of zero, which would hide a lost one."""
    for parameter in attention.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return attention


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def masks(name, *, batched=True):
    torch.manual_seed(1)
    hidden = torch.rand(QUERIES, KEYS) > 0.7
    hidden[:, 0] = False
    padding = torch.zeros(SAMPLES, KEYS, dtype=torch.bool)
    padding[1, -2:] = padding[2, -1:] = True
    padding = padding if batched else padding[1]
    bias = torch.randn(QUERIES, KEYS)
    chosen = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": bias},
        "per head": {"attn_mask": torch.randn((SAMPLES if batched else 1) * HEADS, QUERIES, KEYS)},
        "padding": {"key_padding_mask": padding},
        "padding and bool": {"attn_mask": hidden, "key_padding_mask": padding},
        "both float": {
            "attn_mask": bias,
            "key_padding_mask": torch.zeros(padding.shape).masked_fill(padding, -math.inf),
        },
    }
    return chosen[name]


MASKS = ["none", "bool", "float", "per head", "padding", "padding and bool", "both float"]


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True, "per head"])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}], ids=["plain", "kdim vdim", "no bias"])
def test_it_equals_pytorchs(mask, batch_first, need_weights, sizes):
    theirs = lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **sizes)).eval()
    ours = convert_attention(theirs)
    key_width, value_width = sizes.get("kdim", WIDTH), sizes.get("vdim", WIDTH)
    inputs = [torch.randn(SAMPLES, QUERIES, WIDTH), torch.randn(SAMPLES, KEYS, key_width)]
    inputs.append(torch.randn(SAMPLES, KEYS, value_width))
    inputs = inputs if batch_first else [tensor.transpose(0, 1) for tensor in inputs]
    options = {"need_weights": bool(need_weights), "average_attn_weights": need_weights != "per head", **masks(mask)}
    (output, weights), (wanted, wanted_weights) = ours(*inputs, **options), theirs(*inputs, **options)
    assert output.shape == wanted.shape
    assert torch.allclose(output, wanted, atol=5e-7, rtol=0)
    assert (weights is None) == (wanted_weights is None)
    if need_weights:
        assert weights.shape == wanted_weights.shape
        assert torch.allclose(weights, wanted_weights, atol=5e-7, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_it_equals_pytorchs_on_a_single_sequence(mask, need_weights):
    theirs = lively(nn.MultiheadAttention(WIDTH, HEADS)).double().eval()
    ours = convert_attention(theirs)
    inputs = [torch.randn(length, WIDTH, dtype=torch.float64) for length in (QUERIES, KEYS, KEYS)]
    options = {
        name: value.double() if value.is_floating_point() else value
        for name, value in masks(mask, batched=False).items()
    }
    (output, weights), (wanted, wanted_weights) = (
        m(*inputs, need_weights=need_weights, **options) for m in (ours, theirs)
    )
    assert output.shape == wanted.shape == (QUERIES, WIDTH)
    assert torch.allclose(output, wanted, atol=1e-14, rtol=0)
    assert (weights is None) if not need_weights else torch.allclose(weights, wanted_weights, atol=1e-14, rtol=0)


def test_gradients_equal_pytorchs_and_frozen_weights_stay_frozen():
    theirs = lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).double()
    ours = convert_attention(theirs)
    steps = torch.randn(SAMPLES, QUERIES, WIDTH, dtype=torch.float64)
    for attention in (ours, theirs):
        attention(steps, steps, steps)[0].square().sum().backward()
    packed = torch.cat([ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    assert torch.allclose(packed, theirs.in_proj_weight.grad, atol=1e-12)
    assert torch.allclose(ours.out_proj.bias.grad, theirs.out_proj.bias.grad, atol=1e-12)
    theirs.in_proj_weight.requires_grad_(requires_grad=False)
    frozen = convert_attention(theirs)
    moving = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert moving == {name for name, _ in frozen.named_parameters()} - {f"{n}_proj.weight" for n in "qkv"}


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_attention_weights(need_weights):
    attention = convert_attention(lively(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)))
    steps = torch.randn(1, 4, WIDTH)
    assert attention.training
    first, second = (attention(steps, steps, steps, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    attention.eval()
    first, second = (attention(steps, steps, steps, need_weights=need_weights)[0] for _ in range(2))
    assert torch.equal(first, second)


# Inside PyTorch's Transformer layers.


def encoder(layers=2, *, batch_first=True, norm_first=False, dropout=0.0, heads=HEADS, neurons=16):
    layer = nn.TransformerEncoderLayer(
        WIDTH, heads, neurons, dropout=dropout, batch_first=batch_first, norm_first=norm_first
    )
    network = nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first and not norm_first)
    for parameter in network.parameters():  # copies of one layer all begin alike
        nn.init.normal_(parameter, 0.1, 0.3)
    return network.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # PyTorch's own encoder
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both"])
def test_an_encoder_computes_the_same(batch_first, norm_first, mask):
    network = encoder(batch_first=batch_first, norm_first=norm_first)
    own = convert_attention(copy.deepcopy(network))
    steps = torch.randn(SAMPLES, QUERIES, WIDTH)
    padding = torch.zeros(SAMPLES, QUERIES, dtype=torch.bool)
    padding[1, -2:] = True
    options = {"mask": causal(QUERIES)} if mask in ("causal", "both") else {}
    options |= {"src_key_padding_mask": padding} if mask in ("padding", "both") else {}
    inputs = steps if batch_first else steps.transpose(0, 1)
    with torch.no_grad():
        output, wanted = own(inputs, **options), network(inputs, **options)
    difference = (output - wanted) if batch_first else (output - wanted).transpose(0, 1)
    real = ~padding if "src_key_padding_mask" in options else torch.ones_like(padding)
    assert difference[real].abs().max() < 2e-6
    network.train()
    own.train()
    assert torch.allclose(own(inputs, **options), network(inputs, **options), atol=2e-6, rtol=0)


def test_the_fast_path_does_not_go_past_it(monkeypatch):
    network = encoder()
    fast = []
    real = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fast.append(1) or real(*args))
    steps, padding = torch.randn(2, 4, WIDTH), torch.tensor([[False] * 4, [False] * 3 + [True]])
    with torch.no_grad():
        network(steps)
        assert len(fast) == 2  # without this, the test would show nothing
        convert_attention(network)
        network(steps)
        network(steps, src_key_padding_mask=padding)
        assert len(fast) == 2
        for layer in network.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
        silent = network(steps)
        reference = steps
        for layer in network.layers:
            reference = layer.norm1(reference)
            reference = layer.norm2(reference + layer.linear2(F.relu(layer.linear1(reference))))
    assert torch.allclose(silent, reference, atol=1e-6)


def test_a_transformer_with_a_decoder():
    network = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True).double()
    own = convert_attention(copy.deepcopy(network))
    assert sum(isinstance(module, Attention) for module in own.modules()) == 3
    assert not any(isinstance(module, nn.MultiheadAttention) for module in own.modules())
    source, target = (torch.randn(2, length, WIDTH, dtype=torch.float64) for length in (6, 4))
    outputs = [m(source, target, tgt_mask=causal(4), tgt_is_causal=True) for m in (own, network)]
    assert torch.allclose(*outputs, atol=1e-12)
    assert [group.name for group in neuron_groups(own)] == ["encoder.layers.0", "decoder.layers.0"]
    shrink(own, {group: range(0, group.size, 2) for group in head_groups(own) + neuron_groups(own)})
    assert own(source, target).shape == (2, 4, WIDTH)


def test_a_shared_layer_stays_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(WIDTH, HEADS)
            self.second = self.first

    network = convert_attention(Shared())
    assert isinstance(network.first, Attention)
    assert network.first is network.second
    assert set_sizes(Shared(), sizes_of(network)).first.num_heads == HEADS


# Without some of the heads and neurons.


def one_by_one(attention, query, key, value, heads):
    """Each head on its own, and their sum: what the heads that are named would give."""
    total = attention.out_proj.bias.expand(*query.shape[:2], -1)
    for head in heads:
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        q, k, v = (
            x @ projection.weight[rows].T + projection.bias[rows]
            for x, projection in zip(
                (query, key, value), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
            )
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(attention.head_dim)).softmax(-1)
        total = total + weights @ v @ attention.out_proj.weight[:, rows].T
    return total


@pytest.mark.parametrize("kept", [[1], [0, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_heads_against_a_loop_over_heads(kept):
    attention = convert_attention(lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).double())
    inputs = [torch.randn(SAMPLES, length, WIDTH, dtype=torch.float64) for length in (QUERIES, KEYS, KEYS)]
    reference = one_by_one(attention, *inputs, kept)
    shrink(attention, {head_groups(attention)[0]: kept})
    assert attention.num_heads == len(kept)
    for need_weights in (False, True):
        assert torch.allclose(attention(*inputs, need_weights=need_weights)[0], reference, atol=1e-14, rtol=0)


def with_masks(attention, group, kept):
    reference = copy.deepcopy(attention)
    for name, stays in group.masks(reference, kept).items():
        reference.get_parameter(name).data.masked_fill_(~stays, 0)
    return reference


@pytest.mark.parametrize("need_weights", [False, True])
def test_shrunk_is_masked(need_weights):
    attention = convert_attention(lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    (group,) = head_groups(attention)
    reference, kept = with_masks(attention, group, [0, 2]), [0, 2]
    shrink(attention, {group: kept})
    steps = torch.randn(SAMPLES, QUERIES, WIDTH)
    (output, weights), (wanted, wanted_weights) = (
        m(steps, steps, steps, need_weights=need_weights, average_attn_weights=False) for m in (attention, reference)
    )
    assert torch.allclose(output, wanted, atol=2e-6, rtol=0)
    if need_weights:
        assert torch.allclose(weights, wanted_weights[:, kept], atol=5e-7, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_shrunk_is_masked_to_the_last_bit(need_weights):
    """All numbers are quarters and all attention weights 1/8: sums are then exact in whatever order they are taken."""
    attention = convert_attention(lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    for parameter in attention.parameters():
        parameter.data.copy_((4 * parameter).round() / 4)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.zeros_(projection.weight)
    attention.q_proj.bias.data.zero_()
    (group,) = head_groups(attention)
    reference = with_masks(attention, group, [0, 2])
    shrink(attention, {group: [0, 2]})
    steps = torch.randint(-8, 9, (SAMPLES, 8, WIDTH)) / 4
    output, wanted = (m(steps, steps, steps, need_weights=need_weights)[0] for m in (attention, reference))
    assert output.abs().max() > 1
    assert torch.equal(output, wanted)


def test_weights_are_the_mean_over_the_heads_that_are_left():
    attention = convert_attention(lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    steps = torch.randn(SAMPLES, QUERIES, WIDTH)
    each = attention(steps, steps, steps, average_attn_weights=False)[1]
    shrink(attention, {head_groups(attention)[0]: [3, 1]})
    mean = attention(steps, steps, steps)[1]
    assert torch.allclose(mean, (each[:, 1] + each[:, 3]) / 2, atol=1e-6)
    with pytest.raises(InputError, match=r"attn_mask has shape \(12, 5, 5\), but must have \(5, 5\) or \(6, 5, 5\)"):
        attention(steps, steps, steps, attn_mask=torch.zeros(SAMPLES * HEADS, QUERIES, QUERIES))


def test_neurons_against_a_hand_made_network():
    network = encoder(1).double()
    (group,) = neuron_groups(network)
    assert group.size == 16
    layer, kept = copy.deepcopy(network.layers[0]), [0, 3, 4, 15]
    shrink(network, {group: kept})
    steps = torch.randn(SAMPLES, QUERIES, WIDTH, dtype=torch.float64)
    inner = torch.stack([F.relu(steps @ layer.linear1.weight[n] + layer.linear1.bias[n]) for n in kept], -1)
    wanted = sum(inner[..., i, None] * layer.linear2.weight[:, n] for i, n in enumerate(kept)) + layer.linear2.bias
    small = network.layers[0]
    assert torch.allclose(small.linear2(F.relu(small.linear1(steps))), wanted, atol=1e-13)
    assert (small.linear1.out_features, small.linear2.in_features) == (4, 4)
    with torch.no_grad():  # and through the fast path, which PyTorch's attention still takes
        slow = network.train()(steps)
        assert torch.allclose(network.eval()(steps), slow, atol=1e-12)


def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, WIDTH), encoder(4, dropout=0.1), nn.Linear(WIDTH, 2))


def smaller():
    network = convert_attention(build())
    remove_layers(network[1], [3, 0, 1])
    heads, neurons = head_groups(network), neuron_groups(network)
    keep = {heads[0]: [0, 2], heads[1]: [3], heads[2]: [0, 1, 3]}
    return shrink(network, {**keep, **{group: range(number, 16, 3) for number, group in enumerate(neurons)}})


@pytest.mark.slow
def test_a_smaller_encoder_is_described_rebuilt_trained_and_saved():
    network = smaller()
    description = json.loads(json.dumps(sizes_of(network)))
    again = set_sizes(build(), description)
    assert again.load_state_dict(network.state_dict(), strict=True)
    assert str(again) == str(network)
    assert sizes_of(again) == description
    steps, padding = torch.randn(3, 5, 3), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        for inputs in (steps, steps[:1], steps[:, :2]):
            assert torch.equal(network.eval()(inputs), again.eval()(inputs))
        hidden = [m[1](m[0](steps), src_key_padding_mask=padding) for m in (network, again)]
        assert torch.equal(*hidden)
    dense, small = build().state_dict(), network.state_dict()
    counts = [sum(tensor.numel() for tensor in state.values()) for state in (small, dense)]
    files = [size(state) for state in (small, dense)]
    assert counts[0] < 0.6 * counts[1]
    assert abs(files[0] - files[1] * counts[0] / counts[1]) < 0.01 * files[1] + 300 * len(small)
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in small.values())
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(network(steps), torch.ones(3, 5, 2))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def size(state):
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


@pytest.mark.parametrize(
    ("batch_first", "sizes"), list(itertools.product([False, True], [{}, {"kdim": 6, "vdim": 10}, {"bias": False}]))
)
def test_one_layer_is_described_and_rebuilt(batch_first, sizes):
    def make():
        return nn.MultiheadAttention(WIDTH, HEADS, dropout=0.25, batch_first=batch_first, dtype=torch.float64, **sizes)

    attention = convert_attention(make())
    shrink(attention, {head_groups(attention)[0]: [1, 2, 3]})
    description = layer_sizes(attention)
    again = resize_layer(make().eval(), json.loads(json.dumps(description)))
    again.load_state_dict(attention.state_dict(), strict=True)
    assert layer_sizes(again) == description
    assert description["num_heads"] == 3
    assert (again.dropout, again.q_proj.weight.dtype, again.training) == (0.25, torch.float64, False)
    assert resize_layer(attention, description) is attention


def test_layers_are_the_objects_that_they_were():
    network = encoder(3)
    layers = list(network.layers)
    steps = torch.randn(2, 4, WIDTH)
    assert remove_layers(network, [2, 0]) is network
    assert list(network.layers) == [layers[0], layers[2]]
    assert network.num_layers == 2
    assert torch.allclose(network(steps), layers[2](layers[0](steps)), atol=1e-6)


def test_what_cannot_be_used_is_one_line():
    with pytest.raises(InputError, match="add_bias_kv or add_zero_attn"):
        convert_attention(nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)))
    with pytest.raises(InputError, match="add_bias_kv or add_zero_attn"):
        convert_attention(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
    network = encoder()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn is nn\.MultiheadAttention: call convert_attention"):
        head_groups(network)
    with pytest.raises(InputError, match="has no attention"):
        head_groups(nn.Linear(2, 2))
    with pytest.raises(InputError, match="has no TransformerEncoderLayer"):
        neuron_groups(nn.Linear(2, 2))
    for keep in ([], [2], [0, 0], [-1]):
        with pytest.raises(InputError, match="different indices below 2"):
            remove_layers(network, keep)
    attention = convert_attention(nn.MultiheadAttention(WIDTH, HEADS))
    with pytest.raises(InputError, match="at least one of the 4 heads must stay"):
        shrink(attention, {head_groups(attention)[0]: []})
    steps = torch.randn(2, 3, WIDTH)
    with pytest.raises(InputError, match="is_causal needs attn_mask"):
        attention(steps, steps, steps, is_causal=True)
    with pytest.raises(InputError, match="num_heads must be at least 1, got 0"):
        Attention(embed_dim=8, num_heads=0, head_dim=2)
    with pytest.raises(InputError, match="2 layers cannot be rebuilt with 3"):
        set_sizes(network, {"": {"kind": "encoder", "num_layers": 3}})
