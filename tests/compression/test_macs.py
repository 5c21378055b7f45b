"""Multiply-accumulates against formulas written out by hand, and against torch's own counter where that is right."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from distill_lightning import InputError, SmallResNet
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.products import Cost
from distill_lightning.compression.factor.factoring import build_factors
from distill_lightning.compression.mask.criteria import magnitude
from distill_lightning.compression.mask.learned import TopK, learn
from distill_lightning.compression.mask.selection import select


class Encoder(nn.Module):
    """2 layers of width 128 with 512 hidden neurons, and a classifier of the mean."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, inputs):
        return self.head(self.encoder(inputs).mean(1))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder_is_the_formula(norm_first):
    length, width, hidden = 64, 128, 512
    layer = 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * hidden
    counted = count_macs(Encoder(norm_first=norm_first), torch.zeros(1, length, width))
    assert counted.dense == counted.effective == 2 * layer + width * 10 == 27_264_256
    assert counted.by_module["encoder.layers.1.linear1"] == length * width * hidden
    assert counted.by_module["encoder.layers.0.self_attn"] == 4 * length * width**2 + 2 * length**2 * width
    assert counted.uncounted == ()


@pytest.mark.slow
def test_resnet18_at_224_is_the_known_number():
    network = torchvision.models.resnet18(weights=None)
    counted = count_macs(network, torch.zeros(1, 3, 224, 224))
    assert counted.dense == 1_814_073_344
    assert counted.by_module["conv1"] == 64 * 112 * 112 * 3 * 7 * 7
    assert counted.by_module["fc"] == 512 * 1000


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (SmallResNet(10, depth=2), (2, 1, 28, 28)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, dilation=2), (3, 4, 11, 9)),
        (nn.Conv1d(3, 5, 4), (2, 3, 12)),
        (nn.Conv3d(2, 3, 2), (1, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (4, 6, 5)),
    ],
)
def test_convolutions_and_linear_layers_agree_with_torchs_counter(network, shape):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        copy.deepcopy(network).eval()(torch.zeros(shape))
    assert count_macs(network, torch.zeros(shape)).dense * 2 == flops.get_total_flops()


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_are_the_formula(kind, gates, batch_first):
    steps, batch, inputs, hidden = 7, 3, 5, 6
    data = torch.zeros((batch, steps, inputs) if batch_first else (steps, batch, inputs))
    single = kind(inputs, hidden, batch_first=batch_first)
    assert count_macs(single, data).dense == batch * steps * gates * hidden * (inputs + hidden)
    deep = kind(inputs, hidden, num_layers=2, bidirectional=True, batch_first=batch_first)
    each = gates * hidden * (inputs + hidden) + gates * hidden * (2 * hidden + hidden)
    assert count_macs(deep, data).dense == 2 * batch * steps * each
    assert count_macs(single, data[:, 0] if not batch_first else data[0]).dense == steps * gates * hidden * (
        inputs + hidden
    )


# oneDNN computes no projections, and says so.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projected_packed_and_single_step_recurrent_layers():
    projected = nn.LSTM(5, 6, proj_size=4)
    assert count_macs(projected, torch.zeros(7, 3, 5)).dense == 21 * (24 * 5 + 24 * 4 + 4 * 6)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, 5), torch.zeros(2, 5)])
    assert count_macs(nn.LSTM(5, 6), (packed,)).dense == 6 * 24 * 11
    assert count_macs(nn.LSTMCell(5, 6), torch.zeros(3, 5)).dense == 3 * 24 * 11
    assert count_macs(nn.GRUCell(5, 6), torch.zeros(3, 5)).dense == 3 * 18 * 11


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_to_another_sequence(batch_first, need_weights):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=batch_first, add_zero_attn=True)

        def forward(self, query, key, value):
            return self.attention(query, key, value=value, need_weights=need_weights)[0]

    tensors = [torch.zeros(2, 6, 8), torch.zeros(2, 9, 5), torch.zeros(2, 9, 3)]
    counted = count_macs(Cross(), tuple(t if batch_first else t.transpose(0, 1) for t in tensors))
    projections = 12 * 8 * 8 + 18 * 5 * 8 + 18 * 3 * 8 + 12 * 8 * 8
    assert counted.dense == projections + 2 * 12 * (9 + 1) * 8
    assert list(counted.by_module) == ["attention"]


