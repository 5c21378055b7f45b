"""The benchmark of compression measures what it says it measures; how fast anything is decides no test."""

import copy
import json

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from benchmarks import compression_kernels as kernels
from distill_lightning.compression.report.stage import LatencyRow, Stage

SUBJECTS = {subject.name: subject for subject in kernels.subjects(small=True)}
WAYS = [(name, way) for name, subject in SUBJECTS.items() for way in subject.ways]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_what_is_written_is_read_again_bit_by_bit(tmp_path, name, way):
    subject = SUBJECTS[name]
    network = subject.build().eval()
    subject.ways[way](network, subject.inputs)
    kernels.write(network, tmp_path / "net")
    again = kernels.reader(subject.build)(tmp_path / "net").eval()
    with torch.no_grad():
        assert torch.equal(again(subject.inputs), network(subject.inputs))


def test_halves_are_halves():
    layers = {"half the channels": ("stage3.0.conv2", "out_channels"), "half the hidden units": ("rnn", "hidden_size")}
    for subject in SUBJECTS.values():
        for way, (path, size) in layers.items():
            if way in subject.ways:
                network = subject.build()
                small = copy.deepcopy(network)
                subject.ways[way](small, subject.inputs)
                assert 2 * getattr(small.get_submodule(path), size) == getattr(network.get_submodule(path), size)
    subject = SUBJECTS["Transformer encoder"]
    small = subject.build()
    subject.ways["half the heads and neurons"](small, subject.inputs)
    layers = small.encoder.layers
    assert [(layer.self_attn.num_heads, layer.linear1.out_features) for layer in layers] == [(2, 64), (2, 64)]


def row(batch, ratio, runtime="torch", baseline="torch"):
    return LatencyRow(batch, runtime, baseline, 1.0, ratio, ratio, ratio, ratio, ratio, ratio, ratio, "")


def test_a_time_is_the_worst_of_the_batch_sizes_in_one_runtime():
    dense = Stage("dense", "dense", {}, 100, 100, 1000, 1000, nbytes={"artefact": 400, "onnx": 500})
    stage = Stage(
        "x", "after", {}, 50, 50, 300, 300, nbytes={"artefact": 100, "onnx_int8": 125},
        latency=[row(1, 0.5), row(32, 0.7), row(1, 0.2, "onnxruntime int8"),
                 row(1, 0.4, "onnxruntime int8", "onnxruntime"), row(1, 0.9, "onnxruntime", "onnxruntime")],
    )  # fmt: skip
    found = {what: kernels.ratio_of(what, stage, dense) for what in (
        "time", "time in ONNX Runtime", "parameters", "MACs", "bytes", "int8 ONNX bytes",
    )}  # fmt: skip
    assert found == {
        "time": 0.7, "time in ONNX Runtime": 0.4, "parameters": 0.5, "MACs": 0.3, "bytes": 0.25,
        "int8 ONNX bytes": 0.25,
    }  # fmt: skip
    assert kernels.Gate("n", "w", 0.3, 0.3).holds
    assert not kernels.Gate("n", "w", 0.31, 0.3).holds


@pytest.mark.slow
def test_a_small_run_writes_every_limit_and_a_profile_where_time_does_not_hold(tmp_path, monkeypatch, capsys):
    subject = SUBJECTS["LSTM language model"]
    limits = {"int8": {"int8 ONNX bytes": 0.5, "time in ONNX Runtime": 0.0}, "half the hidden units": {"time": 0.0}}
    changed = kernels.Subject(**{**vars(subject), "limits": limits, "batch_sizes": (2,)})
    monkeypatch.setattr(kernels, "subjects", lambda *, small: [changed, SUBJECTS["ResNet-18"]])
    content = kernels.main(
        ["--small", "--only", "LSTM language model", "--rounds", "50", "--output", str(tmp_path / "results")]
    )
    assert json.loads((tmp_path / "results/kernels.json").read_text()) == content
    assert [(gate["what"], gate["holds"]) for gate in content["gates"]] == [
        ("int8: int8 ONNX bytes", True), ("int8: time in ONNX Runtime", False), ("half the hidden units: time", False),
    ]  # fmt: skip
    in_runtime, in_torch = content["profiles"].values()
    assert "LSTM" in in_runtime["dense"]
    assert "DynamicQuantizeLSTM" in in_runtime["compressed"]
    assert any("lstm" in name or "rnn" in name for name in in_torch["compressed"])
    page = (tmp_path / "results/kernels.md").read_text()
    assert "| LSTM language model | int8: time in ONNX Runtime |" in page
    assert "- command: python -m benchmarks.compression_kernels --small" in page
    assert "Limits" in capsys.readouterr().out
    stages = [Stage.of_plain(plain) for plain in content["stages"]["LSTM language model"]]
    assert [stage.name for stage in stages] == ["dense", "int8", "half the hidden units"]
    assert all(stage.differences["artefact"] == 0 for stage in stages)
