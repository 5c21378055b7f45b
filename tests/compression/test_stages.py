"""A stage holds what was measured, recomputed here by hand, and says why where nothing was."""

import copy
import re
import statistics
import zlib

import pytest
import torch
from torch import nn

from distill_lightning import InputError
from distill_lightning.compression.access.computed import computed, original_of
from distill_lightning.compression.costs.latency import Latency, Ratio
from distill_lightning.compression.factor.factoring import build_factors, replace_layer
from distill_lightning.compression.file.format import read_packed, write_packed
from distill_lightning.compression.file.packed import pack_codes, pack_dense
from distill_lightning.compression.onnx import latency as onnx_latency
from distill_lightning.compression.report import measure_stage as stages
from distill_lightning.compression.report.measure_stage import measure_stage
from distill_lightning.compression.report.stage import LatencyRow, Stage
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme
from distill_lightning.networks import SmallLSTM, SmallTransformer
from distill_lightning.networks.weights import load_strictly, write_weights


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)
    )


IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def write(network, path):
    """Codes where a weight is quantized, else the tensor."""
    tensors = {}
    for name, module in network.named_children():
        for key, entry in computed(module).items():
            tensors[f"{name}.{key}"] = pack_codes(entry.codes(original_of(module, key)), entry.scheme)
        for key, value in module.state_dict().items():
            if not key.startswith("parametrizations.weight"):
                tensors[f"{name}.{key}"] = pack_dense(value)
    write_packed(path, tensors, {})


def read(path):
    network = build()
    load_strictly(network, read_packed(path)[1], source=str(path))
    return network


def fake_latency(dense, compressed, *, rounds, **_):
    """Calls both once, and pretends that the second took half the time."""
    dense(), compressed()
    times = tuple(0.002 for _ in range(rounds))
    halves = tuple(0.001 for _ in range(rounds))
    return Latency(times, halves, times, halves, Ratio(0.5, 0.4, 0.6), Ratio(0.55, 0.45, 0.65), "thread")


def test_everything_is_measured_on_what_the_artefact_gives_back(tmp_path, monkeypatch):
    dense, network = build(), build()
    with torch.no_grad():
        network[4].weight[:, ::2] = 0
    quantize_weights(network[4], scheme=Scheme(bits=4))
    network.train()
    dense.train()
    before = copy.deepcopy(network.state_dict())
    seen = []

    def latency(first, second, **options):
        seen.append((first(), second(), options["rounds"]))
        return fake_latency(first, second, **options)

    monkeypatch.setattr(stages, "compare_latency", latency)
    stage = measure_stage(
        "1 Quantize", network, dense, IMAGES, kind="after", scores={"accuracy": 0.5}, write=write, read=read,
        batch_sizes=(1, 5), weight_bits=4, notes=["a note"],
    )  # fmt: skip
    assert network.training
    assert dense.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    weights = {"conv": 16 * 9, "conv bias": 16, "norm": 32, "fc": 10 * 1024, "fc bias": 10}
    assert stage.parameters == sum(weights.values())
    # Half of the linear layer is zero; so are a few that rounded to zero, and the norm's 16 shifts.
    plain = (write(network, tmp_path / "a"), read(tmp_path / "a"))[1]
    assert stage.nonzero == sum(int(parameter.count_nonzero()) for parameter in plain.parameters())
    assert stage.nonzero <= sum(weights.values()) - 5120 - 16
    # One sample, whatever the batch of the example.
    assert stage.macs == 64 * 16 * 9 + 10 * 1024
    assert stage.effective_macs == 64 * 16 * 9 + int(plain[4].weight.count_nonzero())
    content = (tmp_path / "a").read_bytes()
    # The file's name is part of what torch.save writes.
    write_weights(plain, tmp_path / "state_dict.pt")
    assert stage.nbytes["artefact"] == len(content)
    assert stage.nbytes["artefact_deflated"] == len(zlib.compress(content, 9))
    assert stage.nbytes["state_dict"] == (tmp_path / "state_dict.pt").stat().st_size
    assert stage.differences == {"artefact": 0, "state_dict": 0}
    assert stage.missing == {}
    assert (stage.notes, stage.weight_bits, stage.scores) == (["a note"], 4, {"accuracy": 0.5})
    assert [len(first) for first, _, _ in seen] == [1, 5]
    for first, second, rounds in seen:
        repeated = IMAGES[torch.arange(len(first)) % 3]
        with torch.no_grad():
            torch.testing.assert_close(first, dense.eval()(repeated))
            torch.testing.assert_close(second, plain.eval()(repeated))
        assert rounds == 50
    row = stage.latency[0]
    assert (row.batch, row.runtime, row.baseline) == (1, "torch", "torch")
    assert (row.dense_ms, row.compressed_ms, row.ratio, row.low, row.high) == (2, 1, 0.5, 0.4, 0.6)
    assert (row.wall_ratio, row.wall_low, row.wall_high) == (0.55, 0.45, 0.65)
    assert row.dense_rounds == [2] * 50
    assert row.faster
    assert not row.slower


