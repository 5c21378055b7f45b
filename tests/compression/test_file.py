"""Packed bits, coded bytes, codebooks, packed tensors, and the file of them."""

import copy
import itertools
import json
import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
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
from distill_lightning.compression.file import format as file_format
from distill_lightning.compression.file.bits import pack_bits, unpack_bits
from distill_lightning.compression.file.format import read_packed, read_parts, write_packed
from distill_lightning.compression.file.packed import (
    Packed,
    Part,
    encode,
    pack_bitmask,
    pack_codebook,
    pack_codes,
    pack_csr,
    pack_dense,
    pack_shared,
    unpack,
    unpack_codes,
)
from distill_lightning.compression.values.codebook import kmeans, share_weights
from distill_lightning.compression.values.estimators import codes as codes_of
from distill_lightning.compression.values.estimators import ttq, ttq_codes
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme, dequantize


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    return (
        one.detach()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(other.detach().contiguous().view(-1).view(torch.uint8))
    )


def owns_its_memory(tensor):
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# Bits


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("number", [0, 1, 3, 7, 8, 9, 1000, 1001])
def test_packed_bits_are_those_of_one_big_integer(bits, number):
    values = np.random.default_rng(number).integers(0, 2**bits, number)
    content = pack_bits(values, bits)
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    assert content == whole.to_bytes(math.ceil(number * bits / 8), "little")
    assert unpack_bits(content, bits, number).tolist() == values.tolist()


def test_bits_that_do_not_fit_are_one_line():
    assert pack_bits(np.zeros(5, int), 0) == b""
    assert unpack_bits(b"", 0, 5).tolist() == [0] * 5
    for values, bits in (([4], 2), ([-1], 3), ([256], 8), ([1], 0)):
        with pytest.raises(InputError, match="do not fit"):
            pack_bits(np.array(values), bits)
    with pytest.raises(InputError, match="0 to 8"):
        pack_bits(np.zeros(3, int), 9)
    with pytest.raises(InputError, match="are 2 bytes, got 3"):
        unpack_bits(b"abc", 3, 5)


# Huffman codes


def entropy(symbols):
    counts = Counter(symbols.tolist()).values()
    return -sum(count / len(symbols) * math.log2(count / len(symbols)) for count in counts)


def naive_bits(counts):
    """Of an optimal code: the sum of all merged counts, with a list sorted again and again."""
    left, total = sorted(counts), 0
    if len(left) == 1:
        return left[0]
    while len(left) > 1:
        merged = left[0] + left[1]
        total += merged
        left = sorted([merged, *left[2:]])
    return total


def streams():
    random = np.random.default_rng(0)
    return {
        "one": np.zeros(1, np.uint8),
        "same": np.full(3000, 7, np.uint8),
        "two": random.integers(0, 2, 1024).astype(np.uint8),
        "uniform": random.integers(0, 256, 5000).astype(np.uint8),
        "skewed": np.minimum(random.geometric(0.5, 20_000) - 1, 255).astype(np.uint8),
        "mostly zero": (random.random(10_001) < 0.03).astype(np.uint8) * 200,
        # Counts like Fibonacci's numbers give the longest code words.
        "fibonacci": np.repeat(np.arange(22), np.round(1.618 ** np.arange(22)).astype(int)).astype(np.uint8),
    }


@pytest.mark.parametrize("name", list(streams()))
def test_huffman_codes_come_back_and_are_nearly_the_best(name):
    symbols = torch.from_numpy(streams()[name])
    coded = encode(pack_dense(symbols), "huffman")
    assert same_bits(unpack(coded), symbols)
    counts = np.bincount(symbols)
    best = naive_bits(counts[counts > 0].tolist())
    assert entropy(symbols.numpy()) * len(symbols) - 1e-9 <= best <= (entropy(symbols.numpy()) + 1) * len(symbols)
    # A table of lengths for every 32,768 symbols; what does not become smaller is not coded.
    tables = 200 * math.ceil(len(symbols) / 2**15)
    assert coded.nbytes <= min(len(symbols), best / 8 + tables)
    assert (coded.parts["values"].coding == "huffman") == (name not in ("one", "uniform"))


# k-means


def objective(values, centroids):
    return sum(min((v - c) ** 2 for c in centroids) for v in values)


