"""The steps Quantize and Encode, in a Compressor."""

import copy
import math

import pytest
import torch
from jsonargparse import ArgumentParser
from test_artefact import Tied, build, inputs_for, layers_of, outputs
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from distill_lightning import InputError
from distill_lightning.compression import Compressor, Encode, MixedPrecision, Quantize, Step, load_compressed
from distill_lightning.compression.access.computed import bake, computed, describe_weights, is_computed, original_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.weights import channel_axis, weight_names
from distill_lightning.compression.file.packed import pack_codes
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.structure.changes import rebuild_structure, structure_of
from distill_lightning.compression.values.activations import describe_input
from distill_lightning.compression.values.allocation import weight_errors
from distill_lightning.compression.values.codebook import share_weights
from distill_lightning.compression.values.ranges import weight_grid
from distill_lightning.compression.values.scheme import Scheme, fake_quantize


def compress(network, inputs, *steps, batches=None, **options):
    compressor = Compressor(network, list(steps), inputs, batches=batches, **options)
    compressor.apply()
    return compressor


def relative(one, other):
    return float((one - other).norm() / other.norm())


def task(seed=0, count=512):
    """Points on rings: what a few good hidden units tell apart."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 2, generator=generator)
    return points, (points.norm(dim=1) * 1.7).long().clamp_max(3)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def train(network, compressor=None, *, epochs=30, begin=0, lr=0.01, optimizer=None):
    """Full batches in four parts, always the same."""
    points, labels = task()
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=lr)
    for epoch in range(begin, epochs):
        network.train()
        if compressor is not None and compressor.begin_epoch(epoch, steps_per_epoch=4, optimizer=optimizer):
            optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        for part in range(4):
            optimizer.zero_grad()
            F.cross_entropy(network(points[part::4]), labels[part::4]).backward()
            if compressor is not None:
                compressor.before_optimizer_step()
            optimizer.step()
            if compressor is not None:
                compressor.after_optimizer_step(optimizer)
    return optimizer


def accuracy(network):
    points, labels = task(seed=1)
    with torch.no_grad():
        return float((network.eval()(points).argmax(dim=1) == labels).float().mean())


@pytest.fixture(scope="module")
def trained():
    network = mlp()
    train(network, epochs=80)
    assert accuracy(network) > 0.9
    return network


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "lstm", "transformer", "resnet"])
def test_int8_stays_near_the_float_network(kind):
    network, inputs = build(kind), inputs_for(kind)
    before = outputs(network, kind)
    compress(network, inputs, Quantize())
    assert 0 < relative(outputs(network, kind), before) < 0.02
    network = build(kind)
    compress(network, inputs, Quantize(act_bits=8), batches=[(inputs, None)])
    assert 0 < relative(outputs(network, kind), before) < 0.06


@pytest.mark.slow
def test_every_weight_is_what_its_function_makes_of_it():
    network = build("conv")
    weights = {path: layer.weight.detach().clone() for path, layer in network.named_modules() if weight_names(layer)}
    compress(network, inputs_for("conv"), Quantize(weight_bits=4, scheme="affine", per="group:5", observer="mse"))
    for path, weight in weights.items():
        layer = network.get_submodule(path)
        scheme = Scheme(4, "affine", "group:5", channel_axis(layer))
        wanted = fake_quantize(weight, *weight_grid(weight, scheme, rule="mse"), scheme)
        assert torch.equal(layer.weight, wanted)
    assert channel_axis(network[6]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "values"), [("binary", 2), ("binaryconnect", 2), ("ternary", 3), ("ttq", 3)])
def test_few_values_for_each_scale(scheme, values):
    network = build("resnet")
    compress(network, inputs_for("resnet"), Quantize(scheme=scheme))
    for layer in layers_of(network):
        rows = (
            layer.weight.detach().flatten(1)
            if scheme in ("binary", "ternary")
            else layer.weight.detach().reshape(1, -1)
        )
        assert all(len(row.unique()) <= values for row in rows)
        assert max(len(row.unique()) for row in rows) == values


def test_first_and_last_are_those_that_run_first_and_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, inputs):
            return self.last(self.middle(self.first(inputs)))

    network = Backwards()
    compress(
        network,
        torch.randn(2, 8),
        Quantize(weight_bits=2, act_bits=3, first_last_bits=8),
        batches=[(torch.randn(4, 8), None)],
    )
    bits = {
        path: describe_weights(getattr(network, path))["weight"]["scheme"]["bits"]
        for path in ("first", "middle", "last")
    }
    assert bits == {"first": 8, "middle": 2, "last": 8}
    inputs = {path: describe_input(getattr(network, path))["scheme"]["bits"] for path in bits}
    assert inputs == {"first": 8, "middle": 3, "last": 8}
    network = Backwards()
    compress(network, torch.randn(2, 8), Quantize(scheme="binary", first_last_bits=8))
    kinds = {path: describe_weights(getattr(network, path))["weight"]["scheme"]["kind"] for path in bits}
    assert kinds == {"first": "symmetric", "middle": "binary", "last": "symmetric"}


def test_bits_by_pattern_and_what_the_report_is_told():
    network = build("resnet")
    step = Quantize(weight_bits=4, bits={"Conv2d": 3, "stage2": 6, "stem.0": 8})
    piece = compress(network, inputs_for("resnet"), step).piece
    schemes = {
        path: describe_weights(layer)["weight"]["scheme"]["bits"]
        for path, layer in network.named_modules()
        if describe_weights(layer)
    }
    assert {schemes[path] for path in schemes if path.startswith("stage2")} == {6}
    assert (schemes["stem.0"], schemes["head"], schemes["stage1.0.conv1"]) == (8, 4, 3)
    assert "no kernel here computes with 3-bit weights: storage only" in piece.notes
    assert any("stage1.0.conv1.weight 3" in note for note in piece.notes)
    assert not any("8-bit" in note for note in piece.notes)


def bytes_of_codes(network):
    """Of codes, scales and zero points, packed."""
    return sum(
        pack_codes(entry.codes(original_of(layer, name)), entry.scheme).nbytes
        for layer in network.modules()
        for name, entry in computed(layer).items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scheme": "affine"}, {"per": "group:7"}, {"first_last_bits": 8}])
def test_mixed_precision_keeps_to_its_budget_and_grows_with_it(options):
    last, sizes = None, []
    network = build("resnet")
    number = sum(layer.weight.numel() for layer in layers_of(network))
    compress(network, inputs_for("resnet"), Quantize(**options))
    whole = bytes_of_codes(network)
    for share in (0.3, 0.35, 0.4, 0.5, 0.7, 1.0):
        budget = whole - round((1 - share) * number) + 100
        network = build("resnet")
        with torch.no_grad():
            network.stage1[0].conv1.weight[0, 0, 0, 0] = 3.0
        compress(network, inputs_for("resnet"), Quantize(bits=MixedPrecision(budget_bytes=budget), **options))
        sizes.append(bytes_of_codes(network))
        assert sizes[-1] <= budget
        bits = [describe_weights(layer)["weight"]["scheme"]["bits"] for layer in layers_of(network)]
        assert last is None or all(now >= before for now, before in zip(bits, last, strict=True))
        last = bits
    assert set(last) == {8}
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[4] < sizes[-1]


def test_mixed_precision_counts_the_scales_of_transposed_convolutions():
    """Their channels are the weight's second dimension: 256 scales here, not 4."""
    inputs = torch.randn(2, 4, 5, 5)
    for options in ({}, {"scheme": "affine"}):
        made = {"bits": MixedPrecision(budget_bytes=2604), **options}
        with pytest.raises(InputError, match=f"need {2304 + 256 * (5 if options else 4)}"):
            compress(nn.Sequential(nn.ConvTranspose2d(4, 256, 3)), inputs, Quantize(**made))
        for budget in (4000, 5500):
            network = nn.Sequential(nn.ConvTranspose2d(4, 256, 3))
            compress(network, inputs, Quantize(**{**made, "bits": MixedPrecision(budget_bytes=budget)}))
            assert bytes_of_codes(network) <= budget
            assert network[0].parametrizations.weight[0].scheme.axis == 1


