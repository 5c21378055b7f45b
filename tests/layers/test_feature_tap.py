"""FeatureTap: inner features, and nothing else changed."""

import copy
import pickle
import weakref

import pytest
import torch
import torch._dynamo
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from distill_lightning import InputError, SmallResNet
from distill_lightning.layers import FeatureTap, dry_forward, resolve_layer, resolve_layers


def images(count=2, channels=1, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def network_of(seed=0, **arguments):
    torch.manual_seed(seed)
    return SmallResNet(3, **({"width": 2} | arguments))


def hooked(network, layers, inputs):
    """Output and features by hooks registered here, removed at once."""
    seen = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name in layers
    ]
    output = network(inputs)
    for handle in handles:
        handle.remove()
    return output, seen


class Twice(nn.Module):
    """Runs ``shared`` twice, ``unused`` never, and ``several`` gives a tuple."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.several = Several()

    def forward(self, inputs):
        first, _ = self.several(self.shared(self.shared(inputs)))
        return first


class Several(nn.Module):
    """Gives a tuple."""

    def forward(self, inputs):
        return inputs, inputs


class TwoInputs(nn.Module):
    """Reads two tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(2, 3, 4)

    def forward(self, first, second):
        return self.inner(first, second)


class InPlace(nn.Module):
    """The output of ``conv`` is overwritten by ``relu``; the output of ``relu`` is not, nor is that of ``block``."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True))

    def forward(self, inputs):
        return self.block(self.relu(self.conv(inputs))).mean(dim=(2, 3))


# values


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["stage3"], ["stem", "stage2.0.conv1", "head"], ["pool", "stem.0"]])
@pytest.mark.parametrize("training", [False, True])
def test_the_features_are_those_of_hand_registered_hooks(layers, training):
    network = network_of().train(training)
    twin = copy.deepcopy(network)
    output, features = FeatureTap(network, layers)(images())
    expected_output, expected = hooked(twin, layers, images())
    assert torch.equal(output, expected_output)
    assert set(features) == set(layers)
    assert all(torch.equal(features[name], expected[name]) for name in layers)


def test_every_call_gives_the_features_of_its_own_inputs():
    network = network_of().eval()
    tap = FeatureTap(network, "stage3")
    first, second = tap(images())[1], tap(images() + 1)[1]
    assert torch.equal(first["stage3"], hooked(network, ["stage3"], images())[1]["stage3"])
    assert torch.equal(second["stage3"], hooked(network, ["stage3"], images() + 1)[1]["stage3"])


def test_gradients_flow_through_a_feature_as_through_the_network():
    network = network_of()
    twin = copy.deepcopy(network)
    FeatureTap(network, "stage3")(images())[1]["stage3"].sum().backward()
    hooked(twin, ["stage3"], images())[1]["stage3"].sum().backward()
    assert torch.equal(network.stem[0].weight.grad, twin.stem[0].weight.grad)
    assert network.stem[0].weight.grad.abs().sum() > 0
    assert network.head.weight.grad is None


def test_a_network_with_several_inputs_gets_all_of_them():
    network = TwoInputs()
    first, second = torch.rand(5, 2), torch.rand(5, 3)
    output, features = FeatureTap(network, "inner")(first, second)
    assert torch.equal(output, network(first, second))
    assert features["inner"] is output


def test_taps_of_two_networks_with_the_same_layer_name_keep_apart():
    first, second = network_of(0).eval(), network_of(1).eval()
    taps = [FeatureTap(network, "stage3") for network in (first, second)]
    features = [tap(images())[1]["stage3"] for tap in taps]
    for network, feature in zip((first, second), features, strict=True):
        assert torch.equal(feature, hooked(network, ["stage3"], images())[1]["stage3"])
    assert not torch.equal(*features)


def test_two_taps_of_one_network_keep_apart():
    network = network_of().eval()
    outer, inner = FeatureTap(network, "stage3"), FeatureTap(network, ["stage3", "stem"])
    assert set(outer(images())[1]) == {"stage3"}
    assert set(inner(images())[1]) == {"stage3", "stem"}


# names


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("stage3", ("stage3",)),
        (["stage3", "stem"], ("stage3", "stem")),
        ("stage?", ("stage1", "stage2", "stage3")),
        ("stage[13]", ("stage1", "stage3")),
        ("stage*.conv1", ("stage1.0.conv1", "stage2.0.conv1", "stage3.0.conv1")),
        (["stage3", "stage?"], ("stage3", "stage1", "stage2")),
        (["head", "head"], ("head",)),
    ],
)
def test_globs_expand_in_the_order_of_the_network(layers, expected):
    assert resolve_layers(network_of(), layers) == expected
    assert FeatureTap(network_of(), layers).layers == expected


def test_an_exact_name_wins_over_its_reading_as_a_glob():
    network = nn.Module()
    network.add_module("a[b]", nn.Identity())
    network.add_module("ab", nn.Identity())
    assert resolve_layers(network, "a[b]") == ("a[b]",)


def test_globs_see_upper_and_lower_case():
    with pytest.raises(InputError, match="has no layer 'Stage"):
        resolve_layers(network_of(), "Stage?")


@pytest.mark.parametrize(
    ("layer", "near"), [("stage33", "stage3"), ("stage3.0.conv3", r"stage3\.0\.conv1"), ("haed", "head")]
)
def test_an_unknown_layer_is_refused_with_near_names(layer, near):
    with pytest.raises(InputError, match=rf"SmallResNet has no layer '{layer}'; similar names: .*\b{near}\b"):
        FeatureTap(network_of(), layer)


def test_a_layer_like_no_other_is_refused_with_some_names():
    with pytest.raises(InputError, match=r"has no layer 'xyzzy'; similar names: stem, stem\.0"):
        FeatureTap(network_of(), ["stage3", "xyzzy"])


def test_the_network_itself_is_no_layer():
    with pytest.raises(InputError, match="has no layer ''"):
        FeatureTap(network_of(), "")


def test_a_refused_tap_leaves_no_hook():
    network = network_of()
    with pytest.raises(InputError, match="no layer"):
        FeatureTap(network, ["stage3", "xyzzy"])
    assert all(not module._forward_hooks for module in network.modules())


def test_resolve_layer_gives_the_one_name():
    assert resolve_layer(network_of(), "stage3") == "stage3"
    assert resolve_layer(network_of(), "*3.0.conv2") == "stage3.0.conv2"


def test_resolve_layer_refuses_several_and_none():
    with pytest.raises(InputError, match=r"'stage\?' names 3 layers \(stage1, stage2, stage3\); name one"):
        resolve_layer(network_of(), "stage?")
    with pytest.raises(InputError, match="has no layer 'stage4'"):
        resolve_layer(network_of(), "stage4")


def test_the_printed_tap_says_network_and_layers():
    assert repr(FeatureTap(network_of(), "stage3")) == "FeatureTap(SmallResNet, ('stage3',))"


# layers that give no single feature


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("shared", "the tapped layer 'shared' ran 2 times in a forward"),
        ("unused", "the tapped layer 'unused' did not run in a forward"),
        ("several", "the tapped layer 'several' returns tuple, not a tensor"),
    ],
)
def test_a_layer_without_one_tensor_is_refused(layer, message):
    tap = FeatureTap(Twice(), layer)
    with pytest.raises(InputError, match=f"Twice: {message}"):
        tap(torch.rand(2, 4))
    with pytest.raises(InputError, match=f"Twice: {message}"):
        tap.shapes((4,))


def test_an_error_of_the_network_comes_through_and_the_tap_works_again():
    tap = FeatureTap(network_of().eval(), "stage3")
    with pytest.raises(RuntimeError, match="expected input"):
        tap(images(channels=5))
    assert tap._kept == {}
    tap.network(images())
    assert tap._kept == {}
    assert tap(images())[1]["stage3"].shape == (2, 8, 2, 2)


# ordinary forwards


def test_an_ordinary_forward_keeps_nothing_and_gives_the_same():
    network = network_of().eval()
    untapped = copy.deepcopy(network)
    FeatureTap(network, "stage3")
    kept = []
    network.stage3.register_forward_hook(lambda _module, _inputs, output: kept.append(weakref.ref(output)))
    with torch.no_grad():
        output = network(images())
    assert torch.equal(output, untapped(images()))
    assert kept[0]() is None


def test_a_call_keeps_nothing_after_it():
    network = network_of().eval()
    tap = FeatureTap(network, "stage3")
    with torch.no_grad():
        _, features = tap(images())
    kept = weakref.ref(features["stage3"])
    del features
    assert kept() is None


def test_a_removed_tap_leaves_the_network_without_hooks():
    network = network_of()
    tap = FeatureTap(network, ["stem", "stage3"])
    assert sum(len(module._forward_hooks) for module in network.modules()) == 2
    tap.remove()
    assert sum(len(module._forward_hooks) for module in network.modules()) == 0
    with pytest.raises(InputError, match="did not run"):
        tap(images())


def test_a_tap_adds_nothing_to_the_state_dict():
    network = network_of()
    before = list(network.state_dict())
    FeatureTap(network, "stage3")
    assert list(network.state_dict()) == before


# shapes and dry_forward


def test_shapes_are_those_of_one_sample():
    tap = FeatureTap(network_of(in_channels=3, width=4), ["stage?", "head"])
    output, features = tap.shapes((3, 16, 12))
    assert output == (1, 3)
    assert features == {
        "stage1": (1, 4, 16, 12),
        "stage2": (1, 8, 8, 6),
        "stage3": (1, 16, 4, 3),
        "head": (1, 3),
    }


@pytest.mark.parametrize("run", ["shapes", "dry_forward"])
def test_a_dry_run_leaves_modes_buffers_hooks_and_generator_bitwise_unchanged(run):
    network = nn.Sequential(network_of(), nn.Dropout(0.5)).train()
    network(images(8))
    network[0].stage2.eval()
    tap = FeatureTap(network, "0.stage3")
    modes = [module.training for module in network.modules()]
    hooks = [len(module._forward_hooks) for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()
    tap.shapes((1, 8, 8)) if run == "shapes" else dry_forward(network, (1, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_failed_dry_run_leaves_modes_and_hooks_unchanged():
    network = network_of().train()
    network.stage2.eval()
    tap = FeatureTap(network, "stage3")
    modes = [module.training for module in network.modules()]
    with pytest.raises(InputError, match=r"SmallResNet does not take an input of shape \(3, 8, 8\)"):
        tap.shapes((3, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert sum(len(module._forward_hooks) for module in network.modules()) == 1


def test_dry_forward_gives_the_eval_output_on_zeros_without_a_graph():
    network = network_of().train()
    network(images(8))
    output = dry_forward(network, (1, 8, 8))
    assert not output.requires_grad
    assert torch.equal(output, copy.deepcopy(network).eval()(torch.zeros(1, 1, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dry_forward_feeds_the_networks_own_type(dtype):
    assert dry_forward(network_of().to(dtype), (1, 8, 8)).dtype == dtype


def test_dry_forward_runs_a_network_without_parameters():
    assert dry_forward(nn.Flatten(), (2, 3)).shape == (1, 6)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 8), (8,)])
def test_dry_forward_refuses_an_input_the_network_does_not_take_in_one_line(shape):
    with pytest.raises(InputError, match=r"does not take an input of shape .* give input_shape=\(C, H, W\)") as caught:
        dry_forward(network_of(), shape)
    assert "\n" not in str(caught.value)


class Fussy(nn.Module):
    """Raises what it is told to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, inputs):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("text"), RuntimeError(), ValueError("text"), IndexError("text"), AssertionError("text")]
)
def test_dry_forward_says_that_the_input_is_not_taken_whatever_the_network_raises(error):
    with pytest.raises(InputError, match=r"Fussy does not take an input of shape \(1, 8, 8\)"):
        dry_forward(Fussy(error), (1, 8, 8))


