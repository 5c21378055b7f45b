"""Weights that share values by a hash of their places, and the file that holds nothing but the values."""

import copy
import hashlib
import json
import math

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.access.computed import (
    bake_layer,
    computed,
    describe_weights,
    original_of,
    rebuild_weights,
)
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.file.format import read_packed, write_packed
from distill_lightning.compression.file.packed import Packed, Part, encode, pack_hashed, unpack
from distill_lightning.compression.values.codebook import share_weights
from distill_lightning.compression.values.hashed import Hashed, hash_places, hash_weights
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme

M64 = 2**64


def naive_scramble(number):
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = ((number ^ (number >> 33)) * factor) % M64
    return number ^ (number >> 33)


def naive_place(index, buckets, seed):
    """Bucket and sign of one weight, in Python's integers."""
    key = naive_scramble((seed + 1) * 0x9E3779B97F4A7C15 % M64)
    number = naive_scramble(naive_scramble(index * 0x9E3779B97F4A7C15 % M64) ^ key)
    return (number >> 1) % buckets, -1 if number % 2 else 1


def hashed(layer):
    """What hashes each weight, and the values."""
    return {name: (entry, original_of(layer, name).detach()) for name, entry in computed(layer).items()}


def naive_weight(values, shape, seed):
    places = [naive_place(index, len(values), seed) for index in range(math.prod(shape))]
    return torch.stack([sign * values[bucket] for bucket, sign in places]).reshape(shape)


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    raw = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*raw)


# The hash


@pytest.mark.parametrize(("buckets", "seed"), [(1, 0), (7, 0), (7, 1), (1000, 2**63 - 1)])
def test_places_are_those_of_the_naive_hash(buckets, seed):
    places = hash_places(300, buckets, seed).tolist()
    for index, place in enumerate(places):
        bucket, sign = naive_place(index, buckets, seed)
        assert place == bucket + (buckets if sign < 0 else 0)


def test_places_do_not_depend_on_how_many_there_are_nor_on_the_chunks():
    many = hash_places(2**20 + 50, 999, 5)
    assert torch.equal(many[:10], hash_places(10, 999, 5))
    for index in (2**20 - 1, 2**20, 2**20 + 49):
        bucket, sign = naive_place(index, 999, 5)
        assert many[index] == bucket + (999 if sign < 0 else 0)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_buckets_are_used_equally_and_signs_are_balanced(seed):
    count, buckets = 100_000, 500
    places = hash_places(count, buckets, seed).long()
    members = torch.bincount(places % buckets, minlength=buckets).double()
    # As many members as with a fair draw: chi-squared has mean buckets - 1 and variance twice that.
    chi = float(((members - count / buckets).square() / (count / buckets)).sum())
    assert abs(chi - (buckets - 1)) < 4 * math.sqrt(2 * (buckets - 1))
    assert members.min() > 130
    assert members.max() < 280
    signs = (places < buckets).double() * 2 - 1
    assert abs(float(signs.sum())) < 4 * math.sqrt(count)
    # Neither neighbours nor a weight's bucket tell its sign.
    assert abs(float((signs[1:] * signs[:-1]).sum())) < 4 * math.sqrt(count)
    own = torch.zeros(buckets, dtype=torch.double).index_add_(0, places % buckets, signs)
    assert abs(float((own.square() / members).sum()) - buckets) < 4 * math.sqrt(2 * buckets)
    # A weight below another in a matrix is as good as independent of it, too.
    rows = (places % buckets).reshape(-1, 100)
    assert abs(float((rows[1:] == rows[:-1]).double().mean()) - 1 / buckets) < 4 * math.sqrt(1 / buckets / count)


def test_two_seeds_are_independent():
    one, other = (hash_places(100_000, 100, seed) for seed in (0, 1))
    assert abs(float((one == other).double().mean()) - 1 / 200) < 4 * math.sqrt(1 / 200 / 100_000)


def digest_of_places():
    return hashlib.sha256(hash_places(5000, 77, 3).numpy().astype("<i4").tobytes()).hexdigest()


@pytest.mark.slow
def test_another_process_hashes_alike(elsewhere):
    here = digest_of_places()
    assert elsewhere(digest_of_places) == here
    # Files that were written must stay readable: this number never changes.
    assert here == "f289c320642b84924c13016ceaa7ca27cc197986cdb44711a3e400d96f6463bf"


# Layers


def layers():
    torch.manual_seed(1)
    return {
        "linear": (nn.Linear(7, 15), torch.randn(3, 7)),
        "conv": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        "transposed": (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
        "lstm": (nn.LSTM(8, 6, num_layers=2, bidirectional=True), torch.randn(5, 2, 8)),
        "gru": (nn.GRU(8, 6), torch.randn(5, 2, 8)),
        "embedding": (nn.Embedding(11, 8), torch.randint(0, 11, (4, 3))),
        "attention": (nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)),
    }


def run(layer, given):
    result = layer(given, given, given) if isinstance(layer, nn.MultiheadAttention) else layer(given)
    return result[0] if isinstance(result, tuple) else result


