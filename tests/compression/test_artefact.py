"""Whole networks in packed files, and back, here and in a fresh process."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from distill_lightning import InputError, Pretrained, SmallResNet
from distill_lightning.compression import Compressor, Encode, Quantize, load_compressed, write_artefact
from distill_lightning.compression.access.computed import is_computed, original_of
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.factor.factoring import factorize, replace_layer
from distill_lightning.compression.file.format import read_parts, write_packed
from distill_lightning.compression.file.packed import pack_codes, unpack, unpack_codes
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.steps import HashShare, LowRank, PruneUnits, PruneWeights, ShareWeights
from distill_lightning.compression.structure.changes import (
    NOTHING,
    note_change,
    plain_copy,
    rebuild_structure,
    structure_of,
)
from distill_lightning.compression.values.codebook import share_weights
from distill_lightning.compression.values.estimators import codes as codes_of
from distill_lightning.compression.values.hashed import hash_weights
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme
from distill_lightning.networks import recipe_of


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


class TransformerClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(dim=1))


class Tied(nn.Module):
    """A weight in two layers, and a layer in two places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.first = nn.Linear(24, 24)
        self.second = self.first
        self.out = nn.Linear(24, 40, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.second(self.first(self.embed(tokens)).relu()))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.ConvTranspose2d(16, 8, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


BUILDERS = {
    "conv": conv_net, "lstm": LSTMClassifier, "transformer": TransformerClassifier,
    "resnet": lambda: SmallResNet(5, width=4),
}  # fmt: skip


def inputs_for(kind):
    generator = torch.Generator().manual_seed(7)
    if kind in ("lstm", "transformer", "tied"):
        return torch.randint(0, 20, (6, 9), generator=generator)
    return torch.randn(6, 1, 12, 12, generator=generator)


def build(kind):
    """A network whose weights and statistics are not those that it is built with."""
    torch.manual_seed(3)
    network = BUILDERS[kind]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        for _ in range(2):
            network(inputs_for(kind))
    return network


def layers_of(network):
    return [layer for layer in network.modules() if weight_names(layer)]


def outputs(network, kind):
    with torch.no_grad():
        return network.eval()(inputs_for(kind))


def assert_reloads(network, path, kind, coding="plain"):
    """Written and read, the network is plain, and has equal outputs, on both paths of the Transformer."""
    size = write_artefact(network, path, coding=coding)
    assert size == path.stat().st_size
    with_network = None if kind == "resnet" else BUILDERS[kind]()
    loaded = load_compressed(path, with_network)
    assert not loaded.training
    assert not is_computed(loaded)
    assert torch.equal(outputs(loaded, kind), outputs(network, kind))
    inputs = inputs_for(kind)
    assert torch.equal(loaded(inputs), network(inputs))
    return loaded


SCHEMES = {
    "8": {"weight_bits": 8}, "4 affine groups": {"weight_bits": 4, "scheme": "affine", "per": "group:5"},
    "3 pow2 mse": {"weight_bits": 3, "scheme": "pow2", "observer": "mse"},
    "2 tensor": {"weight_bits": 2, "per": "tensor", "observer": "kl"},
    "binary": {"scheme": "binary"}, "binaryconnect": {"scheme": "binaryconnect"}, "ternary": {"scheme": "ternary"},
    "ttq": {"scheme": "ttq"}, "dorefa": {"weight_bits": 3, "scheme": "dorefa"},
    "8 8": {"act_bits": 8, "observer": "percentile"}, "4 8 ema": {"weight_bits": 4, "act_bits": 8, "observer": "ema"},
    "inputs": {"weight_bits": None, "act_bits": 6},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_quantized_networks_reload_bit_for_bit(kind, scheme, tmp_path):
    network = build(kind)
    before = outputs(network, kind)
    inputs = inputs_for(kind)
    compressor = Compressor(network, [Quantize(**SCHEMES[scheme])], inputs, batches=[(inputs, None)], bn_batches=0)
    compressor.apply()
    assert not torch.equal(outputs(network, kind), before)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert_reloads(network, tmp_path / "a.dlpk", kind, ("plain", "deflate", "huffman")[len(scheme) % 3])
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_a_fresh_process_loads_files_from_nothing_but_their_path(tmp_path):
    told = {}
    for kind in BUILDERS:
        network = build(kind)
        inputs = inputs_for(kind)
        steps = [Quantize(weight_bits=4, act_bits=8), Encode("huffman")]
        compressor = Compressor(network, steps, inputs, batches=[(inputs, None)])
        compressor.apply()
        path = tmp_path / f"{kind}.dlpk"
        assert compressor.write(path) == path.stat().st_size
        told[kind] = outputs(network, kind).tolist()
    (tmp_path / "expected.json").write_text(json.dumps(told))
    script = (
        "import json, sys, torch; sys.path.insert(0, sys.argv[2]); import test_artefact as t\n"
        "from distill_lightning.compression import load_compressed\n"
        "torch.set_num_threads(1)\n"
        "for kind, wanted in json.load(open(sys.argv[1] + '/expected.json')).items():\n"
        "    path = f'{sys.argv[1]}/{kind}.dlpk'\n"
        "    network = load_compressed(path) if kind == 'resnet' else load_compressed(path, t.BUILDERS[kind]())\n"
        "    assert torch.equal(network(t.inputs_for(kind)), torch.tensor(wanted)), kind\n"
        "    print('equal', kind)\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    torch.set_num_threads(threads)
    assert done.stdout.split() == [word for kind in BUILDERS for word in ("equal", kind)], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_files_of_few_bits_have_the_size_of_their_codes(bits, tmp_path):
    """Within 3 % of weights * bits / 8, and what is known besides: scales, biases, and a little for each tensor."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 64))
    weights = 512 * 1024 * 2 + 512 * 64
    step = Quantize(scheme="binary") if bits == 1 else Quantize(weight_bits=bits)
    Compressor(network, [step], torch.randn(2, 512)).apply()
    size = write_artefact(network, tmp_path / "a.dlpk")
    channels = 1024 + 512 + 64
    assert size == pytest.approx(weights * bits / 8 + 4 * channels + 4 * channels, rel=0.03)
    assert size < weights * bits / 8 + 8 * channels + 6 * 200


def test_every_tensor_takes_its_smallest_form(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(7)))
    dense, codes, shared, hashed, half, few, sparse = network
    quantize_weights(codes, scheme=Scheme(8))
    share_weights(shared, k=16)
    hash_weights(hashed, ratio=1 / 8)
    with torch.no_grad():
        half.weight[torch.rand(64, 64) < 0.6] = 0
        few.weight.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 2.0])[torch.randint(0, 8, (64, 64))])
        sparse.weight[torch.rand(64, 64) < 0.99] = 0
    write_artefact(network, tmp_path / "a.dlpk")
    _, parts = read_parts(tmp_path / "a.dlpk")
    codecs = {name: packed.codec for name, packed in parts.items()}
    assert list(codecs.values()) == ["dense", "codes", "codebook", "hashed", "bitmask", "bitmask", "csr"]
    assert parts["5.weight"].options["values"]["codec"] == "codebook"
    ones = int((few.weight != 0).sum())
    assert parts["5.weight"].nbytes == 64 * 64 // 8 + -(-ones // 8) + 8
    assert parts["2.weight"].nbytes == 64 * 64 * 4 // 8 + 16 * 4
    assert parts["3.weight"].nbytes == 64 * 64 // 8 * 4
    loaded = load_compressed(tmp_path / "a.dlpk", nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(7))))
    for before, after in zip(network, loaded, strict=True):
        assert torch.equal(before.weight, after.weight)
    assert dense.weight.is_leaf


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["deflate", "huffman"])
def test_coding_makes_pruned_and_quantized_files_smaller(coding, tmp_path):
    torch.manual_seed(0)
    network = SmallResNet(5, width=16)
    paths = [name for name, value in network.named_parameters() if value.ndim > 1]
    masks = Masks({path: torch.rand(network.get_parameter(path).shape) > 0.97 for path in paths})
    inputs = inputs_for("resnet")
    compressor = Compressor(network, [Quantize(weight_bits=8), Encode(coding)], inputs)
    compressor.piece.prune(masks)
    compressor.apply()
    plain = write_artefact(network, tmp_path / "plain.dlpk")
    assert compressor.write(tmp_path / "coded.dlpk") < 0.75 * plain
    loaded = load_compressed(tmp_path / "coded.dlpk")
    assert torch.equal(outputs(loaded, "resnet"), outputs(network, "resnet"))
    for path, kept in masks.kept.items():
        assert not loaded.get_parameter(path)[~kept].any()


@pytest.mark.parametrize(
    "scheme", [Scheme(3), Scheme(8, "pow2", "group:7"), Scheme(2, "ternary"), Scheme(5, "affine", "tensor")]
)
def test_codes_of_pruned_weights_are_left_out(scheme, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(53, 31, bias=False))
    with torch.no_grad():
        network[0].weight[torch.rand(31, 53) < 0.85] = 0
    quantize_weights(network[0], scheme=scheme)
    codes = network[0].parametrizations.weight[0].codes(original_of(network[0], "weight"))
    packed = pack_codes(codes, scheme, sparse=True)
    assert torch.equal(unpack(packed), network[0].weight)
    assert torch.equal(unpack_codes(packed)[0].values, codes.values)
    number = int((network[0].weight != 0).sum())
    assert 0 < number < 0.2 * 31 * 53
    assert packed.nbytes == -(-31 * 53 // 8) + -(-number * scheme.bits // 8) + 4 * codes.scales.numel()
    if scheme.kind != "ternary":
        write_artefact(network, tmp_path / "a.dlpk")
        assert "mask" in read_parts(tmp_path / "a.dlpk")[1]["0.weight"].parts
    loaded = nn.Sequential(nn.Linear(53, 31, bias=False))
    write_artefact(network, tmp_path / "a.dlpk", coding="deflate")
    assert torch.equal(load_compressed(tmp_path / "a.dlpk", loaded)[0].weight, network[0].weight)


def test_codes_without_one_zero_are_not_sparse():
    weight = torch.randn(4, 9) + torch.arange(4)[:, None]
    for scheme in (Scheme(4, "affine"), Scheme(1, "binary")):
        with pytest.raises(InputError, match="different codes of zero"):
            pack_codes(codes_of(weight, scheme), scheme, sparse=True)


@pytest.mark.slow
def test_pruned_shared_and_coded(tmp_path):
    network = build("resnet")
    with torch.no_grad():
        for layer in layers_of(network):
            layer.weight[torch.rand(layer.weight.shape) < 0.8] = 0
    plain = write_artefact(network, tmp_path / "a.dlpk")
    for layer in layers_of(network):
        share_weights(layer, k=16, keep_zero=True)
    shared = write_artefact(network, tmp_path / "a.dlpk")
    coded = write_artefact(network, tmp_path / "a.dlpk", coding="huffman")
    assert coded < shared < plain
    assert_reloads(network, tmp_path / "a.dlpk", "resnet", "huffman")


def test_ties_are_stored_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    network = Tied()
    tokens = inputs_for("tied")
    size = write_artefact(network, tmp_path / "a.dlpk")
    header, parts = read_parts(tmp_path / "a.dlpk")
    assert header["same"] == {
        "second.weight": "first.weight", "second.bias": "first.bias", "out.weight": "embed.weight",
    }  # fmt: skip
    assert size < 4 * (40 * 24 + 24 * 24 + 24) + 900
    loaded = load_compressed(tmp_path / "a.dlpk", Tied())
    assert loaded.out.weight is loaded.embed.weight
    assert torch.equal(loaded(tokens), network.eval()(tokens))
    assert len(parts) == 3

    Compressor(network, [Quantize(weight_bits=4)], tokens).apply()
    write_artefact(network, tmp_path / "a.dlpk")
    assert len(read_parts(tmp_path / "a.dlpk")[1]) == 3
    loaded = load_compressed(tmp_path / "a.dlpk", Tied())
    assert loaded.out.weight is loaded.embed.weight
    assert torch.equal(loaded(tokens), network.eval()(tokens))


def test_ties_that_came_apart_are_refused(tmp_path):
    network = Tied()
    network.out.weight = nn.Parameter(network.out.weight + 1)
    write_artefact(network, tmp_path / "a.dlpk")
    with pytest.raises(InputError, match="'embed.weight' and 'out.weight', which are one tied weight"):
        load_compressed(tmp_path / "a.dlpk", Tied())
    network = Tied()
    quantize_weights(network.out, scheme=Scheme(2))
    with pytest.raises(InputError, match="'embed.weight' is tied to 'out.weight', and only that one is quantized"):
        write_artefact(network, tmp_path / "a.dlpk")


@pytest.mark.slow
def test_files_of_networks_with_another_structure_load(tmp_path):
    """Channels removed, then a layer factored, then quantized: one after the other, all in one file."""
    network = build("resnet")
    inputs = inputs_for("resnet")
    groups = channel_groups(network, inputs)
    shrink(network, {group: torch.arange(group.size // 2) for group in groups})
    note_change(network, "sizes")
    assert_reloads(network, tmp_path / "a.dlpk", "resnet")
    factored = factorize(network.stage3[0].conv2, rank=2).layer
    replace_layer(network, "stage3.0.conv2", factored)
    note_change(network, "low_rank", {"stage3.0.conv2": factored.description})
    before = assert_reloads(network, tmp_path / "a.dlpk", "resnet")
    Compressor(network, [Quantize(weight_bits=5, act_bits=6)], inputs, batches=[(inputs, None)]).apply()
    after = assert_reloads(network, tmp_path / "a.dlpk", "resnet", "deflate")
    assert not torch.equal(outputs(before, "resnet"), outputs(after, "resnet"))
    assert sum(value.numel() for value in after.parameters()) < 0.4 * sum(
        value.numel() for value in build("resnet").parameters()
    )


PIPELINES = {
    "shrunk, factored, quantized": ("resnet", lambda: [
        PruneUnits(amount=0.5, unit="channel"), LowRank(rank=4, targets="stage3"), Quantize(weight_bits=4),
        Encode("huffman"),
    ]),
    "pruned, shared": ("resnet", lambda: [PruneWeights(amount=0.8), ShareWeights(), Encode("huffman")]),
    "pruned, quantized": ("resnet", lambda: [PruneWeights(amount=0.8), Quantize(weight_bits=4), Encode()]),
    "hashed": ("resnet", lambda: [HashShare(ratio=8), Encode()]),
    "units": ("lstm", lambda: [PruneUnits(amount=0.5, unit="hidden_unit"), Quantize()]),
    "heads": ("transformer", lambda: [
        PruneUnits(amount=0.5, unit="head"), PruneUnits(amount=0.5, unit="neuron"), Quantize(act_bits=8),
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_several_steps_made_loads(pipeline, tmp_path):
    kind, steps = PIPELINES[pipeline]
    network, inputs = build(kind), inputs_for(kind)
    dense = write_artefact(network, tmp_path / "dense.dlpk")
    compressor = Compressor(network, steps(), inputs, batches=[(inputs, torch.zeros(6, dtype=torch.long))])
    compressor.apply()
    assert compressor.write(tmp_path / "a.dlpk") < 0.6 * dense
    loaded = load_compressed(tmp_path / "a.dlpk", None if kind == "resnet" else BUILDERS[kind]())
    assert torch.equal(outputs(loaded, kind), outputs(network, kind))


def test_numbers_keep_their_types(tmp_path):
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    network(torch.randn(5, 6, dtype=torch.float64))
    half = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).bfloat16()
    quantize_weights(half[0], scheme=Scheme(4))
    fresh_ones = (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    for net, fresh in zip((network, half), fresh_ones, strict=True):
        write_artefact(net, tmp_path / "a.dlpk")
        loaded = load_compressed(tmp_path / "a.dlpk", fresh)
        inputs = torch.randn(3, 6).to(net[0].bias.dtype)
        assert torch.equal(loaded(inputs), net.eval()(inputs))
    assert loaded[0].weight.dtype == torch.bfloat16


def test_a_pretrained_network_needs_its_file_no_more(tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(build("resnet").state_dict(), weights)
    network = Pretrained(SmallResNet(5, width=4), weights)
    write_artefact(network, tmp_path / "a.dlpk")
    weights.unlink()
    loaded = load_compressed(tmp_path / "a.dlpk")
    assert torch.equal(outputs(loaded, "resnet"), outputs(network, "resnet"))
    assert recipe_of(loaded)["factory"] == "SmallResNet"


def checkpoint_of(network, path, **changes):
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"student.{name}": value for name, value in network.state_dict().items()}
        | {"other.weight": torch.zeros(2)},
        "recipes": {"student": recipe_of(network)},
        "compression": {"attribute": "student", "structure": structure_of(network)},
    }
    torch.save({**content, **changes}, path)


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["quantized", "lsq", "shared", "hashed", "plain"])
def test_checkpoints_of_a_training_load_as_plain_networks(coding, tmp_path):
    network = build("resnet")
    for layer in layers_of(network):
        if coding in ("quantized", "lsq"):
            quantize_weights(layer, scheme=Scheme(3), estimator="lsq" if coding == "lsq" else "ste")
        elif coding == "shared":
            share_weights(layer, k=8)
        elif coding == "hashed":
            hash_weights(layer, ratio=0.2)
    checkpoint_of(network, tmp_path / "last.ckpt")
    loaded = load_compressed(tmp_path / "last.ckpt")
    assert not is_computed(loaded)
    assert torch.equal(outputs(loaded, "resnet"), outputs(network, "resnet"))
    checkpoint_of(network, tmp_path / "last.ckpt", recipes={"student": None})
    with pytest.raises(InputError, match="does not say how its network 'student' was built"):
        load_compressed(tmp_path / "last.ckpt")
    loaded = load_compressed(tmp_path / "last.ckpt", SmallResNet(5, width=4))
    assert torch.equal(outputs(loaded, "resnet"), outputs(network, "resnet"))


# oneDNN computes no projections, and says so.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("step", [Quantize(act_bits=8), ShareWeights(k=16), LowRank(rank=2)])
def test_projected_recurrent_layers_reload_bit_for_bit(step, tmp_path):
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.LSTM(7, 11, 2, proj_size=3, bidirectional=True)), torch.randn(5, 4, 7)
    Compressor(network, [step], inputs, batches=[(inputs, None)]).apply()
    write_artefact(network, tmp_path / "a.dlpk")
    fresh = nn.Sequential(nn.LSTM(7, 11, 2, proj_size=3, bidirectional=True))
    loaded = load_compressed(tmp_path / "a.dlpk", fresh)
    with torch.no_grad():
        assert torch.equal(loaded(inputs)[0], network.eval()(inputs)[0])


def test_numbers_that_are_none_come_back_too(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    network[1].weight = nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        network[0].weight[0, 0] = network[1].weight[0] = math.nan
    network[1].register_buffer("mask", torch.full((2, 2), -math.inf))
    write_artefact(network, tmp_path / "a.dlpk")
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    fresh[1].register_buffer("mask", torch.zeros(2, 2))
    loaded = load_compressed(tmp_path / "a.dlpk", fresh)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].nan_to_num(7), value.nan_to_num(7))


def test_files_that_cannot_be_used_say_why_in_one_line(tmp_path):
    network = build("conv")
    path = tmp_path / "a.dlpk"
    write_artefact(network, path)
    cases = {"does not say how its network Sequential was built": (path, None)}
    cases["there is no file"] = (tmp_path / "none", None)
    cases["another architecture"] = (path, nn.Sequential(nn.Linear(2, 2)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    cases["damaged or incomplete"] = (tmp_path / "flipped", conv_net())
    (tmp_path / "text").write_text("nothing")
    cases["cannot be read as weights|is refused"] = (tmp_path / "text", conv_net())
    write_packed(tmp_path / "tensors", {}, {})
    cases["holds packed tensors but no network"] = (tmp_path / "tensors", conv_net())
    write_packed(tmp_path / "foreign", {}, {"kind": "network"})
    cases["foreign is damaged"] = (tmp_path / "foreign", conv_net())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    cases["is not a checkpoint of a training"] = (tmp_path / "weights.pt", conv_net())
    resnet = build("resnet")
    checkpoint_of(resnet, tmp_path / "plain.ckpt", compression=None)
    cases["compressed nothing"] = (tmp_path / "plain.ckpt", None)
    checkpoint_of(resnet, tmp_path / "odd.ckpt", compression={"attribute": "student", "structure": {"format": 2}})
    cases["odd.ckpt is damaged"] = (tmp_path / "odd.ckpt", None)
    checkpoint_of(resnet, tmp_path / "old.ckpt", compression={"attribute": "student", "description": {}})
    cases["is in format 1, but this version .* reads format 2: compress the network again"] = (
        tmp_path / "old.ckpt",
        None,
    )
    for message, (file, given) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_compressed(file, given)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="coding must be"):
        write_artefact(network, path, coding="gzip")
    with pytest.raises(InputError, match="compressed already"):
        load_compressed(path, recipe_changed())


@pytest.mark.parametrize(
    "sizes", [{"depth": 10**7}, {"num_classes": 10**9}, {"width": 10**6}, {"in_channels": 10**9}], ids=str
)
def test_sizes_in_a_recipe_are_not_believed(tmp_path, sizes):
    recipe = {"factory": "SmallResNet", "arguments": {"num_classes": 10, "width": 4, **sizes}}
    told = {"kind": "network", "class": "SmallResNet", "recipe": recipe, "structure": NOTHING, "same": {}}
    write_packed(tmp_path / "tiny.dlpk", {}, told)
    checkpoint_of(SmallResNet(10, width=4), tmp_path / "tiny.ckpt", recipes={"student": recipe})
    for name in ("tiny.dlpk", "tiny.ckpt"):
        begin = time.monotonic()
        with pytest.raises(InputError, match=f"{name} describes a network of more than 268,435,456 bytes: ") as caught:
            load_compressed(tmp_path / name)
        assert str(caught.value).endswith("if it is to be trusted, give load_compressed a larger limit")
        assert time.monotonic() - begin < 20


def test_a_limit_of_a_networks_size_can_be_raised_and_lowered(tmp_path):
    write_artefact(build("resnet"), tmp_path / "a.dlpk")
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        load_compressed(tmp_path / "a.dlpk", limit=100_000)
    assert load_compressed(tmp_path / "a.dlpk", limit=2**23)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "low_rank", "layers": {"0": {"kind": "low_rank_linear", "rank": 10**10}}},
        {"kind": "sizes", "layers": {"0": {"kind": "linear", "in_features": 10**6, "out_features": 10**6}}},
    ],
    ids=["low rank", "sizes"],
)
def test_sizes_in_a_structure_are_not_believed(change):
    with pytest.raises(InputError) as caught:
        rebuild_structure(nn.Sequential(nn.Linear(6, 5)), {**NOTHING, "changes": [change]})
    message = "the structure of Sequential describes a network of more than 268,435,456 bytes: give a larger limit"
    assert str(caught.value) == message


def test_the_recipe_in_a_file_reads_no_other_file(tmp_path):
    network = SmallResNet(10, width=4)
    write_artefact(network, tmp_path / "a.dlpk")
    header, packed = read_parts(tmp_path / "a.dlpk")
    header["recipe"] = {"factory": "Pretrained", "arguments": {"network": header["recipe"], "checkpoint": "/dev/zero"}}
    write_packed(tmp_path / "b.dlpk", packed, header)
    assert recipe_of(load_compressed(tmp_path / "b.dlpk"))["factory"] == "SmallResNet"


def recipe_changed():
    network = conv_net()
    note_change(network, "sizes")
    return network


def test_writing_leaves_the_network_alone_even_where_a_copy_shares_its_classes(tmp_path):
    network = build("lstm").train()
    for layer in layers_of(network):
        quantize_weights(layer, scheme=Scheme(4))
    kinds = [type(module) for module in network.modules()]
    plain_copy(network)
    write_artefact(network, tmp_path / "a.dlpk")
    assert network.training
    assert [type(module) for module in network.modules()] == kinds
    assert is_computed(network)
    network(inputs_for("lstm")).sum().backward()
    assert network.head.parametrizations.weight.original.grad is not None