@pytest.mark.parametrize("init", ["linear", "density", "random", "kmeans++"])
@pytest.mark.parametrize("k", [2, 5, 16])
def test_kmeans_has_k_values_falls_and_beats_uniform_levels(init, k):
    values = draw(40, 10, dtype=torch.float64)
    found = kmeans(values, k, init=init)
    flat, centroids = values.flatten().tolist(), found.centroids.tolist()
    assert len(centroids) == len(found.indices.unique()) == k
    assert centroids == sorted(centroids)
    assert found.indices.shape == values.shape
    assert all(later <= before + 1e-9 for before, later in itertools.pairwise(found.objectives))
    reached = (found.centroids[found.indices] - values).square().sum().item()
    assert reached == pytest.approx(objective(flat, centroids), rel=1e-9)
    assert reached == pytest.approx(found.objectives[-1], rel=1e-9)
    uniform = np.linspace(min(flat), max(flat), k)
    assert reached <= objective(flat, uniform)
    if init == "linear":
        assert found.objectives[0] < objective(flat, uniform)
    for place, centroid in enumerate(centroids):
        assert centroid == pytest.approx(values[found.indices == place].mean().item(), rel=1e-6)


def test_kmeans_finds_the_best_clusters_of_a_few_values():
    values = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0, 9.2, 9.3])
    found = kmeans(values, 3)
    splits = itertools.combinations(range(1, 8), 2)
    best = min(
        sum(
            (part - part.mean()).square().sum().item()
            for part in (values[:first], values[first:second], values[second:])
        )
        for first, second in splits
    )
    assert found.objectives[-1] == pytest.approx(best, rel=1e-5)


def test_kmeans_gives_a_lost_cluster_another_place_and_knows_when_there_are_fewer_values():
    values = torch.cat([torch.linspace(0, 1, 50), torch.tensor([100.0])])
    found = kmeans(values, 8)
    assert len(found.centroids) == len(found.indices.unique()) == 8
    few = kmeans(torch.tensor([1.0, 2.0, 2.0, -3.0]), 16)
    assert few.centroids.tolist() == [-3, 1, 2]
    assert few.indices.tolist() == [1, 2, 2, 0]
    assert kmeans(torch.ones(4), 1).centroids.tolist() == [1]
    assert kmeans(draw(100), 1).centroids.item() == pytest.approx(draw(100).mean().item(), abs=1e-6)


def test_kmeans_is_scikit_learns_from_the_same_start():
    values = draw(5_000)
    start = np.linspace(values.min().item(), values.max().item(), 128)[:, None]
    reference = KMeans(128, init=start, n_init=1, max_iter=100, tol=0).fit(values.double().numpy()[:, None])
    found = kmeans(values, 128)
    # Most of these clusters are empty at first, and find other places.
    assert found.objectives[-1] == pytest.approx(reference.inertia_, rel=1e-6)
    assert np.allclose(found.centroids, np.sort(reference.cluster_centers_[:, 0]), rtol=1e-4)


@pytest.mark.slow
def test_kmeans_plus_plus_draws_by_squared_distances_and_leaves_smaller_ones():
    values = torch.tensor([0.0, 0.0, 0.0, 1.0, 10.0])
    starts = [kmeans(values, 2, init="kmeans++", iterations=0, seed=seed).centroids.tolist() for seed in range(200)]
    # The first is any of the values; the other one is drawn by squared distances and how often there is such a value.
    chances = {(0.0, 10.0): 3 / 5 * 100 / 101 + 1 / 5 * 300 / 381, (0.0, 1.0): 3 / 5 / 101 + 1 / 5 * 3 / 84}
    for pair, chance in chances.items():
        assert starts.count(list(pair)) / 200 == pytest.approx(chance, abs=0.08)
    weights = draw(5_000)
    apart = kmeans(weights, 64, init="kmeans++").objectives[-1]
    assert all(1.15 * apart < kmeans(weights, 64, init=init).objectives[-1] for init in ("linear", "density"))
    reference = KMeans(64, init="k-means++", n_init=1, random_state=0).fit(weights.double().numpy()[:, None])
    assert apart < 1.15 * reference.inertia_