every_layer = pytest.mark.parametrize("kind", list(layers()))


@pytest.mark.slow
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_is_its_naive_one_and_trains(kind, dtype):
    layer, given = layers()[kind]
    layer = layer.to(dtype)
    given = given.to(dtype) if given.is_floating_point() else given
    names, shapes = weight_names(layer), {n: getattr(layer, n).shape for n in weight_names(layer)}
    plain = copy.deepcopy(layer)
    assert hash_weights(layer, ratio=0.25, seed=9) == names
    before = {name: values.clone() for name, (_, values) in hashed(layer).items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        run(layer, given).square().sum().backward()
        optimizer.step()
    assert list(hashed(layer)) == names
    for name, (entry, values) in hashed(layer).items():
        assert values.shape == (max(1, round(0.25 * shapes[name].numel())),)
        assert values.dtype == dtype
        assert not torch.equal(values, before[name])
        weight = getattr(layer, name)
        assert same_bits(weight, naive_weight(values, shapes[name], 9))
        assert len(weight.abs().unique()) <= len(values)
        packed = pack_hashed(values, shapes[name], entry.seed)
        assert packed.nbytes == len(values) * dtype.itemsize
        assert same_bits(unpack(packed), weight)

    # Baked it is an ordinary layer, of the same outputs.
    output = run(layer, given)
    assert bake_layer(layer) == names
    assert hashed(layer) == {}
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(run(plain, given), output)


@every_layer
@torch.no_grad()  # after a forward pass with gradients PyTorch cannot copy an RNN with any parametrization
def test_a_description_and_the_values_make_the_layer_again(kind):
    layer, given = layers()[kind]
    fresh = copy.deepcopy(layer)
    names = hash_weights(layer, ratio=0.2, seed=3)
    state = layer.state_dict()
    stored = {name: value for name, value in state.items() if name.startswith("parametrizations")}
    assert sorted(stored) == sorted(f"parametrizations.{name}.original" for name in names)
    description = json.loads(json.dumps(describe_weights(layer)))
    for parameter in fresh.parameters():
        parameter.zero_()
    rebuilt = rebuild_weights(fresh, description)
    rebuilt.load_state_dict(state, strict=True)
    for name in names:
        assert same_bits(getattr(rebuilt, name), getattr(layer, name))
    assert torch.equal(run(rebuilt, given), run(layer, given))
    copied = copy.deepcopy(layer)
    assert torch.equal(run(copied, given), run(layer, given))
    assert describe_weights(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_value_is_the_signed_sum_over_its_members(dtype):
    layer = nn.Linear(20, 10).to(dtype)
    hash_weights(layer, ratio=0.1, seed=4)
    # Small integers, whose sums are exact in any order.
    upstream = torch.randint(-9, 9, (10, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    (layer.weight * upstream).sum().backward()
    expected = [0.0] * 20
    for index, gradient in enumerate(upstream.flatten().tolist()):
        bucket, sign = naive_place(index, 20, 4)
        expected[bucket] += sign * gradient
    assert layer.parametrizations.weight.original.grad.tolist() == expected


def test_the_gradient_is_that_of_finite_differences():
    entry = Hashed((3, 4, 2), values=7, seed=1)
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entry, values)


def test_values_are_the_least_squares_of_a_naive_loop():
    layer = nn.Conv1d(6, 8, 5).double()
    weight = layer.weight.detach().clone()
    hash_weights(layer, ratio=0.1, seed=2)
    values = hashed(layer)["weight"][1]
    members = [[] for _ in range(24)]
    for index, entry in enumerate(weight.flatten().tolist()):
        bucket, sign = naive_place(index, 24, 2)
        members[bucket].append(sign * entry)
    for own, value in zip(members, values.tolist(), strict=True):
        assert value == pytest.approx(sum(own) / len(own) if own else 0.0, abs=1e-15)
    # No other values come nearer: least squares by the normal equations of a dense design matrix.
    design = torch.zeros(240, 24, dtype=torch.float64)
    for index in range(240):
        bucket, sign = naive_place(index, 24, 2)
        design[index, bucket] = sign
    best = torch.linalg.lstsq(design, weight.flatten()[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(values, best, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hashing_a_hashed_weight_again_changes_no_bit(dtype):
    layer = nn.Linear(33, 9).to(dtype)
    hash_weights(layer, ratio=0.07, seed=8)
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight = weight
    assert same_bits(layer.weight, weight)
    bake_layer(layer)
    hash_weights(layer, ratio=0.07, seed=8)
    assert same_bits(layer.weight, weight)
    assert layer.parametrizations.weight.original.dtype == dtype


def test_buckets_without_members_are_zero_and_one_value_is_enough():
    layer = nn.Linear(4, 2)
    hash_weights(layer, ratio=1.0)
    values = hashed(layer)["weight"][1]
    used = {naive_place(index, 8, 0)[0] for index in range(8)}
    assert len(used) < 8
    assert {place for place, value in enumerate(values.tolist()) if value} == used
    tiny = nn.Linear(3, 2)
    hash_weights(tiny, ratio=0.01)
    assert len(tiny.weight.abs().unique()) == 1


def test_gradients_of_another_shape_do_not_stay():
    layer, given = nn.Linear(6, 5), torch.randn(3, 6)
    for change in (lambda: None, lambda: hash_weights(layer, ratio=0.2), lambda: bake_layer(layer)):
        change()
        assert layer.bias.grad is None or layer.bias.grad.shape == (5,)
        for _ in range(2):
            layer(given).sum().backward()
    assert layer.weight.grad.shape == (5, 6)
    assert isinstance(layer.weight, nn.Parameter)


def test_a_layer_with_the_same_weight_keeps_it():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    weight = head.weight.detach().clone()
    hash_weights(embedding, ratio=0.1)
    assert torch.equal(head.weight, weight)
    assert embedding.parametrizations.weight.original is not head.weight
    frozen = nn.Linear(4, 4).requires_grad_(False)
    hash_weights(frozen, ratio=0.5)
    assert not frozen.parametrizations.weight.original.requires_grad


def test_types_and_devices_are_kept():
    layer = nn.Linear(8, 4)
    hash_weights(layer, ratio=0.5)
    layer.double()
    assert layer.weight.dtype == torch.float64
    assert hashed(layer)["weight"][0].places.dtype == torch.int32
    layer.to("meta")
    assert layer.weight.device.type == "meta"


def test_some_weights_only():
    layer = nn.LSTM(8, 6)
    assert hash_weights(layer, ratio=0.5, names=["weight_hh_l0"]) == ["weight_hh_l0"]
    assert list(hashed(layer)) == ["weight_hh_l0"]
    assert "weight_ih_l0" in dict(layer.named_parameters())


def test_what_cannot_be_hashed_is_one_line_and_changes_nothing():
    layer = nn.Linear(30, 30)
    for ratio in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="ratio"):
            hash_weights(layer, ratio=ratio)
    for seed in (-1, 2**63):
        with pytest.raises(InputError, match="seed"):
            hash_weights(layer, ratio=0.5, seed=seed)
    assert hashed(layer) == {}
    hash_weights(layer, ratio=0.5)
    for action, words in (
        (lambda: hash_weights(layer, ratio=0.5), "already"),
        (lambda: share_weights(layer, k=4), "already"),
        (lambda: quantize_weights(layer, scheme=Scheme()), "already"),
        (lambda: hash_weights(nn.ReLU(), ratio=0.5), "has the weights"),
        (lambda: hash_weights(nn.Linear(2, 2), ratio=0.5, names=["bias"]), "cannot hash"),
        (lambda: rebuild_weights(nn.ReLU(), describe_weights(layer)), "right layer"),
        (lambda: pack_hashed(torch.zeros(2, 2), (4, 4), 0), "one dimension"),
        (lambda: pack_hashed(torch.zeros(0), (4, 4), 0), "values"),
        (lambda: pack_hashed(torch.zeros(3), (4, 4), -1), "seed"),
    ):
        with pytest.raises(InputError, match=words):
            action()


# Packed


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (4, 3, 3, 3), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_weights_come_back_bit_for_bit(tmp_path, shape, dtype):
    values = torch.randn(5, dtype=torch.float64).to(dtype)
    packed = pack_hashed(values, shape, 11)
    assert packed.codec == "hashed"
    assert packed.nbytes == 5 * dtype.itemsize
    wanted = naive_weight(values, shape, 11) if math.prod(shape) else values.new_zeros(shape)
    assert same_bits(unpack(packed), wanted)
    write_packed(tmp_path / "file", {"weight": packed, "coded": encode(packed, "deflate")}, {})
    _, tensors = read_packed(tmp_path / "file")
    assert all(same_bits(tensor, wanted) for tensor in tensors.values())
    assert tensors["weight"].untyped_storage().nbytes() == wanted.numel() * dtype.itemsize


def digest_of_file(path):
    return hashlib.sha256(read_packed(path)[1]["weight"].numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_the_file_holds_the_values_and_another_process_reads_it(tmp_path, elsewhere):
    layer = nn.Linear(512, 256, bias=False)
    hash_weights(layer, ratio=1 / 32, seed=5)
    entry, values = hashed(layer)["weight"]
    packed = pack_hashed(values, entry.shape, entry.seed)
    size = write_packed(tmp_path / "file", {"weight": packed}, {})
    assert packed.nbytes == 4 * 4096
    assert size < 4 * 4096 + 200
    assert len(values) / layer.weight.numel() == 1 / 32
    told = elsewhere(digest_of_file, tmp_path / "file")
    assert told == hashlib.sha256(layer.weight.detach().numpy().tobytes()).hexdigest()


def test_damaged_parts_are_one_line():
    packed = pack_hashed(torch.randn(6), (4, 4), 0)
    part = packed.parts["values"]
    for wrong in (Part(part.content[:-4], 6, 32), Part(b"", 0, 32)):
        with pytest.raises(InputError):
            unpack(Packed("hashed", (4, 4), "float32", {"seed": 0}, {"values": wrong}))