def test_channels_of_a_grouped_transposed_convolution_have_scales_of_their_own():
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 3, 3)
    for bits in (None, MixedPrecision(ratio=0.6, choices=[8])):
        network = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2, groups=4, bias=False))
        with torch.no_grad():
            network[0].weight *= 10.0 ** -torch.arange(4.0).view(4, 1, 1, 1)
        before = network(inputs)
        compress(network, inputs, Quantize(bits=bits))
        errors = (network(inputs) - before).abs().amax((0, 2, 3)) / before.abs().amax((0, 2, 3))
        assert bool((errors < 0.01).all())


def test_errors_of_weights_are_those_of_their_axis():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3, 3) * torch.tensor([1, 2, 4, 8, 16, 32.0]).view(1, 6, 1, 1)
    found = {axis: weight_errors(weight, bits=[3], axis=axis, rule="minmax")[3] for axis in (0, 1)}
    rounded = torch.stack([
        (part / (part.abs().max() / 3)).round() * (part.abs().max() / 3) for part in weight.unbind(1)
    ], dim=1)  # fmt: skip
    assert found[1] == pytest.approx(float((rounded - weight).square().sum()), rel=1e-5)
    assert found[0] > 1.5 * found[1]


def test_mixed_precision_by_ratio_and_its_choices():
    network = build("lstm")
    total = 4 * sum(getattr(layer, name).numel() for layer in layers_of(network) for name in weight_names(layer))
    compress(network, inputs_for("lstm"), Quantize(bits=MixedPrecision(ratio=0.2, choices=[2, 4, 8])))
    assert 0.1 * total < bytes_of_codes(network) <= 0.2 * total
    bits = {told["scheme"]["bits"] for layer in layers_of(network) for told in describe_weights(layer).values()}
    assert bits <= {2, 4, 8}
    with pytest.raises(InputError, match="too small"):
        compress(build("lstm"), inputs_for("lstm"), Quantize(bits=MixedPrecision(budget_bytes=100)))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["symmetric", "affine", "pow2", "ternary", "ttq"])