# what later operations write into a feature


class Late(nn.Module):
    """Writes into the output of ``body`` in train mode, in eval mode, or both."""

    def __init__(self, *when):
        super().__init__()
        self.stem, self.body, self.when = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), when

    def forward(self, inputs):
        features = self.body(self.stem(inputs))
        if self.training in self.when:
            features += 1
            features[:, 0].mul_(3)
        return features.mean(dim=(2, 3))


def late(*when):
    torch.manual_seed(0)
    return Late(*when)


@pytest.mark.parametrize("when", [(True,), (False,), (True, False), ()])
def test_a_feature_is_what_its_layer_returned(when):
    network = late(*when)
    tap = FeatureTap(network, "body")
    for training in (False, True, True, False, False, True):
        network.train(training)
        output, features = tap(images())
        expected = network.body(network.stem(images()))
        assert torch.equal(features["body"], expected)
        assert torch.equal(output, network(images()))


@pytest.mark.parametrize("when", [(True,), (True, False)])
def test_gradients_of_a_feature_that_is_written_into_are_those_of_one_that_is_not(when):
    network, plain = late(*when), late()
    tap = FeatureTap(network, "body")
    for _ in range(2):
        network.zero_grad()
        plain.zero_grad()
        output, features = tap(images())
        (features["body"].square().sum() + output.sum()).backward()
        feature = plain.body(plain.stem(images()))
        changed = torch.cat([(feature[:, :1] + 1) * 3, feature[:, 1:] + 1], dim=1)
        (feature.square().sum() + changed.mean(dim=(2, 3)).sum()).backward()
        for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_only_what_is_written_into_is_copied():
    for network, is_copied in ((late(True), True), (late(False), False)):
        tap, seen = FeatureTap(network.train(), "body"), []
        network.body.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        for _ in range(2):
            feature = tap(images())[1]["body"]
            assert (feature is not seen[-1]) == is_copied
            assert tap._copied == ({"body"} if is_copied or len(seen) == 1 else set())


