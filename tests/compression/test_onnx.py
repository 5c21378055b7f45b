"""ONNX files compute what the network does, in float and in int8, and say what they are."""

import copy
import importlib
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distill_lightning import InputError
from distill_lightning.compression.access.batch_sizes import at_batch
from distill_lightning.compression.access.computed import bake
from distill_lightning.compression.access.outputs import outputs_of
from distill_lightning.compression.costs.latency import Latency, compare_latency
from distill_lightning.compression.onnx.export import export_onnx
from distill_lightning.compression.onnx.int8 import has_vnni, int8_share, quantize_onnx
from distill_lightning.compression.onnx.latency import onnx_latency
from distill_lightning.compression.onnx.session import NetworkInOnnx, OnnxNetwork
from distill_lightning.compression.shrink.attention import convert_attention
from distill_lightning.compression.shrink.groups import shrink
from distill_lightning.compression.shrink.transformer import head_groups
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme
from distill_lightning.networks import SmallResNet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Rows(nn.Module):
    """A sequence classifier around a recurrent layer."""

    def __init__(self, kind=nn.LSTM, hidden=64):
        super().__init__()
        self.rnn = kind(8, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, rows):
        return self.head(self.rnn(rows)[0][:, -1])


class Encoder(nn.Module):
    """A sequence classifier around a Transformer; its layers differ, as after training."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))

    def forward(self, rows):
        return self.head(self.encoder(self.enter(rows)).mean(1))


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


NETWORKS = {
    "cnn": (plain_cnn, (4, 1, 8, 8)),
    "resnet": (lambda: SmallResNet(10, width=16), (4, 1, 16, 16)),
    "lstm": (Rows, (4, 8, 8)),
    "transformer": (Encoder, (4, 8, 8)),
    "converted": (lambda: convert_attention(Encoder()), (4, 8, 8)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """A network, inputs, the path of its ONNX file and how it has to be quantized."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    network = build().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    before = copy.deepcopy(network.state_dict())
    inputs = torch.randn(shape)
    assert export_onnx(network.train(), path, inputs) == path
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return network.eval(), inputs, path, "static" if request.param in ("cnn", "resnet") else "dynamic"


@pytest.mark.slow
@torch.no_grad()
def test_a_float_file_computes_the_same_at_every_batch_size(exported):
    network, inputs, path, _ = exported
    run = OnnxNetwork(path)
    for size in (1, 2, 3, 7):
        given = torch.randn(size, *inputs.shape[1:])
        assert (run(given) - network(given)).abs().max() <= 1e-5
        assert torch.equal(run(given.numpy()), run(given))


@pytest.mark.slow
def test_a_float_file_holds_the_weights_once_and_little_else(exported):
    network, _, path, _ = exported
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    # Folded norms leave; the graph and its names stay below 20 kB.
    assert 0.98 * weights <= path.stat().st_size <= weights + 20_000
    model = onnx.load(str(path))
    assert not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.slow
@torch.no_grad()
def test_int8_is_near_float_and_a_quarter_of_its_weights(exported, tmp_path):
    network, inputs, path, mode = exported
    batches = [torch.randn_like(inputs) for _ in range(4)] if mode == "static" else None
    out = quantize_onnx(path, tmp_path / "int8.onnx", mode=mode, batches=batches)
    given = torch.randn(32, *inputs.shape[1:])
    expected, found = network(given), OnnxNetwork(out)(given)
    assert (found - expected).norm() < 0.06 * expected.norm()
    assert not torch.equal(found, expected)
    # By hand: biases, norms and scales remain in float.
    tensors = onnx.load(str(out)).graph.initializer
    int8 = sum(int(np.prod(t.dims)) for t in tensors if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8))
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim > 1)
    assert matrices <= int8 <= 1.02 * matrices + 64
    assert int8_share(out) == pytest.approx(int8 / sum(int(np.prod(t.dims)) for t in tensors))
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert out.stat().st_size < 0.3 * weights + 30_000