def test_pruned_weights_stay_zero_while_it_trains(scheme, trained):
    network = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(0)
    kept = {f"{place}.weight": torch.rand(network[place].weight.shape, generator=generator) > 0.5 for place in (2, 4)}
    step = Quantize(weight_bits=8 if scheme in ("ternary", "ttq") else 4, scheme=scheme, finetune_epochs=3)
    compressor = Compressor(network, [step], torch.randn(2, 2), epochs=3)
    compressor.piece.prune(Masks(kept))
    train(network, compressor, epochs=3)
    compressor.finish()
    assert set(compressor.masks.kept) == {"2.parametrizations.weight.original", "4.parametrizations.weight.original"}
    for place in (2, 4):
        pruned = ~kept[f"{place}.weight"]
        assert not network[place].weight[pruned].any()
        assert not network[place].parametrizations.weight.original[pruned].any()
        assert network[place].weight[~pruned].any()


@pytest.mark.parametrize("scheme", ["binary", "binaryconnect", "dorefa"])
def test_schemes_without_zero_refuse_pruned_weights(scheme, trained):
    network = copy.deepcopy(trained)
    compressor = Compressor(network, [Quantize(scheme=scheme)], torch.randn(2, 2))
    compressor.piece.prune(Masks({"2.weight": torch.rand(32, 32) > 0.5}))
    with pytest.raises(InputError, match="'2.weight' is pruned, and .* has no zero"):
        compressor.apply()
    assert not is_computed(network)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_training_with_quantizers_beats_none_at_two_bits(estimator, trained):
    plain = copy.deepcopy(trained)
    compress(plain, torch.randn(2, 2), Quantize(weight_bits=2))
    network = copy.deepcopy(trained)
    step = Quantize(weight_bits=2, mode="qat", estimator=estimator, finetune_epochs=30)
    compressor = Compressor(network, [step], torch.randn(2, 2), epochs=30)
    compressor.begin_epoch(0, steps_per_epoch=4)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    train(network, compressor)
    compressor.finish()
    assert all(not torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert any(name.endswith("scale") for name in before) == (estimator == "lsq")
    assert accuracy(network) > accuracy(plain) + 0.2
    for layer in layers_of(network):
        assert all(len(row.unique()) <= 3 for row in layer.weight.detach())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["pact", "dorefa"])