class OwnAttention(nn.Module):
    """What another implementation of attention looks like."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.how = how

    def forward(self, inputs):
        q, k, v = (layer(inputs).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "function":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "matmul":
            mixed = (q @ k.transpose(2, 3)).softmax(-1).matmul(v)
        else:
            mixed = torch.einsum("nhqk,nhkd->nhqd", torch.einsum("nhqd,nhkd->nhqk", q, k).softmax(-1), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["function", "matmul", "einsum"])
def test_attention_of_ones_own_counts_like_torchs(how):
    own = count_macs(OwnAttention(how), torch.zeros(3, 7, 8))
    assert own.dense == 4 * 21 * 64 + 2 * 3 * 49 * 8
    assert own.by_module[""] == 2 * 3 * 49 * 8


def test_embeddings_count_nothing_but_a_tied_output_layer_does():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 6)

        def forward(self, tokens):
            return F.linear(self.embedding(tokens), self.embedding.weight)

    counted = count_macs(Language(), torch.zeros(2, 5, dtype=torch.long))
    assert counted.dense == 10 * 50 * 6
    assert counted.by_module == {"": 3000}
    assert counted.uncounted == ()


def test_a_layer_that_runs_twice_counts_twice_and_an_idle_one_not_at_all():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = nn.Linear(4, 4), nn.Linear(9, 9)

        def forward(self, inputs):
            return self.layer(self.layer(inputs))

    assert count_macs(Recursive(), torch.zeros(1, 4)).by_module == {"layer": 32}


def test_factored_layers_count_as_they_are():
    factored = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 8, 1))
    assert count_macs(factored, torch.zeros(1, 8, 5, 5)).dense == 25 * (16 + 36 + 16)


# effective


def test_masked_weights_count_in_the_dense_number_alone():
    network = Encoder()
    paths = ["encoder.layers.0.linear1.weight", "encoder.layers.0.self_attn.in_proj_weight", "head.weight"]
    before = count_macs(network, torch.zeros(1, 64, 128))
    masks = select(magnitude(network, paths), 0.75, scope="layer")
    masks.project(network)
    after = count_macs(network, torch.zeros(1, 64, 128))
    assert after.dense == before.dense
    saved = 0.75 * (64 * 128 * 512 + 64 * 3 * 128 * 128 + 1280)
    assert before.dense - after.effective == saved


@pytest.mark.parametrize("layer", [nn.LSTM(5, 6), nn.Conv2d(7, 4, 3), nn.ConvTranspose2d(7, 4, 3), nn.Linear(5, 4)])
def test_effective_counts_the_weights_that_are_left(layer):
    paths = [name for name, _ in layer.named_parameters() if "weight" in name]
    select(magnitude(layer, paths), 0.5).project(layer)
    shape = (7, 7, 9, 9) if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else (3, 5)
    counted = count_macs(layer, torch.zeros(shape))
    assert counted.effective / counted.dense == pytest.approx(0.5, abs=0.01)


def test_zeros_of_learned_masks_count_and_their_computation_does_not():
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.ones(4, 5))

        def forward(self, weight):
            return weight @ self.other.T @ self.other

    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5))
    learn(network, ["0.weight"], TopK, amount=0.25)
    parametrize.register_parametrization(network[1], "bias", nn.Identity())
    lstm = nn.LSTM(5, 6)
    parametrize.register_parametrization(lstm, "weight_ih_l0", Factors())
    counted = count_macs(network, torch.zeros(3, 5))
    assert (counted.dense, counted.effective) == (3 * 40, 3 * 35)
    assert count_macs(lstm, torch.zeros(7, 5)).dense == 7 * 24 * 11


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_factored_recurrent_layer_counts_as_the_dense_one_and_the_products_of_its_factors(kind, options):
    torch.manual_seed(0)
    layer, inputs = kind(5, 6, **options), torch.zeros(7, 3, 5)
    recurrent = {name: weight for name, weight in layer.named_parameters() if name.startswith("weight_hh")}
    products = {name: weight.shape[0] * 2 * weight.shape[1] for name, weight in recurrent.items()}
    factored = build_factors(layer, {"kind": "recurrent", "ranks": dict.fromkeys(products, 2)})
    factored.fill(layer)
    counted = count_macs(factored, inputs)
    assert counted.dense == counted.effective == count_macs(layer, inputs).dense + sum(products.values())
    with torch.no_grad():
        factored.weight_hh_l0_left[:, 0] = 0
        factored.weight_ih_l0[0] = 0
    half = count_macs(factored, inputs)
    # A row of five weights at 21 steps, and one of two columns of factors.
    assert half.dense == counted.dense
    assert half.effective == counted.effective - 5 * 21 - products["weight_hh_l0"] // 2


# what is left as it was, and what is not known


def test_counting_leaves_modes_statistics_hooks_and_the_fast_path_as_they_were():
    network = SmallResNet(10).train()
    network.stem.eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    for fast in (False, True):
        torch.backends.mha.set_fastpath_enabled(fast)
        count_macs(network, torch.randn(2, 1, 28, 28))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with pytest.raises(RuntimeError):
        count_macs(network, torch.randn(2, 3, 28, 28))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4))

    def forward(self, inputs):
        return (inputs[:, None] * self.matrix).sum(2)


def test_a_module_with_a_matrix_of_its_own_whose_products_are_not_seen_is_named():
    assert count_macs(nn.Sequential(nn.Linear(4, 4), Odd()), torch.zeros(2, 4)).uncounted == ("1",)


def test_a_module_may_know_its_own_cost():
    class Known(Odd):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, inputs):
            return super().forward(self.inner(inputs) @ torch.eye(4))

        def count_macs(self, inputs, output):
            return Cost(len(inputs[0]) * output.shape[1], 1)

    counted = count_macs(nn.Sequential(nn.Linear(4, 4), Known()), torch.zeros(2, 4))
    assert (counted.dense, counted.effective) == (32 + 6, 32 + 1)
    assert counted.by_module == {"0": 32, "1": 6}
    assert counted.uncounted == ()


def test_double_precision_costs_the_same():
    assert count_macs(nn.LSTM(5, 6).double(), torch.zeros(7, 3, 5, dtype=torch.float64)).dense == 21 * 24 * 11


def test_a_network_without_any_is_refused():
    with pytest.raises(InputError, match="ReLU: nothing that counts as multiply-accumulates ran"):
        count_macs(nn.ReLU(), torch.zeros(2))