def test_plain_values_come_back_from_a_checkpoint_that_runs_no_code(tmp_path):
    row = LatencyRow(1, "torch", "torch", 2.0, 1.0, 0.5, 0.4, 0.6, 0.5, 0.4, 0.6, "faster", [2.0], [1.0])
    stage = Stage(
        "final", "after", {"nll": float("inf")}, 10, 5, 100, 50, ["a.b"], {"artefact": 7}, {"artefact": 0.0}, [row],
        ["note"], {"onnx": "why"}, 2,
    )  # fmt: skip
    torch.save(stage.as_plain(), tmp_path / "stage.pt")
    plain = torch.load(tmp_path / "stage.pt", weights_only=True)
    assert Stage.of_plain(plain) == stage
    assert isinstance(Stage.of_plain(plain).latency[0], LatencyRow)
    with pytest.raises(InputError, match="stage 'final' was not written by this version"):
        Stage.of_plain(plain | {"colour": "red"})


@pytest.mark.parametrize(
    ("low", "high", "begins"), [(0.9, 0.97, "faster"), (0.9, 0.99, "no measured"), (1.01, 1.1, "no measured"),
                                (1.03, 1.1, "slower")]
)  # fmt: skip
def test_a_difference_as_small_as_between_equal_networks_is_none(low, high, begins):
    ratio = Ratio((low + high) / 2, low, high)
    row = LatencyRow.of(
        Latency((1.0,), (1.0,), (1.0,), (1.0,), ratio, ratio, "thread"), batch=1, runtime="torch", baseline="torch"
    )
    assert row.claim.startswith(begins)
    assert f"{low:.2f} to {high:.2f}" in row.claim


def test_real_times_are_of_both_networks_with_one_thread():
    threads = torch.get_num_threads()
    stage = measure_stage("copy", build(), build(), IMAGES, kind="after", scores={}, batch_sizes=(2,))
    (row,) = stage.latency
    assert row.dense_ms == pytest.approx(statistics.median(row.dense_rounds))
    assert row.ratio == pytest.approx(row.compressed_ms / row.dense_ms)
    assert row.low <= row.high
    assert len(row.dense_rounds) == len(row.compressed_rounds) == 50
    assert torch.get_num_threads() == threads


# what cannot be measured


def test_an_artefact_that_does_not_reproduce_is_no_artefact():
    def wrong(path):
        network = read(path)
        nn.init.zeros_(network[4].bias)
        return network

    stage = measure_stage(
        "x", build(), build(), IMAGES, kind="after", scores={}, write=write, read=wrong, batch_sizes=()
    )
    assert set(stage.nbytes) == {"state_dict"}
    assert "does not reproduce the network" in stage.missing["artefact"]
    assert stage.missing["latency"] == "not asked for"
    tolerant = measure_stage(
        "x", build(), build(), IMAGES, kind="after", scores={}, write=write, read=wrong, batch_sizes=(), tolerance=1
    )
    assert 0 < tolerant.differences["artefact"] < 1


def test_reasons_stand_where_nothing_was_asked_for_or_nothing_can_be_counted():
    parametrized = build()
    quantize_weights(parametrized[4], scheme=Scheme(bits=4))
    stage = measure_stage("x", parametrized, build(), IMAGES, kind="before", scores={}, batch_sizes=())
    assert stage.nbytes == {}
    assert stage.missing["artefact"] == "not asked for"
    assert "parametrized" in stage.missing["state_dict"]
    nothing = measure_stage("x", nn.Flatten(), nn.Flatten(), IMAGES, kind="dense", scores={})
    assert "nothing that counts" in nothing.missing["macs"]
    assert (nothing.macs, nothing.latency) == (0, [])
    assert "latency" not in nothing.missing