def test_activations_by_pact_and_dorefa_train_and_have_few_values(estimator, trained):
    network = copy.deepcopy(trained)
    points, _ = task()
    step = Quantize(weight_bits=4, act_bits=3, estimator=estimator, targets=["2", "4"], mode="qat", finetune_epochs=20)
    compressor = Compressor(network, [step], points[:2], batches=[(points, None)], epochs=20)
    train(network, compressor, epochs=20)
    compressor.finish()
    seen = []
    network[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert accuracy(network) > 0.8
    values = seen[0].unique()
    assert 2 < len(values) <= 2**3
    top = float(network[2].input_quantizer.alpha) if estimator == "pact" else 1.0
    torch.testing.assert_close(values / top * 7, (values / top * 7).round(), atol=1e-4, rtol=0)


def test_binary_connect_clips_its_weights_while_it_trains(trained):
    network = copy.deepcopy(trained)
    with torch.no_grad():
        network[2].weight.mul_(20)
    step = Quantize(scheme="binaryconnect", targets="2", finetune_epochs=1)
    compressor = Compressor(network, [step], torch.randn(2, 2), epochs=1)
    train(network, compressor, epochs=1)
    assert network[2].parametrizations.weight.original.abs().max() == 1
    assert network[0].weight.abs().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 3, "estimator": "lsq", "act_bits": 4}, {"weight_bits": 4, "act_bits": 8, "observer": "ema"},
        {"scheme": "ttq"}, {"weight_bits": 4, "observer": "mse"},
    ],
)  # fmt: skip
def test_training_resumes_bit_for_bit(options, trained):
    def begun():
        network = copy.deepcopy(trained)
        points, _ = task()
        step = Quantize(mode="qat", finetune_epochs=6, **options)
        return network, Compressor(network, [step], points[:2], batches=[(points, None)], epochs=6)

    whole, compressor = begun()
    train(whole, compressor, epochs=6)
    network, compressor = begun()
    optimizer = train(network, compressor, epochs=3)
    saved = copy.deepcopy(
        (structure_of(network), network.state_dict(), compressor.state_dict(), optimizer.state_dict())
    )
    network, compressor = begun()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    rebuild_structure(network, saved[0])
    network.load_state_dict(saved[1])
    compressor.load_state_dict(saved[2])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    optimizer.load_state_dict(saved[3])
    train(network, compressor, begin=3, epochs=6, optimizer=optimizer)
    assert network.state_dict().keys() == whole.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.slow
def test_one_step_serves_two_networks():
    step = Quantize(weight_bits=3, bits=MixedPrecision(ratio=0.2), first_last_bits=8)
    networks = [build("resnet"), build("resnet")]
    for network in networks:
        compress(network, inputs_for("resnet"), step)
    assert torch.equal(outputs(networks[0], "resnet"), outputs(networks[1], "resnet"))


def test_equalising_and_correcting_biases_bring_the_network_closer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        factors = torch.logspace(-2, 1, 32)
        network[0].weight.mul_(factors[:, None])
        network[2].weight.div_(factors)
    inputs = torch.randn(64, 8)
    wanted = network(inputs).detach()
    errors = {}
    means = {}
    for name, options in (("plain", {}), ("equal", {"equalise": True}), ("biases", {"bias_correction": True})):
        other = copy.deepcopy(network)
        compress(other, inputs[:2], Quantize(weight_bits=3, per="tensor", **options), batches=[(inputs, None)])
        found = other(inputs).detach()
        errors[name] = relative(found, wanted)
        means[name] = float((found.mean(dim=0) - wanted.mean(dim=0)).abs().max())
    assert errors["equal"] < 0.7 * errors["plain"]
    assert means["biases"] < 1e-5 < means["plain"]


