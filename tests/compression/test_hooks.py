"""Hooks stay where a step replaces the layer that they are on."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from distill_lightning import FEEDModule, InputError, SmallCNN
from distill_lightning.compression import Compressor, LowRank, PruneUnits, TieLayers
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.shrink.attention import Attention, convert_attention
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of

LAYERS = {
    "Linear": (lambda: nn.Linear(6, 6), torch.randn(4, 6), {"rank": 6}),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), {"rank": 1.0}),
    "Embedding": (lambda: nn.Embedding(9, 5), torch.arange(9), {"rank": 5}),
    "LSTM": (lambda: nn.LSTM(5, 4), torch.randn(6, 2, 5), {"rank": 1.0}),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def wrapped(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer)


def apply(network, step, inputs):
    return Compressor(network, [step], inputs).apply()


@pytest.mark.parametrize("kind", LAYERS)
def test_factored_layers_keep_them_in_their_order_and_handles_remove_them(kind):
    build, inputs, options = LAYERS[kind]
    network = wrapped(build())
    seen = []

    def shifted(_module, _args, output):
        moved = first(output) + 1
        return (moved, output[1]) if isinstance(output, tuple) else moved

    network[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = network[0].register_forward_hook(shifted)
    network[0].register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True, always_call=True)
    network[0].register_full_backward_pre_hook(lambda *_: seen.append("back"))
    dense = copy.deepcopy(network)
    wanted = first(dense(inputs)).detach()
    apply(network, LowRank(only_if_smaller=False, **options), inputs)
    seen.clear()  # of trials
    assert type(network[0]) is not type(dense[0])
    output = first(network(inputs))
    torch.testing.assert_close(output.detach(), wanted, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert seen == ["before", "after", "back"]
    handle.remove()
    torch.testing.assert_close(first(network(inputs)).detach(), wanted - 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "convert",
    [
        lambda network, inputs: convert_attention(network),
        lambda network, inputs: apply(network, LowRank(rank=8, convert_attention=True, only_if_smaller=False), inputs),
    ],
    ids=["alone", "LowRank"],
)
def test_converted_attention_keeps_them(convert):
    torch.manual_seed(0)
    network = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    network.self_attn.register_forward_hook(lambda _module, _args, output: (2 * output[0], output[1]))
    inputs = torch.randn(3, 5, 8)
    wanted = network.train()(inputs).detach()
    network = convert(network, inputs)
    assert isinstance(network.self_attn, Attention)
    torch.testing.assert_close(network(inputs).detach(), wanted, rtol=1e-5, atol=1e-5)


def test_a_network_that_is_rebuilt_keeps_those_of_its_constructor():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.layer.register_forward_hook(lambda _module, _args, output: output + 1)

        def forward(self, inputs):
            return self.layer(inputs)

    inputs, network = torch.randn(4, 6), Shifted()
    apply(network, LowRank(rank=2), inputs)
    fresh = rebuild_structure(Shifted(), structure_of(network))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(inputs), network(inputs))


class Large:
    """What a network must not be copied with."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    def note(self, *given):
        self.seen.append([part for part in given if not isinstance(part, (torch.Tensor, tuple))])


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.calls = 0
        self.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


def test_what_their_methods_belong_to_is_copied_with_its_own_network_only():
    network, owner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Counting(), nn.Linear(4, 2)), Large()
    network[1].register_forward_hook(owner.note)
    network[1].register_forward_pre_hook(partial(owner.note, "before"))
    network[1].register_load_state_dict_post_hook(owner.note)
    copied = copy_network(network)
    copied(torch.randn(2, 3))
    assert owner.seen == [["before", copied[1]], [copied[1]]]
    assert (network[2].calls, copied[2].calls) == (0, 1)
    apply(network, PruneUnits(unit="channel", amount=0.5), torch.randn(2, 3))
    assert network[0].out_features == 2
    owner.seen.clear()
    network(torch.randn(2, 3))
    assert owner.seen == [["before", network[1]], [network[1]]]


def test_those_of_a_state_dict_are_refused_or_left_alone():
    def build():
        network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        network[0].register_state_dict_post_hook(lambda *_: None)
        return network

    inputs = torch.randn(2, 6)
    with pytest.raises(InputError, match="'0' has hooks of its state dict, .*: remove them, or exclude the layer"):
        apply(build(), LowRank(rank=2, targets=["0"]), inputs)
    compressor = Compressor(network := build(), [LowRank(rank=2)], inputs)
    compressor.apply()
    assert type(network[0]) is nn.Linear is not type(network[1])
    assert any("0: it has hooks of its state dict" in note for note in compressor.piece.notes)


def test_a_norm_that_loses_features_keeps_them():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    network, inputs, seen = build(), torch.randn(2, 6), []
    network[1].register_full_backward_hook(lambda *_: seen.append("back"))
    apply(network, PruneUnits(unit="channel", amount=0.5), inputs)
    assert network[1].features == 4
    network(inputs).sum().backward()
    assert seen == ["back"]
    network = build()
    network[1].register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(InputError, match="no channels that can be removed"):
        apply(network, PruneUnits(unit="channel", amount=0.5), inputs)


REFUSED = {
    "tied": (lambda network: network[0].register_forward_hook(lambda *_: None), TieLayers(groups=[["0", "1"]])),
    "factored": (
        lambda network: network[0].register_state_dict_post_hook(lambda *_: None), LowRank(rank=2, targets="Linear")
    ),
    "converted": (
        lambda network: network[2].register_state_dict_post_hook(lambda *_: None),
        LowRank(rank=2, convert_attention=True),
    ),
    "without heads": (
        lambda network: network[2].register_state_dict_post_hook(lambda *_: None), PruneUnits(unit="head", amount=0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_refused_before_anything_is_trained(name):
    hook, step = REFUSED[name]
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.MultiheadAttention(6, 2))
    hook(network)
    with pytest.raises(InputError, match=r"step 1 .*'[02]' has hooks"):
        Compressor(network, [step], torch.randn(2, 6), epochs=5, dense_epochs=3)


@pytest.mark.slow
def test_a_tapped_layer_can_be_factored():
    student = SmallCNN(3, width=8)
    path = [name for name, layer in student.named_modules() if type(layer) is nn.Conv2d][-1]
    module = FEEDModule(
        student, [SmallCNN(3, width=8)], num_classes=3, student_layer=path, teacher_layers=path, beta=1.0
    )
    images = torch.randn(2, 1, 8, 8)
    before = module.student_tap(images)[1]
    apply(student, LowRank(rank=1.0, only_if_smaller=False, targets=[path]), images)
    after = module.student_tap(images)[1]
    torch.testing.assert_close(after[path], before[path], rtol=1e-4, atol=1e-5)