@pytest.mark.slow
def test_weights_have_seven_bits_where_the_processor_overflows(tmp_path, monkeypatch):
    network, path = plain_cnn().eval(), tmp_path / "net.onnx"
    export_onnx(network, path, torch.randn(2, 1, 8, 8))

    def largest(out):
        tensors = onnx.load(str(out)).graph.initializer
        return max(
            int(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max())
            for t in tensors
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
        )

    batches = [torch.randn(2, 1, 8, 8)]
    for vnni, bound in [(True, 127), (False, 64)]:
        monkeypatch.setattr("distill_lightning.compression.onnx.int8.has_vnni", lambda vnni=vnni: vnni)
        out = quantize_onnx(path, tmp_path / "int8.onnx", batches=batches)
        assert 0.9 * bound <= largest(out) <= bound


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni sse\n", True),
        ("flags : avx2 avx_vnni\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("Features : fp asimd asimddp\n", True),
        ("Features : fp asimd\n", False),
        ("", False),
    ],
)
def test_vnni_is_read_from_what_linux_says(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert has_vnni(tmp_path / "cpuinfo") is expected
    assert has_vnni(tmp_path / "nothing") is False


@pytest.mark.slow
def test_int8_accuracy_on_separable_data_stays(tmp_path):
    """Images with one bright quarter, which a trained network tells apart with ease in int8, too."""
    quarters = torch.arange(200) % 4
    images = 0.1 * torch.randn(200, 1, 8, 8)
    for image, quarter in zip(images, quarters, strict=True):
        row, column = divmod(int(quarter), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    network = plain_cnn()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[:100]), quarters[:100]).backward()
        optimizer.step()
    path = export_onnx(network, tmp_path / "net.onnx", images[:2])
    out = quantize_onnx(path, tmp_path / "int8.onnx", batches=images[:100].split(25))
    accuracies = [
        (run(images[100:]).argmax(1) == quarters[100:]).float().mean() for run in map(OnnxNetwork, (path, out))
    ]
    assert accuracies == [1, 1]


# edges


@pytest.mark.slow
def test_what_was_shrunk_or_baked_is_exported(tmp_path):
    network = convert_attention(Encoder()).eval()
    shrink(network, {group: [0, 2] for group in head_groups(network)})
    quantize_weights(network.enter, scheme=Scheme(bits=4))
    rows = torch.randn(3, 8, 8)
    path = export_onnx(network, str(tmp_path / "new" / "computed.onnx"), rows)
    assert parametrize.is_parametrized(network.enter)
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(rows), network(rows), atol=1e-5, rtol=0)
    bake(network.enter)
    assert export_onnx(network, tmp_path / "baked.onnx", rows).read_bytes() == path.read_bytes()
    nn.utils.parametrizations.weight_norm(network.head)
    with pytest.raises(InputError, match="head has a parametrization that is not this package's"):
        export_onnx(network, tmp_path / "foreign.onnx", rows)


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.rnn = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.rnn(self.embedding(tokens))[0])


@pytest.mark.slow
def test_tied_weights_are_stored_once_and_fresh_transformer_layers_as_one(tmp_path):
    tokens = torch.randint(500, (2, 6))
    network = Tied().eval()
    path = export_onnx(network, tmp_path / "tied.onnx", tokens)
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert weights <= path.stat().st_size <= weights + 20_000
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(tokens[:1]), network(tokens[:1]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_fixed_batch_and_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left, right):
            return self.layer(left + right), right.sum(1)

    network, given = Two(), (torch.randn(2, 4), torch.randn(2, 4))
    run = OnnxNetwork(export_onnx(network, tmp_path / "two.onnx", given))
    wide = at_batch(given, 5)
    assert torch.equal(wide[1][4], given[1][0])
    for found, expected in zip(run(*wide), network(*wide), strict=True):
        torch.testing.assert_close(found, expected.detach())
    with pytest.raises(InputError, match=r"takes 2 inputs \(left, right\), got 1"):
        run(given[0])
    fixed = OnnxNetwork(export_onnx(network, tmp_path / "fixed.onnx", given, dynamic_batch=False))
    assert fixed(*given)[0].shape == (2, 3)
    with pytest.raises(InputError, match=r"fixed.onnx does not take these inputs: .*dimensions"):
        fixed(*wide)