def test_what_does_nothing_leaves_the_network_bit_for_bit():
    network = build("resnet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    inputs = inputs_for("resnet")
    compressor = compress(network, inputs, Quantize(weight_bits=None), Encode(), batches=[(inputs, None)])
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert compressor.piece.coding == "deflate"


def test_statistics_and_random_numbers_stay():
    network, inputs = build("conv").train(), inputs_for("conv")
    before = {name: value.clone() for name, value in network.named_buffers()}
    state = torch.get_rng_state()
    compress(network, inputs, Quantize(act_bits=8, bias_correction=True), batches=[(inputs, None)])
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(module.training for module in network.modules())
    for name, value in before.items():
        assert torch.equal(network.get_buffer(name), value)


def test_inputs_are_quantized_where_layers_run_as_such():
    network = build("transformer")
    inputs = inputs_for("transformer")
    compress(network, inputs, Quantize(act_bits=8), batches=[(inputs, None)])
    with_inputs = {path for path, layer in network.named_modules() if describe_input(layer)}
    assert "encoder.layers.0.self_attn" in with_inputs
    assert "encoder.layers.0.self_attn.out_proj" not in with_inputs
    assert "embed" not in with_inputs
    assert "head" in with_inputs


def test_weights_that_are_shared_already_are_left_alone_or_refused():
    network = build("lstm")
    share_weights(network.head, k=4)
    piece = compress(network, inputs_for("lstm"), Quantize()).piece
    assert "Quantize left head.weight alone, whose values are shared or quantized already" in piece.notes
    assert len(network.head.weight.unique()) == 4
    network = build("lstm")
    share_weights(network.head, k=4)
    with pytest.raises(InputError, match="head.weight is shared or quantized already"):
        compress(network, inputs_for("lstm"), Quantize(targets=["lstm", "head"]))
    compress(network, inputs_for("lstm"), Quantize(targets="lstm"))
    with pytest.raises(InputError, match="lstm.weight_hh_l0 is shared or quantized already"):
        compress(network, inputs_for("lstm"), Quantize(targets="lstm"))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6, padding_idx=0)
        self.hidden = nn.Linear(6, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, tokens):
        return self.out(self.hidden(self.embed(tokens)).relu())


@pytest.mark.parametrize(
    "options",
    [
        *({"scheme": scheme} for scheme in ("symmetric", "affine", "pow2", "binary", "ternary", "ttq")),
        {"scheme": "binary", "per": "tensor"},
        {"scheme": "binaryconnect"},
        {"scheme": "binaryconnect", "first_last_bits": 8},
        {"scheme": "dorefa", "weight_bits": 4},
        {"scheme": "dorefa", "weight_bits": 4, "first_last_bits": 8},
    ],
)
def test_the_padding_of_an_embedding_stays_zero(options):
    torch.manual_seed(0)
    network, tokens = Padded(), torch.randint(0, 12, (3, 5))
    piece = compress(network, tokens, Quantize(**options)).piece
    assert not network.eval().embed.weight[0].any()
    scheme, at_ends = options["scheme"], "first_last_bits" in options
    without = scheme == "dorefa" or (scheme == "binaryconnect" and not at_ends) or options.get("per") == "tensor"
    assert parametrize.is_parametrized(network.embed) != without
    assert any("has no zero for the row of its padding: left as it is" in note for note in piece.notes) == without
    if without:
        with pytest.raises(InputError, match="'embed': scheme=.* has no zero for the row of its padding: exclude it"):
            compress(Padded(), tokens, Quantize(targets="*", **options))