def test_a_part_in_another_mode_is_seen_anew():
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5, inplace=True))
    network[1].eval()
    tap = FeatureTap(network, "0")
    for training in (False, True):
        network[1].train(training)
        output, features = tap(torch.rand(3, 4))
        assert (features["0"] == 0).sum() == 0
        assert ((output == 0).sum() > 0) == training


class Whim(nn.Module):
    """Writes into a feature of large inputs alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, inputs):
        features = self.body(inputs)
        return features.relu_() if inputs.max() > 1 else features


def test_what_is_written_into_now_and_then_is_refused():
    tap = FeatureTap(Whim(), "body")
    tap(torch.zeros(2, 4))
    with pytest.raises(InputError, match="Whim: the tapped layer 'body' was overwritten in place by a later operation"):
        tap(torch.full((2, 4), 2.0))


@pytest.mark.parametrize("training", [False, True])
def test_the_pooled_feature_of_an_efficientnet_is_not_the_one_that_dropout_changed(training):
    torch.manual_seed(0)
    network = torchvision.models.efficientnet_b0(num_classes=3).train(training)
    tap = FeatureTap(network, "avgpool")
    for _ in range(2):
        inputs = torch.rand(2, 3, 32, 32)
        torch.manual_seed(1)
        feature = tap(inputs)[1]["avgpool"]
        torch.manual_seed(1)
        assert torch.equal(feature, network.avgpool(network.features(inputs)))
        assert (feature == 0).sum() == 0


def test_features_of_inference_mode_are_ordinary_and_as_they_were():
    network = InPlace().eval()
    tap = FeatureTap(network, "conv")
    with torch.inference_mode():
        _, features = tap(images())
    assert not features["conv"].is_inference()
    assert torch.equal(features["conv"], network.conv(images()))
    assert features["conv"].min() < 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_gives_what_its_layer_returned(fresh_dynamo, backend):
    network, plain = late(True), late()
    tap = FeatureTap(network, "body")
    network.compile(backend=backend)
    for _ in range(2):
        network.zero_grad()
        plain.zero_grad()
        feature, expected = tap(images())[1]["body"], plain.body(plain.stem(images()))
        assert torch.allclose(feature, expected, atol=1e-6)
        feature.square().sum().backward()
        expected.square().sum().backward()
        assert torch.allclose(network.stem.weight.grad, plain.stem.weight.grad, rtol=1e-4, atol=1e-5)


# features without a graph


class Checkpointed(nn.Module):
    """Runs its body, all but the stem, inside of an activation checkpoint."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.head = nn.Linear(2, 3)
        self.stem = nn.Conv2d(1, 2, 3)
        self.blocks = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, inputs):
        inputs = self.stem(inputs)
        if self.reentrant is not None:
            inputs = checkpoint_sequential(self.blocks, 2, inputs, use_reentrant=self.reentrant)
        else:
            inputs = self.blocks(inputs)
        return self.head(inputs.mean((2, 3)))