class Nested(nn.Module):
    """An LSTM with outputs in whatever structure a function makes of them."""

    def __init__(self, made):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.made = made

    def forward(self, inputs):
        return self.made(*self.rnn(inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "count"),
    [
        (lambda out, state: (out, state), 3),
        (lambda out, state: {"out": out, "hidden": state[0]}, 2),
        (lambda out, state: {"later": [state[1], (state[0],)], "first": out}, 3),
        (lambda out, _: {"out": out, "aux": None}, 1),
        (lambda out, _: [out], 1),
    ],
)
def test_outputs_in_one_another_come_in_their_order(made, count, tmp_path):
    torch.manual_seed(0)
    network, inputs = Nested(made), torch.randn(2, 5, 4)
    found = outputs_of(OnnxNetwork(export_onnx(network, tmp_path / "net.onnx", inputs))(inputs))
    expected = outputs_of(network(inputs))
    assert len(found) == len(expected) == count
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-5, rtol=0)


def test_outputs_are_flattened_and_nothing_else_is_taken():
    a, b, c = (torch.full((1,), float(number)) for number in range(3))
    assert outputs_of({"x": (b, [a, None]), "y": {"z": c}}) == (b, a, c)
    with pytest.raises(InputError, match="outputs must be tensors, or tuples, lists and dicts of tensors, got str"):
        outputs_of((a, "b"))


