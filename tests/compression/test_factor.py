"""Layers made of factors against the dense layers with the recomposed weight, and their structure as plain values."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill_lightning import InputError
from distill_lightning.compression.access.moments import input_moments
from distill_lightning.compression.factor.factoring import (
    build_factors,
    factorize,
    replace_layer,
)
from distill_lightning.compression.factor.layers import LowRankLinear
from distill_lightning.layers import GaussianHead

# The dense layer says so, too: an even window is padded by one more on one side.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

CONV_OPTIONS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 1, "bias": False},
]


def conv(options, into=5, out=7, dtype=torch.float64):
    return nn.Conv2d(into, out, **options, dtype=dtype)


def naive_kernel(chain):
    """The kernel of a chain, multiplied out entry by entry of its window, from the weights that are there."""
    weights = [stage.weight.detach() for stage in chain]
    if chain.method == "svd_channel":
        first, last = weights
        return torch.einsum("rchw,or->ochw", first, last[:, :, 0, 0])
    if chain.method == "svd_spatial":
        first, last = weights
        return torch.einsum("rch,orw->ochw", first[..., 0], last[:, :, 0])
    if chain.method == "tucker2":
        first, core, last = weights
        return torch.einsum("rc,srhw,os->ochw", first[:, :, 0, 0], core, last[:, :, 0, 0])
    first, down, across, last = weights
    if chain.method == "cp":
        parts = (last[:, :, 0, 0], first[:, :, 0, 0], down[:, 0, :, 0], across[:, 0, 0])
        return torch.einsum("or,rc,rh,rw->ochw", *parts)
    parts = (last[:, :, 0, 0], first[:, :, 0, 0], down[..., 0], across[:, :, 0])
    return torch.einsum("ot,rc,srh,tsw->ochw", *parts)


# Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_reproduces_a_linear_layer(bias, dtype):
    layer, feature = nn.Linear(12, 7, bias=bias, dtype=dtype), torch.randn(3, 4, 12, dtype=dtype)
    for method in ("svd", "tt"):
        factored = factorize(layer, rank=1.0, method=method, only_if_smaller=False)
        assert factored.error < 1e-6
        output = factored.layer(feature)
        assert output.dtype == dtype
        assert (output - layer(feature)).abs().max().item() < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_low_rank_linear_layer_is_the_product_of_its_weights_with_the_bias(rank):
    layer, feature = nn.Linear(9, 6).double(), torch.randn(4, 9).double()
    factored = factorize(layer, rank=rank, only_if_smaller=False)
    first, second = factored.layer
    weight = second.weight @ first.weight
    assert torch.linalg.matrix_rank(weight).item() == rank
    assert torch.allclose(factored.layer(feature), feature @ weight.T + layer.bias, atol=1e-12)
    tail = torch.linalg.svdvals(layer.weight)[rank:].norm() / layer.weight.norm()
    assert factored.error == pytest.approx(tail.item(), rel=1e-9)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(("into", "out"), [(24, 16), (30, 7), (1, 12)])
def test_a_train_linear_layer_is_its_matrix(into, out, parts):
    layer, feature = nn.Linear(into, out).double(), torch.randn(5, into).double()
    factored = factorize(layer, rank=2, method="tt", only_if_smaller=False, parts=parts)
    train = factored.layer
    matrix = torch.zeros(out, into, dtype=torch.float64)
    for row in range(out):
        for column in range(into):
            product, rest_row, rest_column = torch.eye(1, dtype=torch.float64), row, column
            sizes_row, sizes_column = out, into
            for core in train.cores:
                sizes_row, sizes_column = sizes_row // core.shape[1], sizes_column // core.shape[2]
                product = product @ core[:, rest_row // sizes_row, rest_column // sizes_column].detach()
                rest_row, rest_column = rest_row % sizes_row, rest_column % sizes_column
            matrix[row, column] = product.item()
    assert torch.allclose(train(feature), feature @ matrix.T + layer.bias, atol=1e-12)
    assert factored.error == pytest.approx(((matrix - layer.weight).norm() / layer.weight.norm()).item(), abs=1e-9)


@pytest.mark.parametrize(("rank", "kept"), [(169, True), (170, True), (171, False), (256, False)])
def test_a_rank_that_saves_nothing_leaves_the_layer_untouched_and_says_so(rank, kept):
    layer = nn.Linear(512, 256)
    found = factorize(layer, rank=rank)
    assert (found.layer is not layer) == kept
    assert (found.description is not None) == kept
    assert ("left as it is" in found.note) != kept
    assert f"{rank * 768:,} weights instead of 131,072" in found.note or not kept
    if not kept:
        assert found.note == f"Linear as svd of rank {rank} would have {rank * 768:,} weights instead of 131,072: " + (
            "left as it is"
        )


def test_equal_size_is_not_smaller():
    # 4 * 4 / (4 + 4) = 2 exactly
    layer = nn.Linear(4, 4)
    assert factorize(layer, rank=2).layer is layer
    assert factorize(layer, rank=1).layer is not layer
    assert factorize(layer, rank=2, only_if_smaller=False).layer is not layer


# Conv2d


@pytest.mark.parametrize("method", ["svd_channel", "svd_spatial", "tucker2", "tt"])
@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
def test_full_rank_reproduces_a_convolution(options, method):
    layer, images = conv(options, dtype=torch.float32), torch.randn(2, 5, 8, 9)
    found = factorize(layer, rank=1.0, method=method, only_if_smaller=False)
    assert found.layer(images).shape == layer(images).shape
    assert (found.layer(images) - layer(images)).abs().max().item() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd_channel", "svd_spatial", "tucker2", "cp", "tt"])
@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
def test_a_chain_is_the_convolution_with_the_recomposed_kernel(options, method):
    layer, images = conv(options), torch.randn(2, 5, 8, 9, dtype=torch.float64)
    found = factorize(layer, rank=2, method=method, only_if_smaller=False)
    dense, kernel = copy.deepcopy(layer), naive_kernel(found.layer)
    with torch.no_grad():
        dense.weight.copy_(kernel)
    assert (found.layer(images) - dense(images)).abs().max().item() < 1e-10
    assert found.error == pytest.approx(((kernel - layer.weight).norm() / layer.weight.norm()).item(), abs=1e-9)
    assert 0.05 < found.error < 1


def test_a_convolution_by_cp_of_its_own_rank_is_exact():
    torch.manual_seed(3)
    parts = [torch.randn(size, 3) for size in (6, 5, 3, 3)]
    layer = nn.Conv2d(5, 6, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("or,cr,hr,wr->ochw", *parts))
    found, images = factorize(layer, rank=3, method="cp"), torch.randn(1, 5, 6, 6)
    assert found.error < 1e-5
    difference = (found.layer(images) - layer(images)).norm() / layer(images).norm()
    assert difference.item() < 1e-5


def test_svd_of_a_convolution_is_by_channel_and_the_border_is_right():
    layer = conv({"kernel_size": 3, "padding": 1})
    found = factorize(layer, rank=2, method="svd")
    assert found.description == {"kind": "conv_chain", "method": "svd_channel", "ranks": [2]}
    assert [stage.kernel_size for stage in found.layer] == [(3, 3), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd_channel", "svd_spatial", "tucker2", "cp", "tt"])
def test_a_budget_of_multiply_accumulates_is_kept_and_used(method):
    layer = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    found = factorize(layer, rank="macs:0.4", method=method, input_size=(11, 13))

    def macs(module):
        counted, handles = [], []
        for stage in module.modules():
            if isinstance(stage, nn.Conv2d):
                count = lambda own, _, output: counted.append(own.weight.numel() * output[0, 0].numel())  # noqa: E731
                handles.append(stage.register_forward_hook(count))
        module(torch.zeros(1, 16, 11, 13))
        for handle in handles:
            handle.remove()
        return sum(counted)

    used = macs(found.layer) / macs(layer)
    assert 0.2 < used <= 0.4


@pytest.mark.parametrize("method", ["svd", "tt"])
@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_a_linear_layer_keeps_a_budget_of_multiply_accumulates(method, fraction):
    layer, feature = nn.Linear(192, 144, bias=False), torch.randn(1, 192)
    counts = []
    for module in (layer, factorize(layer, rank=f"macs:{fraction}", method=method).layer):
        with FlopCounterMode(display=False) as counter:
            module(feature)
        counts.append(counter.get_total_flops())
    assert fraction / 3 < counts[1] / counts[0] <= fraction


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd_channel", "svd_spatial", "tucker2", "cp", "tt"])
@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_a_budget_of_parameters_is_kept_and_used(method, fraction):
    layer = nn.Conv2d(16, 24, 3, bias=False)
    found = factorize(layer, rank=f"params:{fraction}", method=method)
    used = sum(p.numel() for p in found.layer.parameters()) / layer.weight.numel()
    assert fraction / 2 < used <= fraction


def test_ranks_that_the_others_cannot_use_are_lowered():
    found = factorize(nn.Conv2d(32, 4, 1), rank=8, method="tucker2", only_if_smaller=False)
    assert found.description["ranks"] == [4, 4]


# data-aware


@pytest.mark.slow
def input_moment(network, layer, batches):
    return input_moments(network, {"layer": layer}, [(batch, None) for batch in batches], exact=True)["layer"][0]


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 10.0])
@pytest.mark.parametrize("number", range(3))
def test_on_its_inputs_a_data_aware_layer_is_no_worse_than_a_plain_one(number, rank, damping):
    layer, batches = [
        (nn.Linear(10, 12), [torch.randn(20, 10) @ torch.randn(10, 10) for _ in range(3)]),
        (nn.Conv2d(10, 12, 1, stride=2), [torch.rand(3, 10, 5, 4) for _ in range(2)]),
        (nn.Conv2d(2, 10, (3, 2), padding=(1, 2), dilation=2), [torch.rand(3, 2, 7, 6) for _ in range(2)]),
    ][number]
    layer, batches = layer.double(), [batch.double() for batch in batches]
    moment = input_moment(layer, layer, batches)
    errors = []
    for options in ({}, {"moment": moment, "damping": damping}):
        found = factorize(layer, rank=rank, only_if_smaller=False, **options)
        errors.append(sum((found.layer(batch) - layer(batch)).square().sum().item() for batch in batches))
    assert errors[1] <= errors[0] * (1 + 1e-9)
    if damping == 1e-6 and rank < 9:
        assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
def test_the_moment_of_a_convolution_is_that_of_its_patches(options):
    layer, images = conv(options), torch.randn(2, 5, 6, 7, dtype=torch.float64)
    moment = input_moment(nn.Sequential(nn.ReLU(), layer), layer, [images])
    plain = {name: value for name, value in options.items() if name not in ("bias",)}
    # Row by row of an identity kernel, a convolution tells what is in each place of a patch.
    spy = nn.Conv2d(5, moment.shape[0], **plain, bias=False, dtype=torch.float64)
    with torch.no_grad():
        spy.weight.copy_(torch.eye(moment.shape[0]).reshape(spy.weight.shape))
        rows = spy(images.relu()).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(moment, rows.T @ rows / len(rows), atol=1e-12)


def test_taking_a_moment_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    before = copy.deepcopy(network.state_dict())
    batch = torch.randn(6, 4) + 2
    moment = input_moment(network, network[2], [batch[:2], batch[2:]])
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    seen = copy.deepcopy(network).eval()[0](batch).double()
    assert torch.allclose(moment, (seen.T @ seen / 6).detach(), atol=1e-6)
    assert not network[2]._forward_pre_hooks


# Embedding


@pytest.mark.parametrize("method", ["svd", "tt"])
@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (31, 8), (7, 5)])
def test_a_factored_embedding_of_full_rank_looks_up_the_same_rows(rows, columns, method):
    layer = nn.Embedding(rows, columns, dtype=torch.float64)
    found = factorize(layer, rank=1.0, method=method, only_if_smaller=False)
    index = torch.randint(rows, (4, 3))
    assert torch.allclose(found.layer(index), layer(index), atol=1e-12)
    assert torch.allclose(found.layer(torch.arange(rows)), layer.weight, atol=1e-12)
    assert found.layer(torch.tensor(rows - 1)).shape == (columns,)
    assert found.layer(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, columns)


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_the_error_of_a_factored_embedding_is_that_of_its_table(method):
    layer = nn.Embedding(40, 12, dtype=torch.float64)
    found = factorize(layer, rank=3, method=method)
    table = found.layer(torch.arange(40)).detach()
    assert found.error == pytest.approx(((table - layer.weight).norm() / layer.weight.norm()).item(), rel=1e-6)
    assert 0.1 < found.error < 1
    assert sum(p.numel() for p in found.layer.parameters()) < layer.weight.numel()


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_a_lookup_never_makes_the_whole_table(method):
    found = factorize(nn.Embedding(5000, 16), rank=2, method=method)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes.append(output.numel() if isinstance(output, torch.Tensor) else 0)
            return output

    with Sizes(), torch.no_grad():
        found.layer(torch.tensor([3, 4999]))
    assert 0 < max(sizes) < 5000


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_a_padding_row_stays_zero_and_learns_nothing(method):
    layer = nn.Embedding(20, 6, padding_idx=4)
    found = factorize(layer, rank=2, method=method).layer
    assert found(torch.tensor([4, 5])).ne(0).any(dim=1).tolist() == [False, True]
    found(torch.tensor([4, 4])).sum().backward()
    first = next(found.parameters())
    assert first.grad is None or not first.grad[4 if method == "svd" else slice(None)].any()


def test_a_padding_row_that_is_not_zero_is_refused_as_a_train():
    layer = nn.Embedding(20, 6, padding_idx=4)
    with torch.no_grad():
        layer.weight[4] = 1
    with pytest.raises(InputError, match=r"the padding row 4 of an embedding .* set it to zero, or use method='svd'"):
        factorize(layer, rank=2, method="tt")
    whole = factorize(layer, rank=6, only_if_smaller=False).layer
    assert torch.allclose(whole(torch.tensor(4)), torch.ones(6), atol=1e-5)


# recurrent layers

RECURRENT = [
    lambda: nn.LSTM(6, 8, num_layers=2, batch_first=True),
    lambda: nn.LSTM(6, 8, bidirectional=True, proj_size=5),
    lambda: nn.GRU(6, 8, bidirectional=True, bias=False),
    lambda: nn.GRU(6, 8, num_layers=2, dropout=0.5),
    lambda: nn.RNN(6, 8, nonlinearity="relu"),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("rank", [2, 100])
def test_a_factored_recurrent_layer_is_the_dense_one_with_multiplied_weights(make, rank):
    layer = make().double().eval()
    found = factorize(layer, rank=rank, only_if_smaller=False)
    assert not found.layer.training
    dense, state = copy.deepcopy(layer), found.layer.state_dict()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if f"{name}_left" in state:
                weight.copy_(state[f"{name}_left"] @ state[f"{name}_right"])
    sequence = torch.randn(4, 3, 6, dtype=torch.float64)
    for ours, theirs in zip(flat(found.layer(sequence)), flat(dense(sequence)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    state = dense(sequence)[1]
    initial = tuple(map(torch.randn_like, state)) if isinstance(state, tuple) else torch.randn_like(state)
    assert torch.allclose(found.layer(sequence, hx=initial)[0], dense(sequence, hx=initial)[0], atol=1e-12)
    assert isinstance(found.layer, type(layer))
    assert (found.error < 1e-12) == (rank == 100)
    packed = nn.utils.rnn.pack_padded_sequence(sequence, [4, 2, 1], enforce_sorted=False)
    if not layer.batch_first:
        assert torch.allclose(found.layer(packed)[0].data, dense(packed)[0].data, atol=1e-12)


def flat(output):
    for value in output:
        yield from flat(value) if isinstance(value, tuple) else [value]


def test_a_factored_recurrent_layer_learns_and_can_be_copied_between_forwards():
    layer = factorize(nn.LSTM(6, 16), rank=2).layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(5, 3, 6))[0].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    sequence = torch.randn(5, 3, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(sequence)[0], layer(sequence)[0])
    assert layer.double()(sequence.double())[0].dtype == torch.float64
    functional = torch.func.functional_call(layer.float(), {"bias_hh_l0": torch.zeros(64)}, (sequence,))[0]
    assert not torch.equal(functional, layer(sequence)[0])


def test_a_weight_that_would_not_be_smaller_stays_whole():
    found = factorize(nn.GRU(2, 16), rank=4)
    assert found.description == {"kind": "recurrent", "ranks": {"weight_hh_l0": 4}}
    names = set(found.layer.state_dict())
    assert names == {"weight_ih_l0", "weight_hh_l0_left", "weight_hh_l0_right", "bias_ih_l0", "bias_hh_l0"}
    assert found.note.startswith("GRU with factors of rank weight_hh_l0 4: 256 weights instead of 768, relative error")
    small = nn.GRU(2, 2)
    untouched = factorize(small, rank=2)
    assert untouched.layer is small
    assert untouched.note == "no weight of GRU would be smaller as factors: left as it is"


def test_bfloat16_autocast_runs_a_factored_recurrent_layer():
    layer = factorize(nn.LSTM(6, 16), rank=2).layer
    sequence = torch.randn(5, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(sequence)[0]
    assert torch.allclose(output.float(), layer(sequence)[0], atol=0.05)


# structure

EVERY = [
    (lambda: nn.Linear(12, 20), {"rank": 3}, (2, 12)),
    (lambda: nn.Linear(12, 20, bias=False), {"rank": 2, "method": "tt"}, (2, 12)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1), {"rank": 2, "method": "svd_channel"}, (1, 6, 5, 5)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1), {"rank": 2, "method": "svd_spatial"}, (1, 6, 5, 5)),
    (lambda: nn.Conv2d(6, 8, 3, stride=2), {"rank": 2, "method": "tucker2"}, (1, 6, 5, 5)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1), {"rank": 2, "method": "cp"}, (1, 6, 5, 5)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1), {"rank": 2, "method": "tt"}, (1, 6, 5, 5)),
    (lambda: nn.Embedding(50, 12, padding_idx=0), {"rank": 3}, None),
    (lambda: nn.Embedding(50, 12, padding_idx=0), {"rank": 3, "method": "tt"}, None),
    (lambda: nn.LSTM(6, 16, num_layers=2), {"rank": 3}, (4, 2, 6)),
    (lambda: nn.GRU(6, 16), {"rank": 3}, (4, 2, 6)),
    (lambda: nn.RNN(6, 16), {"rank": 2}, (4, 2, 6)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options", "shape"), EVERY)
def test_a_factored_layer_is_rebuilt_from_plain_values_and_loads_strictly(make, options, shape, tmp_path):
    layer = make().eval()
    before = copy.deepcopy(layer.state_dict())
    found = factorize(layer, **options)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    description = json.loads(json.dumps(found.layer.description))
    assert description == found.description
    state_file = tmp_path / "state.pt"
    torch.save({"description": description, "state": found.layer.state_dict()}, state_file)
    loaded = torch.load(state_file, weights_only=True)
    random_state = torch.get_rng_state()
    rebuilt = build_factors(layer, loaded["description"])
    assert torch.equal(torch.get_rng_state(), random_state), "building factors drew random numbers"
    assert type(rebuilt) is type(found.layer)
    assert all(not value.any() for value in rebuilt.state_dict().values())
    rebuilt.load_state_dict(loaded["state"], strict=True)
    inputs = torch.randint(50, (3, 4)) if shape is None else torch.randn(shape)
    for ours, theirs in zip(flat((rebuilt(inputs),)), flat((found.layer(inputs),)), strict=True):
        assert torch.equal(ours, theirs)
    assert not rebuilt.training
    with torch.device("meta"):
        shell = build_factors(make(), description)
    assert {name: value.shape for name, value in shell.state_dict().items()} == {
        name: value.shape for name, value in rebuilt.state_dict().items()
    }
    assert sum(p.numel() for p in found.layer.parameters()) < sum(p.numel() for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options", "shape"), EVERY)
def test_every_factor_has_a_gradient_and_a_frozen_layer_stays_frozen(make, options, shape):
    layer = make()
    factored = factorize(layer, **options).layer
    inputs = torch.randint(1, 50, (3, 4)) if shape is None else torch.randn(shape)
    next(flat((factored(inputs),))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factored.parameters())
    frozen = factorize(layer.requires_grad_(False), **options).layer
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(("make", "options", "shape"), EVERY)
def test_saved_factors_own_their_memory(make, options, shape):
    for value in factorize(make(), **options).layer.state_dict().values():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_description_names_every_weight_that_is_factored():
    layer = factorize(nn.GRU(6, 16), rank=3).layer
    assert layer.description["ranks"] == {"weight_ih_l0": 3, "weight_hh_l0": 3}


@pytest.mark.parametrize(
    ("layer", "description", "message"),
    [
        (
            nn.Linear(4, 4),
            {"kind": "low"},
            "kind 'low' is not a factored layer: it must be one of low_rank_linear, tt_linear,",
        ),
        (nn.Linear(4, 4), {}, "kind None is not a factored layer"),
        (nn.GRU(4, 4), {"kind": "conv_chain"}, "a conv_chain layer is built from Conv2d, not from GRU"),
        (nn.Linear(4, 4), {"kind": "low_rank_linear"}, "the description of a low_rank_linear layer does not fit"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(layer, description, message):
    with pytest.raises(InputError, match=message):
        build_factors(layer, description)


# in a network


def test_a_layer_is_replaced_by_path_and_the_old_one_returned():
    network = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    old, feature = network[1][1], torch.randn(2, 8)
    new = factorize(old, rank=8, only_if_smaller=False).layer
    before = network(feature)
    assert replace_layer(network, "1.1", new) is old
    assert network[1][1] is new
    assert torch.allclose(network(feature), before, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rank", [2, 100])
def test_a_transformer_in_eval_mode_runs_its_factors(rank, padded):
    block = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True, dropout=0)
    network = nn.TransformerEncoder(block, 2)
    sequence, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 4] = True
    options = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        # In train mode, without dropout: the dense network's shortcut in eval mode warns of its nested tensors.
        before = network.train()(sequence, **options)
    network.eval()
    for path in ("layers.0.linear1", "layers.1.linear2"):
        old = network.get_submodule(path)
        replace_layer(network, path, factorize(old, rank=rank, only_if_smaller=False).layer)
    ran = []
    network.layers[0].linear1[0].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        after = network(sequence, **options)[:, :4]
    assert ran
    assert torch.allclose(after, before[:, :4], atol=1e-5) == (rank == 100)


@pytest.mark.parametrize("path", ["", "4", "0.weight", "0.linear"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(InputError, match=f"Sequential has no layer '{path}': give a path of network.named_modules"):
        replace_layer(nn.Sequential(nn.Linear(2, 2)), path, nn.Identity())


def test_the_inside_of_an_attention_is_refused():
    network = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(InputError, match="'0.out_proj' is inside a MultiheadAttention, which uses its weight without"):
        replace_layer(network, "0.out_proj", nn.Linear(4, 4))


def test_a_tied_weight_is_refused():
    network = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    network[1].weight = network[0].weight
    with pytest.raises(InputError, match="'1' shares a weight with '0.weight', which factoring would untie"):
        replace_layer(network, "1", nn.Identity())


def test_a_layer_at_several_places_is_replaced_at_all_of_them():
    layer = nn.Linear(3, 3)
    network = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    new = nn.Identity()
    assert replace_layer(network, "b.1", new) is layer
    assert network["a"] is network["b"][1] is new
    attention = nn.MultiheadAttention(4, 2)
    network = nn.ModuleDict({"a": attention, "b": attention.out_proj})
    with pytest.raises(InputError, match="inside a MultiheadAttention"):
        replace_layer(network, "b", new)


# what cannot be

LINEAR, CONV, TABLE, LSTM = nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Embedding(8, 8), nn.LSTM(8, 8)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {"rank": 1}, "a convolution with groups=2 cannot be factored: exclude it"),
        (nn.BatchNorm1d(4), {"rank": 1}, "BatchNorm1d cannot be factored: Linear, Conv2d, Embedding, LSTM, GRU and"),
        (GaussianHead(4, 2), {"rank": 1}, r"GaussianHead cannot be factored \(a subclass may compute something else\)"),
        (nn.Embedding(4, 4, max_norm=1.0), {"rank": 1}, "an embedding with max_norm cannot be factored"),
        (LINEAR, {"rank": 1, "method": "cp"}, "method 'cp' is not for Linear: use svd or tt"),
        (CONV, {"rank": 1, "method": "lu"}, "method 'lu' is not for a Conv2d: use one of svd_channel, svd_spatial"),
        (LSTM, {"rank": 1, "method": "tt"}, "the weights of LSTM are factored by method 'svd' without a moment"),
        (CONV, {"rank": "energy:0.9", "method": "cp"}, "method 'cp' has no singular values: give its rank as a number"),
        (CONV, {"rank": "evbmf", "method": "cp"}, "method 'cp' has no singular values"),
        (CONV, {"rank": "macs:0.5"}, r"rank='macs:0.5' of Conv2d: give input_size=\(H, W\) of its input"),
        (TABLE, {"rank": "macs:0.5"}, "rank='macs:0.5' of Embedding: a lookup has no multiply-accumulates to save"),
        (LSTM, {"rank": "macs:0.5"}, "rank='macs:0.5' of LSTM: its factors save bytes but no multiply-accumulates"),
        (LINEAR, {"rank": "params:0.1"}, "a budget of 6.4 is below the 16 of rank 1: allow more, or leave it out"),
        (LINEAR, {"rank": 1, "method": "tt", "parts": 1}, "parts must be at least 2, got 1"),
        (
            LINEAR,
            {"rank": 1, "moment": torch.eye(7)},
            r"moment must be \(8, 8\) for a weight with 8 inputs, got \(7, 7",
        ),
        (LINEAR, {"rank": 1, "moment": torch.zeros(8, 8)}, "moment is singular: calibrate with more inputs"),
        (LINEAR, {"rank": 1, "moment": torch.ones(8, 8), "damping": 0.0}, "moment is singular"),
        (CONV, {"rank": 1, "moment": torch.eye(8), "method": "tucker2"}, "a moment is used by method 'svd' of Linear"),
    ],
)
def test_what_cannot_be_factored_is_refused(layer, options, message):
    with pytest.raises(InputError, match=message):
        factorize(layer, **options)


def test_a_weight_that_diverged_is_refused():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="a weight to factor holds NaN or infinity"):
        factorize(layer, rank=1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["energy:0.9", "evbmf", "params:0.5", 0.5])
def test_every_rule_serves_every_layer_that_it_can(rank):
    torch.manual_seed(1)
    for make, options, _ in EVERY:
        if options.get("method") == "cp" and rank in ("energy:0.9", "evbmf"):
            continue
        found = factorize(make(), **{**options, "rank": rank}, only_if_smaller=False)
        assert found.layer.description == found.description


def test_half_precision_is_factored_and_stays_half():
    layer = nn.Linear(16, 16).bfloat16()
    found = factorize(layer, rank=4)
    assert {value.dtype for value in found.layer.state_dict().values()} == {torch.bfloat16}
    assert isinstance(found.layer, LowRankLinear)
    weight = found.layer[1].weight.double() @ found.layer[0].weight.double()
    assert F.mse_loss(weight, layer.weight.double()) < layer.weight.double().square().mean()