def checkpointed(*, reentrant):
    torch.manual_seed(0)
    return Checkpointed(reentrant=reentrant)


def test_a_feature_inside_a_reentrant_checkpoint_is_refused():
    network = checkpointed(reentrant=True)
    twin = copy.deepcopy(network)
    twin(images())
    tap = FeatureTap(network, "blocks.0")
    with pytest.raises(InputError, match=r"the feature of 'blocks\.0' has no graph.*use_reentrant=False") as caught:
        tap(images())
    assert "\n" not in str(caught.value)
    assert network.training
    assert sum(len(module._forward_hooks) for module in network.modules()) == 1
    # Nothing has been moved by looking for the reason.
    assert all(map(torch.equal, network.state_dict().values(), twin.state_dict().values()))


# What a reentrant checkpoint returns has a graph, and what runs after it.
@pytest.mark.parametrize(
    ("layer", "reentrant"),
    [("blocks.0", False), ("blocks.1", False), ("blocks.3", False), ("blocks.1", True), ("blocks.2", True)],
)
def test_features_and_gradients_with_a_checkpoint_are_those_of_none(layer, reentrant):
    network, plain = checkpointed(reentrant=reentrant), checkpointed(reentrant=None)
    taps = [FeatureTap(one, layer) for one in (network, plain)]
    for _ in range(2):
        features = []
        for one, tap in zip((network, plain), taps, strict=True):
            one.zero_grad()
            output, found = tap(images(4))
            (output.sum() + found[layer].square().sum()).backward()
            features.append(found[layer])
        assert torch.equal(*features)
        for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_feature_of_what_is_frozen_needs_no_graph():
    network = checkpointed(reentrant=True)
    network.stem.requires_grad_(requires_grad=False)
    network.blocks.requires_grad_(requires_grad=False)
    tap = FeatureTap(network, "blocks.0")
    assert not tap(images())[1]["blocks.0"].requires_grad
    network.blocks[1:].requires_grad_()
    assert not tap(images())[1]["blocks.0"].requires_grad
    network.stem.requires_grad_()
    with pytest.raises(InputError, match="has no graph"):
        tap(images())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_feature_needs_no_graph_without_gradients():
    network = checkpointed(reentrant=True)
    with torch.no_grad():
        assert FeatureTap(network, "blocks.0")(images())[1]["blocks.0"].shape == (2, 2, 4, 4)