@pytest.mark.slow
@pytest.mark.parametrize("error", [InputError("differs"), KeyError("unforeseen"), KeyboardInterrupt()])
def test_no_file_is_left_that_was_not_checked(error, tmp_path, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr("distill_lightning.compression.onnx.export._check_equal", failing)
    with pytest.raises(type(error)):
        export_onnx(nn.Linear(4, 3), tmp_path / "net.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    (tmp_path / "net.onnx").write_text("of before")
    with pytest.raises(type(error)):
        export_onnx(nn.Linear(4, 3), tmp_path / "net.onnx", torch.randn(2, 4))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]


@pytest.mark.slow
def test_a_forward_that_the_file_cannot_follow_is_refused(tmp_path):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs):
            # The exporter takes the length for a constant.
            return self.layer(inputs) * len(inputs)

    with pytest.raises(InputError, match=r"(cannot be exported|does not take|does not compute)"):
        export_onnx(Fickle(), tmp_path / "net.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wrong_calls_are_told_the_way_out(tmp_path):
    conv, rnn = tmp_path / "conv.onnx", tmp_path / "rnn.onnx"
    export_onnx(plain_cnn(), conv, torch.randn(2, 1, 8, 8))
    export_onnx(Rows(nn.GRU), rnn, torch.randn(2, 8, 8))
    out = tmp_path / "out.onnx"
    with pytest.raises(InputError, match="convolutions, which dynamic .* several times slower: use mode='static'"):
        quantize_onnx(conv, out, mode="dynamic")
    with pytest.raises(InputError, match="recurrent layers, which static .* use mode='dynamic'"):
        quantize_onnx(rnn, out, batches=[torch.randn(2, 8, 8)])
    # ONNX Runtime has no int8 kernel for GRUs, and would say nothing.
    with pytest.raises(InputError, match=r"only \d+% of the weights would be int8"):
        quantize_onnx(rnn, out, mode="dynamic")
    assert not out.exists()
    with pytest.raises(InputError, match="'static' needs batches"):
        quantize_onnx(conv, out)
    with pytest.raises(InputError, match="'dynamic' takes no batches"):
        quantize_onnx(rnn, out, mode="dynamic", batches=[])
    with pytest.raises(InputError, match="there is no calibration batch"):
        quantize_onnx(conv, out, batches=[])
    spoilt = torch.randn(2, 1, 8, 8)
    spoilt[1, 0, 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"^quantize_onnx: input '\w+' of calibration batch 1 has values that are not"):
        quantize_onnx(conv, out, batches=[torch.randn(2, 1, 8, 8), spoilt])
    with pytest.raises(InputError, match="takes 1 inputs, but a calibration batch has 2"):
        quantize_onnx(conv, out, batches=[(torch.randn(2, 1, 8, 8), torch.zeros(2))])
    with pytest.raises(InputError, match="mode must be one of static, dynamic, got 'qat'"):
        quantize_onnx(conv, out, mode="qat")
    with pytest.raises(InputError, match="there is no file .*nothing.onnx"):
        quantize_onnx(tmp_path / "nothing.onnx", out, mode="dynamic")
    with pytest.raises(InputError, match="there is no file .*nothing.onnx"):
        OnnxNetwork(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(InputError, match="text.onnx cannot be read by ONNX Runtime"):
        OnnxNetwork(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="have no sample"):
        at_batch(torch.zeros(0, 3), 2)


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.12.1"])
def test_an_older_pytorch_is_refused_in_one_line(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    message = f"torch {version} cannot write every network as an ONNX file: install torch>=2.13"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        export_onnx(plain_cnn(), tmp_path / "net.onnx", torch.randn(2, 1, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, package):
    real = importlib.import_module

    def missing(name, *rest):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=rf"^{package} is not installed: pip install 'distill-lightning\[onnx\]'$"):
        export_onnx(plain_cnn(), tmp_path / "net.onnx", torch.randn(2, 1, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_latency_has_two_baselines_that_compute_the_same(tmp_path, monkeypatch):
    network = plain_cnn().train()
    # As a frozen BatchNorm would be.
    network[1].eval()
    modes = [module.training for module in network.modules()]
    images = torch.randn(2, 1, 8, 8)
    dense = export_onnx(network, tmp_path / "net.onnx", images)
    out = quantize_onnx(dense, tmp_path / "int8.onnx", batches=[images])
    seen = []

    def spied(first, second, **options):
        seen.append((first(), second(), network.training))
        return compare_latency(first, second, **options)

    monkeypatch.setattr("distill_lightning.compression.onnx.latency.compare_latency", spied)
    found = onnx_latency(out, dense, network, images)
    assert set(found) == {"onnxruntime", "torch"}
    assert all(isinstance(value, Latency) and len(value.dense) == 50 for value in found.values())
    assert [module.training for module in network.modules()] == modes
    assert len(set(modes)) == 2
    (by_runtime, int8, _), (by_torch, again, mode) = seen
    assert mode is False
    torch.testing.assert_close(by_runtime, by_torch, atol=1e-5, rtol=0)
    assert torch.equal(int8, again)
    assert not torch.equal(int8, by_runtime)


# In the place of a network


class Pair(NamedTuple):
    logits: torch.Tensor
    state: tuple[torch.Tensor, None]


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: (x, (2 * x, None)),
        lambda x: {"hidden": 2 * x, "nothing": None, "logits": x},
        lambda x: Pair(x, (3 * x, None)),
    ],
)
def test_a_file_returns_what_its_network_does(made):
    """The session gives flat tensors; a naive one computes the network and flattens it."""

    class Network(nn.Module):
        def forward(self, x, scale):
            return made(scale * x)

    network, inputs = Network(), (torch.randn(2, 3), 2)

    def session(x):
        flat = outputs_of(network(x, 2))
        return flat[0] if len(flat) == 1 else flat

    wrapped = NetworkInOnnx(session, network, inputs)
    x = torch.randn(5, 3)
    found, expected = wrapped(x, 2), network(x, 2)
    assert repr(found) == repr(expected)
    assert type(found) is type(expected)