def test_zero_stays_the_value_of_exactly_the_pruned_weights():
    weight = draw(30, 30)
    pruned = weight.abs() < 0.8
    weight[pruned] = 0
    for init, k in itertools.product(("linear", "density", "random", "kmeans++"), (2, 4, 16)):
        found = kmeans(weight, k, init=init, keep_zero=True)
        assert len(found.centroids) == k
        assert torch.equal(found.centroids[found.indices] == 0, pruned)
        assert (found.centroids == 0).sum() == 1
    assert kmeans(torch.zeros(5), 4, keep_zero=True).centroids.tolist() == [0]
    assert len(kmeans(draw(50), 4, keep_zero=True).centroids) == 4, "there is no zero to keep"


def test_what_cannot_be_clustered_is_one_line():
    for values, k, words in (
        (torch.empty(0), 2, "cannot be clustered"), (torch.tensor([math.nan]), 2, "cannot be clustered"),
        (torch.ones(3), 0, "too small"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            kmeans(values, k)
    with pytest.raises(InputError, match="at least 2"):
        kmeans(torch.tensor([0.0, 1.0]), 1, keep_zero=True)
    with pytest.raises(InputError, match="init must be"):
        kmeans(draw(30), 3, init="best")


# Codebooks of layers


def layers():
    torch.manual_seed(1)
    return {
        "linear": (nn.Linear(7, 15), torch.randn(3, 7)),
        "conv": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        "lstm": (nn.LSTM(8, 6), torch.randn(5, 2, 8)),
        "attention": (nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)),
    }


def codebooks(layer):
    """The codebook and the values of each weight."""
    return {name: (book, book.values(original_of(layer, name).detach())) for name, book in computed(layer).items()}


def run(layer, given):
    result = layer(given, given, given) if isinstance(layer, nn.MultiheadAttention) else layer(given)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("kind", list(layers()))
@pytest.mark.parametrize("pruned", [False, True])
def test_shared_layers_train_their_values_and_keep_their_zeros(kind, pruned):
    layer, given = layers()[kind]
    names = weight_names(layer)
    if pruned:
        with torch.no_grad():
            for name in names:
                weight = getattr(layer, name)
                weight[weight.abs() < weight.abs().median()] = 0
    zeros = {name: getattr(layer, name) == 0 for name in names}
    fresh = copy.deepcopy(layer)
    assert share_weights(layer, k=6, keep_zero=pruned) == names
    indices = {name: book.indices.clone() for name, (book, _) in codebooks(layer).items()}
    assert all(layer.parametrizations[name].original.shape == (6,) for name in names)

    before = {name: getattr(layer, name).detach().clone() for name in names}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        run(layer, given).square().sum().backward()
        optimizer.step()
    for name in names:
        weight = getattr(layer, name)
        assert len(weight.unique()) == 6
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight == 0, zeros[name])
        assert torch.equal(codebooks(layer)[name][0].indices, indices[name])
        book, values = codebooks(layer)[name]
        assert same_bits(unpack(pack_codebook(book.indices, values)), weight)

    description = json.loads(json.dumps(describe_weights(layer)))
    rebuilt = rebuild_weights(copy.deepcopy(fresh), description)
    rebuilt.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(run(rebuilt, given), run(layer, given))
    assert describe_weights(fresh) == {}

    output = run(layer, given)
    assert bake_layer(layer) == names
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(run(fresh, given), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_value_is_the_sum_over_its_members(dtype):
    layer = nn.Linear(20, 10).to(dtype)
    share_weights(layer, k=4)
    # Small integers, whose sums are exact in any order.
    upstream = torch.randint(-9, 9, (10, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    (layer.weight * upstream).sum().backward()
    indices = codebooks(layer)["weight"][0].indices
    expected = [sum(upstream[indices == value].tolist()) for value in range(4)]
    assert layer.parametrizations.weight.original.grad.tolist() == expected


def test_sharing_changes_a_weight_to_its_clusters_bit_for_bit():
    layer = nn.Linear(33, 9)
    found = kmeans(layer.weight, 7, init="density")
    share_weights(layer, k=7, init="density")
    assert same_bits(layer.weight, found.centroids[found.indices])
    with torch.no_grad():
        layer.weight = layer.weight + 1
    assert torch.allclose(layer.weight, found.centroids[found.indices] + 1)


def test_a_layer_that_cannot_be_shared_is_one_line():
    layer = nn.Linear(30, 30)
    with pytest.raises(InputError, match="1 to 256"):
        share_weights(layer, k=300)
    share_weights(layer, k=4)
    for action, words in (
        (lambda: share_weights(layer, k=4), "already"),
        (lambda: quantize_weights(layer, scheme=Scheme()), "already"),
        (lambda: share_weights(nn.ReLU(), k=4), "has the weights"),
        (lambda: share_weights(nn.Linear(2, 2), k=2, names=["bias"]), "cannot share"),
        (lambda: rebuild_weights(nn.ReLU(), describe_weights(layer)), "right layer"),
    ):
        with pytest.raises(InputError, match=words):
            action()


# Packed tensors


SHAPES = [(), (0,), (1,), (7,), (5, 3), (4, 3, 3, 3), (0, 4), (3, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pack", [pack_dense, pack_bitmask, pack_csr, pack_shared])
def test_packed_tensors_come_back_bit_for_bit_and_own_their_memory(shape, pack):
    weight = draw(*shape).round(decimals=1)
    if weight.ndim:
        weight[weight.abs() < 0.5] = 0
    for coding in (None, "deflate", "huffman"):
        packed = pack(weight + 0.0)
        packed = encode(packed, coding) if coding else packed
        again = unpack(packed)
        assert same_bits(again, weight + 0.0)
        assert owns_its_memory(again)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64,
    ],
)  # fmt: skip
def test_every_type_is_stored(dtype):
    tensor = (3 * draw(4, 5)).to(dtype)
    assert same_bits(unpack(pack_dense(tensor)), tensor)
    assert same_bits(unpack(pack_dense(tensor.t()[1:3])), tensor.t()[1:3])
    assert pack_dense(tensor[1:2]).nbytes == 5 * tensor.element_size()


def test_a_codebook_has_the_bytes_that_it_must_have():
    for number, k in itertools.product((1000, 1003), (1, 2, 3, 4, 5, 16, 17, 256)):
        indices = torch.arange(number) % k
        packed = pack_codebook(indices, draw(k))
        assert packed.nbytes == math.ceil(number * math.ceil(math.log2(k)) / 8) + 4 * k
        assert same_bits(unpack(packed), draw(k)[indices])
    with pytest.raises(InputError, match="at most 256"):
        pack_shared(draw(300))


def test_sparse_tensors_have_the_bytes_that_they_must_have():
    weight = draw(40, 100)
    weight[weight.abs() < 1.6] = 0
    number = int((weight != 0).sum())
    assert pack_bitmask(weight).nbytes == 500 + 4 * number
    assert pack_csr(weight).nbytes == 41 * 2 + number + 4 * number
    wide = torch.zeros(2, 70_000)
    wide[1, 69_999] = 3
    assert pack_csr(wide).nbytes == 3 + 4 + 4
    assert same_bits(unpack(pack_csr(wide)), wide)
    full = torch.ones(2, 256)
    assert pack_csr(full).nbytes == 3 * 2 + 512 * 2 + 512 * 4


def test_the_values_of_a_sparse_tensor_can_be_packed_themselves():
    weight = draw(40, 100)
    weight[weight.abs() < 1] = 0
    clusters = kmeans(weight, 16, keep_zero=True)
    shared = clusters.centroids[clusters.indices]
    rest = shared[shared != 0]
    for pack, coding in itertools.product((pack_bitmask, pack_csr), ("deflate", "huffman")):
        packed = encode(pack(shared, pack_shared(rest)), coding)
        assert same_bits(unpack(packed), shared)
        assert packed.nbytes < pack_bitmask(shared).nbytes / 2
    scheme = Scheme(4, "symmetric", "tensor")
    codes = codes_of(weight[weight != 0], scheme)
    packed = pack_csr(weight, pack_codes(codes, scheme))
    expected = torch.zeros_like(weight)
    expected[weight != 0] = dequantize(codes, scheme)
    assert same_bits(unpack(packed), expected)
    with pytest.raises(InputError, match="are not zero"):
        pack_bitmask(weight, pack_dense(torch.ones(3)))


QUANTIZED = [
    Scheme(8), Scheme(4, "affine"), Scheme(3, "affine", "group:7"), Scheme(2), Scheme(7, "pow2", "tensor"),
    Scheme(5, "symmetric", "channel", 1), Scheme(3, "dorefa", "tensor"), Scheme(1, "binary"),
    Scheme(1, "binaryconnect", "tensor"), Scheme(2, "ternary"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_come_back_with_their_scheme(scheme, dtype):
    weight = draw(6, 5, 3, dtype=dtype)
    codes = codes_of(weight, scheme)
    packed = pack_codes(codes, scheme, dtype=dtype)
    assert json.loads(json.dumps(packed.options)) == packed.options
    assert same_bits(unpack(packed), dequantize(codes, scheme, dtype=dtype))
    found, told = unpack_codes(packed)
    assert told == scheme
    assert all(torch.equal(one, other) for one, other in zip(found, codes, strict=True))
    assert packed.parts["codes"].number * scheme.bits <= 8 * len(packed.parts["codes"].content) < 90 * scheme.bits + 8
    with pytest.raises(InputError, match="no codes"):
        unpack_codes(pack_dense(weight))


def test_trained_ternary_codes_come_back():
    scheme = Scheme(2, "ttq", "tensor")
    weight, up, down = draw(6, 5), torch.tensor(0.3), torch.tensor(0.8)
    packed = pack_codes(ttq_codes(weight, up, down), scheme)
    assert same_bits(unpack(packed), ttq(weight, up, down) + 0.0)


def test_coding_never_makes_a_part_larger_and_huffman_counts_symbols_not_bytes():
    noise = pack_dense(torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    for coding in ("deflate", "huffman"):
        assert encode(noise, coding).nbytes == noise.nbytes
        assert encode(noise, coding).parts["values"].coding == "plain"
    random = np.random.default_rng(0)
    skewed = torch.from_numpy(np.minimum(random.geometric(0.6, 30_000) - 1, 7))
    packed = pack_codebook(skewed, torch.arange(8.0))
    coded = encode(packed, "huffman")
    assert coded.parts["indices"].coding == "huffman"
    bits = 8 * len(coded.parts["indices"].content) / 30_000
    assert entropy(skewed.numpy()) <= bits < entropy(skewed.numpy()) + 0.2
    assert same_bits(unpack(coded), skewed.float())
    back = encode(coded, "deflate")
    assert same_bits(unpack(back), skewed.float())
    with pytest.raises(InputError, match="coding must be"):
        encode(packed, "zip")


# The file


def quantized_network(bits, kind="symmetric"):
    scheme = Scheme(bits, kind)
    weights = {f"layer{n}.weight": draw(64, 300 + n, seed=n) for n in range(6)}
    packed = {name: pack_codes(codes_of(weight, scheme), scheme) for name, weight in weights.items()}
    packed |= {name.replace("weight", "bias"): pack_dense(draw(64)) for name in weights}
    return weights, packed, scheme


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_files_are_as_small_as_their_bits_and_come_back_bit_for_bit(tmp_path, bits):
    weights, packed, scheme = quantized_network(bits, "binary" if bits == 1 else "symmetric")
    path = tmp_path / "network.dlpk"
    header = {"steps": [{"bits": bits, "at": 0.5}], "name": "naïve", "none": None, "yes": True}
    written = write_packed(path, packed, header)
    assert written == path.stat().st_size
    number = sum(weight.numel() for weight in weights.values())
    known = 6 * 64 * 4 + 6 * 64 * 4
    assert number * bits / 8 + known <= written <= 1.03 * (number * bits / 8 + known)
    told, tensors = read_packed(path)
    assert told == header
    assert list(tensors) == list(packed)
    for name, weight in weights.items():
        assert same_bits(tensors[name], dequantize(codes_of(weight, scheme), scheme))
    assert all(owns_its_memory(tensor) for tensor in tensors.values())
    assert list(tmp_path.iterdir()) == [path]
    assert write_packed(tmp_path / "again.dlpk", packed, header) == written
    assert (tmp_path / "again.dlpk").read_bytes() == path.read_bytes()


def test_four_bits_are_half_of_eight(tmp_path):
    sizes = {bits: write_packed(tmp_path / f"{bits}", quantized_network(bits)[1], {}) for bits in (8, 4, 2)}
    assert 0.5 <= sizes[4] / sizes[8] < 0.52
    assert 0.25 <= sizes[2] / sizes[8] < 0.28


def test_small_tensors_cost_little_beside_their_bytes(tmp_path):
    tensors = {f"blocks.{n}.attention.weight": pack_dense(draw(4)) for n in range(100)}
    assert write_packed(tmp_path / "small", tensors, {}) < 100 * 16 + 1000


def test_a_network_comes_back_with_equal_outputs(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    fresh, images = copy.deepcopy(network), draw(4, 1, 8, 8)
    quantize_weights(network[0], scheme=Scheme(4))
    share_weights(network[4], k=16)
    network.eval()
    packed = {
        f"0.{name}": pack_codes(entry.codes(original_of(network[0], name)), entry.scheme)
        for name, entry in computed(network[0]).items()
    }
    packed |= {
        f"4.{name}": encode(pack_codebook(book.indices, values), "huffman")
        for name, (book, values) in codebooks(network[4]).items()
    }
    rest = {name: value for name, value in network.state_dict().items() if "parametrizations" not in name}
    packed |= {name: pack_dense(value) for name, value in rest.items()}
    write_packed(tmp_path / "network", packed, {})
    fresh.load_state_dict(read_packed(tmp_path / "network")[1], strict=True)
    assert torch.equal(fresh.eval()(images), network(images))


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "network.dlpk"
    write_packed(path, {"weight": pack_dense(draw(5, 5)), "mask": pack_bitmask(draw(3))}, {"a": 1})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(InputError, match="network.dlpk") as caught:
            read_packed(path)
        assert "\n" not in str(caught.value)
    for damaged in (
        b"",
        content[:3],
        content[:11],
        content[:40],
        content[:-1],
        content + b"x",
        b"PK\x03\x04" + content,
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="network.dlpk"):
            read_packed(path)
    path.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(InputError, match="has format 1, but .* reads 2: compress the network again"):
        read_packed(path)
    with pytest.raises(InputError, match="there is no file"):
        read_packed(tmp_path / "none")
    path.write_bytes(content)
    assert read_packed(path)[0] == {"a": 1}


def forged(told):
    """A file with a good checksum and any header."""
    header = zlib.compress(json.dumps(told).encode())
    content = b"DLPK" + (2).to_bytes(4, "little") + len(header).to_bytes(4, "little") + bytes(4) + header
    return content + zlib.crc32(content).to_bytes(4, "little")


@pytest.mark.parametrize(
    "told",
    [
        [], {}, {"header": {}}, {"header": {}, "tensors": {"w": 3}}, {"header": {}, "tensors": {"w": [1, 2]}},
        {"header": {}, "tensors": {"w": ["dense", [2], "float32", {}, []]}},
        {"header": {}, "tensors": {"w": ["dense", [2], "float32", {}, [["values", 0, 0, 32, "plain"]]]}},
        {"header": {}, "tensors": {"w": ["dense", [2], "float31", {}, [["values", 0, 0, 32, "plain"]]]}},
        {"header": {}, "tensors": {"w": ["zip", [2], "float32", {}, []]}},
        {"header": {}, "tensors": {"w": ["dense", [2], "float32", {}, [["values", 9, 2, 32, "plain"]]]}},
        {"header": {}, "tensors": {"w": ["dense", [2], "float32", {}, [["values", 0, 2, 32, "deflate"]]]}},
        {"header": {}, "tensors": {"w": ["codes", [2], "float32", {"scheme": {"bits": 11}}, []]}},
    ],
)  # fmt: skip
def test_headers_that_do_not_fit_are_one_line(tmp_path, told):
    path = tmp_path / "network.dlpk"
    path.write_bytes(forged(told))
    with pytest.raises(InputError, match="network.dlpk") as caught:
        read_packed(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def little_memory():
    """A process that asks for far more memory than it has now gets none of it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


MANY = 30_000_000_000


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["dense", [MANY], "float32", {}, [["values", 0, MANY, 32, "plain"]]], "tensors take 120,000,000,000 bytes"),
        (["codebook", [MANY], "float32", {}, [["indices", 0, MANY, 0, "plain"], ["centroids", 0, 0, 32, "plain"]]],
         "tensors take 120,000,000,000 bytes, more than 268,435,456: if it is to be trusted, give limit=120000000000"),
        (["hashed", [MANY], "float32", {"seed": 0}, [["values", 0, 1, 32, "plain"]]], "tensors take"),
        (["csr", [1, MANY], "float32", {"number": 0}, [["rows", 0, 2, 8, "plain"]]], "tensors take"),
        (["codes", [MANY], "float32", {}, [["codes", 0, 0, 8, "plain"]]], "tensors take"),
        (["dense", [2], "float32", {}, [["values", 0, MANY, 32, "plain"]]], "has more numbers than it has entries"),
        (["dense", [2], "float32", {}, [["values", 0, 2, MANY, "plain"]]], "has more numbers than it has entries"),
        (["dense", [-2, -3], "float32", {}, [["values", 0, 6, 32, "plain"]]], "no numbers of entries"),
        (["dense", [1e10], "float32", {}, [["values", 0, 6, 32, "plain"]]], "no numbers of entries"),
        (["bitmask", [8], "float32",
          {"number": MANY, "values": {"codec": "codebook", "dtype": "float32", "options": {}}},
          [["mask", 0, 8, 0, "plain"], ["values.indices", 0, 8, 0, "plain"]]], "has 30000000000 values for 0 places"),
    ],
)  # fmt: skip
def test_sizes_in_a_header_are_not_believed(tmp_path, little_memory, told, message):
    path = tmp_path / "network.dlpk"
    codec, shape, dtype, options, parts = told
    packed = Packed(codec, shape, dtype, options, {name: Part(b"", *part) for name, _, *part in parts})
    write_packed(path, {"w": packed}, {})
    with pytest.raises(InputError, match=f"network.dlpk.*{message}") as caught:
        read_packed(path)
    assert "\n" not in str(caught.value)


def test_a_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    monkeypatch.setattr(file_format, "_SMALL", 1000)
    monkeypatch.setattr(file_format, "_RATIO", 10)
    path, value = tmp_path / "network.dlpk", torch.full((10_000,), 3.0)
    write_packed(path, {"w": pack_shared(value)}, {})
    assert path.stat().st_size < 300
    with pytest.raises(InputError, match="tensors take 40,000 bytes, .* give limit=40000"):
        read_packed(path)
    assert torch.equal(read_packed(path, limit=40_000)[1]["w"], value)
    with pytest.raises(InputError, match="more than 39,999"):
        read_packed(path, limit=39_999)
    monkeypatch.setattr(file_format, "_RATIO", 1000)
    assert torch.equal(read_packed(path)[1]["w"], value)


@pytest.mark.parametrize("coding", ["deflate", "huffman"])
def test_a_part_is_not_inflated_beyond_its_numbers(little_memory, coding):
    coder = zlib.compressobj(9, wbits=15 if coding == "deflate" else -15)
    bomb = b"".join(coder.compress(bytes(2**20)) for _ in range(2**7)) + coder.flush()
    part = Part(bomb, 100, 32, coding)
    with pytest.raises(InputError, match=r"deflated bytes stand for more than 400"):
        part.plain()
    with pytest.raises(zlib.error, match="not complete"):
        Part(zlib.compress(bytes(400))[:-3], 100, 32, "deflate").plain()


def test_a_header_is_not_inflated_beyond_its_limit(tmp_path, little_memory):
    coder = zlib.compressobj(9)
    header = b"".join(coder.compress(bytes(2**20)) for _ in range(2**7)) + coder.flush()
    content = b"DLPK" + (2).to_bytes(4, "little") + len(header).to_bytes(4, "little") + bytes(4) + header
    (tmp_path / "bomb").write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    with pytest.raises(InputError, match=r"bomb is damaged: .* stand for more than 67,108,864"):
        read_packed(tmp_path / "bomb")


def test_headers_are_plain_values_and_a_file_that_cannot_be_written_leaves_none(tmp_path):
    path = tmp_path / "network"
    for header, words in (
        ({"a": (1, 2)}, "'a'.*tuple"), ({"a": [1, {2: 3}]}, "key 2"), ({"a": {"b": draw(2)}}, "'b'.*Tensor"),
        ({"a": math.inf}, "inf"), ({"a": np.float64(1)}, "float64"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            write_packed(path, {}, header)
    with pytest.raises(InputError, match="cannot be written"):
        write_packed("/proc/nowhere/network", {}, {})
    assert not list(tmp_path.iterdir())
    assert write_packed(path, {}, {}) < 100
    assert read_packed(path) == ({}, {})
    write_packed(path, {"w": pack_dense(draw(2))}, {})
    assert list(read_parts(path)[1]) == ["w"]