# layers that were replaced or wrapped


def test_a_layer_that_was_replaced_is_tapped_in_its_place():
    network = network_of().eval()
    tap = FeatureTap(network, ["stem.1", "stage3"])
    old = network.stem[1]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert converted.stem[1] is not old
    with torch.no_grad():
        _, features = tap(images())
    expected = hooked(network, ["stem.1", "stage3"], images())[1]
    assert all(torch.equal(features[name], expected[name]) for name in expected)
    assert not old._forward_hooks


def test_a_layer_that_has_gone_is_named():
    network = network_of()
    tap = FeatureTap(network, "stage3.0")
    network.stage3 = nn.Identity()
    with pytest.raises(InputError, match=r"the tapped layer 'stage3\.0' is no longer there"):
        tap(images())


@pytest.mark.parametrize("layer", ["stage3.0", "module.stage3.module.0"])
def test_wrappers_have_no_place_in_names(layer):
    network = network_of().eval()
    expected = hooked(network, ["stage3.0"], images())[1]["stage3.0"]
    network.stage3 = nn.DataParallel(network.stage3)
    tap = FeatureTap(nn.DataParallel(network), layer)
    assert tap.layers == ("stage3.0",)
    assert torch.equal(tap(images())[1]["stage3.0"], expected)


@pytest.mark.slow
def test_a_part_that_is_compiled_has_the_names_that_it_had(fresh_dynamo):
    network = network_of().eval()
    expected = hooked(network, ["stage3.0"], images())[1]["stage3.0"]
    network.stage3 = torch.compile(network.stage3, backend="eager")
    with torch.no_grad():
        assert torch.allclose(FeatureTap(network, "stage3.0")(images())[1]["stage3.0"], expected, atol=1e-6)


@pytest.mark.parametrize("layer", ["relu", "block", "block.1"])
def test_a_relu_in_place_inside_the_tapped_module_is_accepted(layer):
    network = InPlace().eval()
    tap = FeatureTap(network, layer)
    shape = tap.shapes((1, 8, 8))[1][layer]
    feature = tap(images())[1][layer]
    assert shape[1:] == feature.shape[1:]
    assert feature.min().item() == 0