@pytest.mark.slow
def test_the_report_says_what_was_not_equalised_or_rounded():
    network = build("resnet")
    piece = compress(network, inputs_for("resnet"), Quantize(equalise=True)).piece
    assert any("equalised 0 pairs" in note and "BatchNorm does not count" in note for note in piece.notes)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    inputs = torch.randn(3, 4, 4)
    before = network(inputs)
    piece = compress(network, inputs, Quantize(equalise=True)).piece
    assert "Quantize did not equalise 0 and 3, which would change the outputs" in piece.notes
    assert relative(network(inputs), before) < 0.02
    told = "inputs of attention's output projections are not rounded"
    for kind in ("transformer", "resnet"):
        inputs = inputs_for(kind)
        piece = compress(build(kind), inputs, Quantize(act_bits=8), batches=[(inputs, None)]).piece
        assert any(told in note for note in piece.notes) == (kind == "transformer")


def test_ties():
    tokens = inputs_for("tied")
    network = Tied()
    piece = compress(network, tokens, Quantize(weight_bits=3, first_last_bits=8)).piece
    assert torch.equal(network.out.weight, network.embed.weight)
    assert "Quantize symmetric 3 bit works on 100% of Tied's weights" in piece.notes
    for options in ({"targets": "out"}, {"exclude": "embed"}):
        with pytest.raises(InputError, match="tied to a weight that is left out"):
            compress(Tied(), tokens, Quantize(**options))
    for options in ({"scheme": "ttq"}, {"scheme": "dorefa"}):
        with pytest.raises(InputError, match="is a tied weight"):
            compress(Tied(), tokens, Quantize(**options))
    network = Tied()
    compress(network, tokens, Quantize(bits=MixedPrecision(ratio=0.3)))
    assert torch.equal(network.out.weight, network.embed.weight)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("seed", range(3))