class OfThree(nn.Module):
    """Runs with a batch of 3 alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, images):
        return self.head(images.reshape(3, 64))


def test_what_a_network_of_one_batch_size_cannot_do_is_left_out(monkeypatch):
    monkeypatch.setattr(stages, "compare_latency", fake_latency)
    stage = measure_stage(
        "x", OfThree(), OfThree(), IMAGES, kind="after", scores={}, write=write, read=read_of_three,
        batch_sizes=(1, 3),
    )  # fmt: skip
    for what in ("macs", "latency"):
        assert re.fullmatch(r"OfThree runs with a batch of 3 and not with one of 1 \(.*\): so .*", stage.missing[what])
    assert stage.macs == 0
    assert [row.batch for row in stage.latency] == [3]
    assert {"artefact", "state_dict"} <= stage.nbytes.keys()


def read_of_three(path):
    network = OfThree()
    load_strictly(network, read_packed(path)[1], source=str(path))
    return network


def test_wrong_calls_are_refused():
    with pytest.raises(InputError, match="give write and read, or neither"):
        measure_stage("x", build(), build(), IMAGES, kind="after", scores={}, write=write)
    with pytest.raises(InputError, match="kind must be one of dense, before, after, control, got 'middle'"):
        measure_stage("x", build(), build(), IMAGES, kind="middle", scores={}, batch_sizes=())
    with pytest.raises(InputError, match="onnx must be one of none, float, static, dynamic, got 'int8'"):
        measure_stage("x", build(), build(), IMAGES, kind="after", scores={}, onnx="int8")
    with pytest.raises(InputError, match=r"stage 'x': .* move the networks with .cpu\(\)"):
        measure_stage("x", build(), build().to("meta"), IMAGES, kind="after", scores={})


# ONNX


@pytest.mark.slow
def test_onnx_files_are_written_and_timed_against_both_baselines(monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(stages, "compare_latency", fake_latency)
    monkeypatch.setattr(onnx_latency, "compare_latency", fake_latency)
    timed, latency = [], stages.onnx_latency
    monkeypatch.setattr(
        stages, "onnx_latency", lambda file, *args, **kw: (timed.append(file), latency(file, *args, **kw))[1]
    )
    options = {"scores": {}, "onnx": "static", "calibration": [IMAGES]}
    stage = measure_stage("x", build(), build(), IMAGES, kind="after", batch_sizes=(2,), **options)
    weights = 4 * stage.parameters
    assert 0.98 * weights < stage.nbytes["onnx"] < weights + 10_000
    assert stage.nbytes["onnx_int8"] < weights / 4 + 10_000
    assert 0 < stage.differences["onnx"] < 1e-5 < stage.differences["onnx_int8"] < 0.1
    assert [(row.runtime, row.baseline, row.batch) for row in stage.latency] == [
        ("torch", "torch", 2), ("onnxruntime", "onnxruntime", 2), ("onnxruntime", "torch", 2),
        ("onnxruntime int8", "onnxruntime", 2), ("onnxruntime int8", "torch", 2),
    ]  # fmt: skip
    # Each time is that of the file that its label tells of.
    assert [path.name for path in timed] == ["float.onnx", "int8.onnx"]
    dense = measure_stage("dense", build(), build(), IMAGES, kind="dense", batch_sizes=(2,), **options)
    assert dense.latency == []
    assert "onnx" in dense.nbytes
    # Convolutions cannot be quantized dynamically; the float file and the reason remain.
    refused = measure_stage("x", build(), build(), IMAGES, kind="after", batch_sizes=(2,), scores={}, onnx="dynamic")
    assert "use mode='static'" in refused.missing["onnx_int8"]
    assert "onnx" in refused.nbytes
    assert [row.runtime for row in refused.latency] == ["torch", "onnxruntime", "onnxruntime"]


class Structured(nn.Module):
    """A recurrent layer that returns its output in a structure."""

    def __init__(self, made):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.made = made

    def forward(self, inputs):
        return self.made(*self.rnn(inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "made", [lambda out, state: (out, state), lambda out, _: {"logits": out}, lambda out, _: {"a": out, "b": None}]
)
def test_outputs_in_a_structure_have_an_onnx_file(made, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    for module in (stages, onnx_latency):
        monkeypatch.setattr(module, "compare_latency", fake_latency)
    network, inputs = Structured(made), torch.randn(2, 5, 4)
    stage = measure_stage("x", network, network, inputs, kind="after", batch_sizes=(2,), scores={}, onnx="float")
    assert stage.nbytes["onnx"] > 0
    assert stage.differences["onnx"] < 1e-5
    assert [row.runtime for row in stage.latency] == ["torch", "onnxruntime", "onnxruntime"]


def test_factored_recurrent_layers_are_measured_like_others():
    network = nn.Sequential(nn.LSTM(8, 16, batch_first=True))
    piece = copy.deepcopy(network)
    layer = build_factors(piece[0], {"kind": "recurrent", "ranks": {"weight_hh_l0": 2}})
    layer.fill(piece[0])
    replace_layer(piece, "0", layer)
    stage = measure_stage("x", piece, network, torch.randn(2, 5, 8), kind="after", batch_sizes=(), scores={})
    assert stage.macs == 5 * 64 * (8 + 16) + 64 * 2 * 16
    assert "macs" not in stage.missing


def test_a_transformer_reproduces_to_the_bit():
    torch.manual_seed(0)
    network = SmallTransformer(32, vocabulary=32, length=16)
    stage = measure_stage("x", network, network, torch.arange(32).reshape(2, 16), kind="dense", scores={})
    assert stage.nbytes["state_dict"] > 0
    assert stage.differences["state_dict"] == 0


@pytest.mark.slow
def test_calibration_data_are_of_no_concern_to_a_dynamic_int8_version():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network, images = SmallLSTM(10, input_size=8, width=32), torch.randn(2, 1, 8, 8)
    stage = measure_stage("x", network, network, images, kind="dense", scores={}, onnx="dynamic", calibration=[])
    assert "onnx_int8" not in stage.missing
    assert stage.nbytes["onnx_int8"] < stage.nbytes["onnx"]