# copies


def test_a_deep_copy_of_network_and_tap_works_apart_from_the_original():
    network = network_of().eval()
    tap = FeatureTap(network, "stage3")
    other_network, other = copy.deepcopy((network, tap))
    assert other.network is other_network
    with torch.no_grad():
        other_network.stem[0].weight.mul_(-1)
    assert torch.equal(other(images())[1]["stage3"], hooked(other_network, ["stage3"], images())[1]["stage3"])
    assert torch.equal(tap(images())[1]["stage3"], hooked(network, ["stage3"], images())[1]["stage3"])
    other.remove()
    assert tap(images())[1]["stage3"].shape == (2, 8, 2, 2)
    assert not other_network.stage3._forward_hooks


def test_a_deep_copy_of_the_network_alone_can_be_tapped_anew():
    network = network_of().eval()
    tap = FeatureTap(network, "stage3")
    twin = copy.deepcopy(network)
    again = FeatureTap(twin, "stage3")
    twin(images())
    assert tap._kept == {}
    assert torch.equal(again(images())[1]["stage3"], tap(images())[1]["stage3"])


def test_a_pickled_network_and_tap_work_as_before():
    network = network_of().eval()
    tap = FeatureTap(network, ["stem", "stage3"])
    other_network, other = pickle.loads(pickle.dumps((network, tap)))
    assert other.network is other_network
    output, features = other(images())
    expected, expected_features = tap(images())
    assert torch.equal(output, expected)
    assert all(torch.equal(features[name], expected_features[name]) for name in ("stem", "stage3"))
    other.remove()
    assert not other_network.stage3._forward_hooks


# compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    yield
    torch._dynamo.config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before compile", "after compile", "after the first compiled call"])
@pytest.mark.parametrize("called_between", [False, True])
def test_a_tap_works_on_a_network_compiled_in_place(fresh_dynamo, moment, called_between):
    network = network_of().eval()
    expected_output, expected = hooked(network, ["stage3"], images())
    tap = FeatureTap(network, "stage3") if moment == "before compile" else None
    network.compile(backend="eager")
    if moment == "after the first compiled call":
        network(images())
    tap = tap or FeatureTap(network, "stage3")
    if called_between:
        network(images())
    for _ in range(2):
        output, features = tap(images())
        assert torch.allclose(output, expected_output, atol=1e-6)
        assert torch.allclose(features["stage3"], expected["stage3"], atol=1e-6)
    network(images())
    assert tap._kept == {}


@pytest.mark.slow
def test_a_tap_works_when_an_unhooked_twin_was_compiled_first(fresh_dynamo):
    twin, network = network_of(1).eval(), network_of(0).eval()
    twin.compile(backend="eager")
    twin(images())
    expected = hooked(network, ["stage3"], images())[1]["stage3"]
    tap = FeatureTap(network, "stage3")
    network.compile(backend="eager")
    assert torch.allclose(tap(images())[1]["stage3"], expected, atol=1e-6)


@pytest.mark.slow
def test_taps_of_two_compiled_networks_of_one_shape_keep_apart(fresh_dynamo):
    networks = [network_of(seed).eval() for seed in (0, 1)]
    expected = [hooked(network, ["stage3"], images())[1]["stage3"] for network in networks]
    taps = [FeatureTap(network, "stage3") for network in networks]
    for network in networks:
        network.compile(backend="eager")
    for _ in range(2):
        for tap, feature in zip(taps, expected, strict=True):
            assert torch.allclose(tap(images())[1]["stage3"], feature, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_trains_through_its_tap(fresh_dynamo):
    network = network_of().train()
    plain = copy.deepcopy(network)
    tap = FeatureTap(network, "stage3")
    network.compile(backend="eager")
    tap(images())[1]["stage3"].square().sum().backward()
    hooked(plain, ["stage3"], images())[1]["stage3"].square().sum().backward()
    assert torch.allclose(network.stem[0].weight.grad, plain.stem[0].weight.grad, atol=1e-5)


def test_an_eager_tap_leaves_dynamos_settings_alone(fresh_dynamo):
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    FeatureTap(network_of(), "stage3")(images())
    assert torch._dynamo.config.skip_nnmodule_hook_guards is True