def test_tied_affine_weights_are_rounded_once_in_the_file(bits, seed, tmp_path):
    """Affine min-max is not idempotent: what was rounded once more has other values."""
    torch.manual_seed(seed)
    network = Tied()
    compressor = compress(network, inputs_for("tied"), Quantize(weight_bits=bits, scheme="affine"))
    expected, weight = outputs(network, "tied"), network.embed.weight.detach().clone()
    network.train()
    baked = bake(copy_network(network))
    assert all(module.training for module in baked.modules())
    assert torch.equal(baked.embed.weight, weight)
    assert baked.out.weight is baked.embed.weight
    size = compressor.write(tmp_path / "tied.dlpk")
    assert torch.equal(outputs(load_compressed(tmp_path / "tied.dlpk", Tied()), "tied"), expected)
    # Codes, not floats: far from the 4 bytes of each of the float weights.
    assert size < 4 * sum(parameter.numel() for parameter in Tied().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "^Quantize: weight_bits must be 2 to 8, got 1: for 1 bit use scheme='binary'$"),
        ({"act_scheme": "symmetric"}, "act_scheme='symmetric' has no effect here: give act_bits"),
        ({"act_scheme": "affine"}, "has no effect here"),
        ({"scheme": "binary", "weight_bits": 4}, "has codes of 1 bit, not 4"),
        (
            {"scheme": "ttq", "per": "channel"},
            "^Quantize: scheme='ttq' has one scale for a whole tensor: leave per out$",
        ),
        ({"scheme": "int8"}, "scheme must be one of"),
        ({"act_bits": 9}, "^Quantize: act_bits must be 2 to 8, got 9$"),
        ({"observer": "ema"}, "is for activations, give act_bits"),
        ({"observer": "mse", "scheme": "binary"}, "has no effect here"),
        ({"observer": "mse", "estimator": "lsq"}, "has no effect here"),
        ({"observer": "median"}, "observer must be one of"),
        ({"estimator": "pact"}, "give act_bits"),
        ({"estimator": "lsq", "scheme": "affine"}, "learns symmetric weights"),
        ({"estimator": "pact", "act_bits": 4, "act_scheme": "symmetric"}, "give act_scheme='affine', not 'symmetric'"),
        ({"estimator": "lsq", "act_bits": 4, "act_scheme": "pow2"}, "give act_scheme='symmetric' or 'affine'"),
        ({"estimator": "adaround"}, "estimator must be"),
        ({"mode": "now"}, "mode must be"),
        ({"weight_bits": None, "scheme": "affine"}, "weight_bits=None leaves"),
        ({"scheme": "binary", "bits": {"head": 4}}, "leave bits out"),
        ({"scheme": "dorefa", "bits": MixedPrecision(ratio=0.2)}, "MixedPrecision is for scheme"),
        ({"bits": {"head": 12}}, "^Quantize: bits of 'head' must be 2 to 8, got 12$"),
        ({"first_last_bits": 16}, "^Quantize: first_last_bits must be 2 to 8, got 16$"),
        (
            {"act_scheme": "binary", "act_bits": 8},
            "^Quantize: act_scheme must be one of symmetric, affine, pow2, got 'binary'$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        Quantize(**options)
    assert "\n" not in str(caught.value)


def test_budgets_that_are_none():
    for options in ({}, {"ratio": 0.1, "budget_bytes": 3}):
        with pytest.raises(InputError, match="give either budget_bytes or ratio"):
            MixedPrecision(**options)
    for options in ({"ratio": 0.0}, {"budget_bytes": -1}):
        with pytest.raises(InputError, match="must be positive"):
            MixedPrecision(**options)
    with pytest.raises(InputError, match="from 2 to 8"):
        MixedPrecision(ratio=0.1, choices=[1, 4])


def test_errors_of_a_run():
    inputs = inputs_for("conv")
    for step, message in (
        (Quantize(mode="qat"), "give the Compressor epochs"),
        (Quantize(estimator="lsq"), "learns its scales"),
        (Quantize(act_bits=8), "needs calibration data"),
        (Quantize(bias_correction=True), "needs calibration data"),
        (Quantize(targets="nothing"), "matches none"),
        (Quantize(bits={"nothing": 4}), "matches none"),
        (Quantize(exclude=["3", "6"]), "name the layers"),
    ):
        with pytest.raises(InputError, match=message):
            compress(build("conv"), inputs, step)
    with pytest.raises(InputError, match="cannot come after"):
        Compressor(build("conv"), [Encode(), Quantize()], inputs)
    with pytest.raises(InputError, match="method must be"):
        Encode("zip")


def test_steps_are_read_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--steps", type=list[Step])
    config = parser.parse_object({"steps": [
        {"class_path": "distill_lightning.compression.Quantize", "init_args": {
            "weight_bits": 4, "bits": {"head": 8}, "at": "end", "targets": ["Conv2d", "head"]}},
        {"class_path": "distill_lightning.compression.Quantize", "init_args": {
            "act_bits": 8, "observer": "ema", "finetune_epochs": 2,
            "bits": {"class_path": "distill_lightning.compression.MixedPrecision", "init_args": {"ratio": 0.1}}}},
        {"class_path": "distill_lightning.compression.Encode", "init_args": {"method": "huffman"}},
    ]})  # fmt: skip
    first, second, third = parser.instantiate_classes(config).steps
    assert (first.bits, first.at, first.targets) == ({"head": 8}, "end", ["Conv2d", "head"])
    assert second.bits.ratio == pytest.approx(0.1)
    assert third.method == "huffman"
    assert [step.title for step in (first, second, third)] == [
        "Quantize symmetric mixed", "Quantize symmetric mixed inputs 8 bit", "Encode huffman",
    ]  # fmt: skip
    assert math.isclose(second.finetune_epochs, 2)


@pytest.mark.parametrize("bits", [4, "x", 2.5, [4]])
def test_bits_that_belong_to_no_layer_are_refused(bits):
    with pytest.raises(InputError, match="bits must be numbers by patterns of layers, or MixedPrecision, got"):
        Quantize(bits=bits)
